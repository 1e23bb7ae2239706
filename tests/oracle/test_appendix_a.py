"""The listing of the paper's Appendix A, as the benchmark runs it: right gradients, and what it keeps alive."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import smtune
from smtune.blocks import gather
from smtune.selection import ModulePlan

SIZE = 16
PLAN = smtune.Plan(
    modules={
        "model.layers.0.self_attn.q_proj": ModulePlan((64, 64), (0, 3, 1), (2, 0, 2)),
        "model.layers.0.self_attn.k_proj": ModulePlan((32, 64), (), ()),
        "model.layers.1.self_attn.v_proj": ModulePlan((32, 64), (1,), (3,)),
    },
    block_size=SIZE,
    criterion="random",
    policy="global",
    budget=4,
    total_params=100_000,
)
TRAINED = [name for name, module in PLAN.modules.items() if module.rows]


@pytest.fixture(scope="module")
def listing():
    path = Path(__file__).parents[2] / "benchmarks" / "appendix_a.py"
    spec = importlib.util.spec_from_file_location("appendix_a", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(model):
    """The loss of one batch, and x and dL/dy of every trained linear once its backward has run."""
    seen = {name: {} for name in TRAINED}

    def watch(name):
        def keep(module, args, y):
            seen[name]["x"] = args[0].detach()
            y.register_hook(lambda grad_y: seen[name].update(grad_y=grad_y))

        model.get_submodule(name).register_forward_hook(keep)

    for name in TRAINED:
        watch(name)
    tokens = torch.randint(0, 256, (2, 12))
    return model(input_ids=tokens, labels=tokens).loss, seen


def test_its_gradients_are_the_dense_gradients_at_the_blocks(listing, tiny_llama):
    trained = listing.build(tiny_llama, PLAN)
    loss, seen = run(tiny_llama)
    loss.backward()
    assert [tuple(blocks.shape) for blocks in trained] == [(3 * SIZE, SIZE), (SIZE, SIZE)]
    assert all(parameter.grad is None for parameter in tiny_llama.parameters() if not parameter.requires_grad)
    assert sum(parameter.requires_grad for parameter in tiny_llama.parameters()) == 2
    for name, blocks in zip(TRAINED, trained):
        expected = smtune.block_grad_reference(seen[name]["grad_y"], seen[name]["x"], PLAN.index(name)).flatten(0, 1)
        torch.testing.assert_close(blocks.grad, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_the_forward_copies_the_blocks_into_the_weight(listing, tiny_llama):
    tokens = torch.randint(0, 256, (1, 12))
    before = tiny_llama(input_ids=tokens).logits
    trained = listing.build(tiny_llama, PLAN)
    assert torch.equal(tiny_llama(input_ids=tokens).logits, before)
    with torch.no_grad():
        trained[0].add_(1.0)
    assert not torch.equal(tiny_llama(input_ids=tokens).logits, before)
    layer = tiny_llama.get_submodule(TRAINED[0])
    assert torch.equal(gather(layer.weight, PLAN.index(TRAINED[0])).flatten(0, 1), trained[0])


def test_its_slices_keep_the_whole_input_alive_and_hooks_do_not_see_them(listing, tiny_llama):
    listing.build(tiny_llama, PLAN)
    hooked = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: hooked.add(tensor.untyped_storage().data_ptr()) or tensor, lambda tensor: tensor
    ):
        loss, seen = run(tiny_llama)
    slices = listing.kept_slices(loss)
    assert [tuple(x.shape) for x in slices].count((2, 12, SIZE)) == len(slices) == PLAN.n_blocks
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in slices}
    inputs = {of["x"].untyped_storage().data_ptr(): 2 * 12 * 64 * 4 for of in seen.values()}
    assert kept == inputs  # all 64 columns of each layer's input, of which 32 and 16 are read
    assert not hooked & set(kept)


@pytest.mark.parametrize("replacement", [nn.Linear(64, 64, bias=True), nn.Identity()], ids=["bias", "not a linear"])
def test_refuses_what_the_listing_cannot_do(listing, tiny_llama, replacement):
    tiny_llama.set_submodule(TRAINED[0], replacement)
    with pytest.raises(smtune.InputError, match="without bias"):
        listing.build(tiny_llama, PLAN)
