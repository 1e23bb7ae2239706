"""DeepSpeed's ZeRO-1, 2 and 3 over two gloo processes train the blocks that one process trains.

Runs where deepspeed is installed (`pip install deepspeed`), which CI does not do: its first start compiles for minutes.
"""

from __future__ import annotations

import importlib.util
import os
import warnings

import pytest
import torch
import torch.multiprocessing as mp
from test_wrappers import N_STEPS, WORLD_SIZE, free_port, make_model, rows, train

STAGES = (1, 2, 3)
LEARNING_RATE = 1e-2


def rank_main(rank, port, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD_SIZE),
        "DS_ACCELERATOR": "cpu",
    }
    import deepspeed

    deepspeed.init_distributed("gloo")
    results = {}
    for stage in STAGES:
        results[stage] = train_under_zero(deepspeed, stage, rank)
    torch.save(results, folder / f"{rank}.pt")


def train_under_zero(deepspeed, stage, rank):
    model = make_model("resident", False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        },
    )
    losses = []
    for step in range(N_STEPS):
        for ids in rows(step)[:, rank::WORLD_SIZE]:
            loss = engine(input_ids=ids, labels=ids).loss
            with torch.no_grad():
                losses.append(engine(input_ids=ids, labels=ids).loss.item())
            engine.backward(loss)
            engine.step()
    with deepspeed.zero.GatheredParameters(trained):
        blocks = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return blocks, losses


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: pip install deepspeed")
def test_zero_trains_as_one_process(tmp_path):
    mp.spawn(rank_main, args=(free_port(), tmp_path), nprocs=WORLD_SIZE)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD_SIZE)]
    expected, expected_losses = train(make_model("resident", False), rows, scale=0.5)
    for stage in STAGES:
        (blocks, losses), (_, other_losses) = (rank[stage] for rank in ranks)
        for name, block in blocks.items():
            apart = (block - expected[name]).abs()
            assert apart.median() < 1e-6, (stage, name)
            assert (apart > 1e-4).float().mean() < 0.01, (stage, name)
        together = [(a + b) / 2 for a, b in zip(losses, other_losses)]
        assert together == pytest.approx(expected_losses, rel=1e-4)
