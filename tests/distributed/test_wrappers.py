"""DDP and `fully_shard` itself under checkpointing: two gloo processes train the blocks that one trains without."""

from __future__ import annotations

import peft
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from engines import acting_as, free_port, make_optimizer
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import smtune

WORLD_SIZE, N_STEPS = 2, 3
WRAPPERS = ("ddp", "fsdp2")


def make_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            vocab_size=64,
        )
    )
    config = smtune.SMTConfig(
        target_modules=["q_proj", "k_proj", "v_proj"], block_size=8, budget=17, criterion="random", mode="resident"
    )
    return peft.get_peft_model(base, config).train()


def rows(step):
    """4 rows for each of 2 micro-batches; a rank takes every second row."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 64, (2, 4, 12), generator=generator)


def train(model, ids_of_step):
    """Steps of two accumulated micro-batches each, with an evaluation in the middle of every step.

    Returns the blocks by name, whole, and the losses of the evaluations.
    """
    optimizer, losses = make_optimizer(model), []
    for step in range(N_STEPS):
        first, second = ids_of_step(step)
        for ids in (first, second):
            loss = model(input_ids=ids, labels=ids).loss
            with torch.no_grad():
                losses.append(model(input_ids=ids, labels=ids).loss.item())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    blocks = {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return blocks, losses


def wrap(model, wrapper):
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def rank_main(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD_SIZE)
    try:
        results = {}
        for wrapper in WRAPPERS:
            model, runs = make_model(), []
            base = model.get_base_model()
            base.activation_checkpointing_enable({"use_reentrant": False})
            for layer in base.model.layers:
                layer.self_attn.register_forward_pre_hook(lambda module, args, runs=runs: runs.append(None))
            model = wrap(model, wrapper)
            sharded = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
            assert (sharded > 0) == (wrapper == "fsdp2")
            with acting_as("resident"):
                results[wrapper] = train(model, lambda step: rows(step)[:, rank::WORLD_SIZE])
            # Of 2 layers, in 2 batches a step: forward, evaluation, and the forward again for the backward.
            assert len(runs) == 2 * 2 * 3 * N_STEPS
        torch.save(results, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, args=(free_port(), folder), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("wrapped", ["PeftModel", "tuner", "model"])
def test_ddp_sends_no_buffers_of_ours(wrapped):
    """By default DDP sends all buffers before every forward: the base's blocks would be as much as gradients are."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = make_model()
        model.add_adapter("second", model.peft_config["default"])
        module = {"PeftModel": model, "tuner": model.base_model, "model": model.base_model.model}[wrapped]
        names = {id(buffer): name for name, buffer in module.named_buffers()}
        sent = [names[id(buffer)] for buffer in DistributedDataParallel(module).modules_buffers]
    finally:
        dist.destroy_process_group()
    assert any("smt_originals" in name for name in names.values())
    assert sent == [name for name in names.values() if "smt_" not in name]


@pytest.mark.nightly
@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_train_as_one(ranks, wrapper):
    with acting_as("resident"):
        expected, expected_losses = train(make_model(), rows)
    (blocks, losses), (others, other_losses) = (results[wrapper] for results in ranks)
    assert list(blocks) == list(expected)
    for name, block in blocks.items():
        assert torch.equal(block, others[name])
        assert block.abs().max() > 1e-3  # it has learned
        torch.testing.assert_close(block, expected[name], rtol=0, atol=1e-6)
    # Each rank evaluates its own half of the rows; together they are what one process saw, with the same blocks.
    together = [(a + b) / 2 for a, b in zip(losses, other_losses)]
    assert together == pytest.approx(expected_losses, rel=1e-4)
    assert expected_losses[-1] != pytest.approx(expected_losses[0], rel=1e-3)
