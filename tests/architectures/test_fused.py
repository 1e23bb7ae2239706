"""Fused projections: the labels of their rows, checked against what the rows do, and plans that speak of q, k and v.

Facts that tell q, k and v apart in any attention, without reading its code: a key that is masked out gets no gradient
for its k and its v, and its token's q does; without v attention's output does not depend on q and k; without k it does
not depend on q.
"""

from __future__ import annotations

import copy
import io

import numpy as np
import peft
import pytest
import torch
from decoders import DECODERS, batches, build
from dense_twin import check_training, final_logits, mask, train, twin
from rich.console import Console

import smtune
from smtune.report import plan_table
from smtune.tuner.targets import ATTENTION, row_kinds
from smtune.weights import is_transposed, shape_OI, view_OI

FUSED = [
    name
    for name, (model_type, _) in DECODERS.items()
    if any(callable(layout) for layout in ATTENTION[model_type].values())
]


def labelled(model):
    """(layer, the kind of each of its rows) of all projections with default targets' names."""
    names = ATTENTION[model.config.model_type]
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names:
            kinds = row_kinds(model.config, name, shape_OI(module)[0], 1)
            assert kinds
            yield module, np.array(kinds)


def output_gradients(model):
    """[(dY of a projection, its rows' kinds)] of a random functional of all logits, with the last key masked."""
    ids = batches(1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    caught = []
    layers = list(labelled(model))
    hooks = [
        layer.register_full_backward_hook(
            lambda module, _, grads, kinds=kinds: caught.append((_by_token(grads[0]), kinds))
        )
        for layer, kinds in layers
    ]
    logits = model(input_ids=ids, attention_mask=mask).logits
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    for hook in hooks:
        hook.remove()
    assert len(caught) == len(layers)
    return caught


def _by_token(grad_y):
    """(B, T, O), also of a latent that is handled as one head, (B, 1, T, O)."""
    return grad_y.squeeze(1) if grad_y.dim() == 4 else grad_y


def without(model, kind):
    """A copy in which the rows of a kind are zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer, kinds in labelled(model):
            view_OI(layer.weight, is_transposed(layer))[kinds == kind] = 0
            if layer.bias is not None:
                layer.bias[kinds == kind] = 0
    return model


@pytest.mark.parametrize("architecture", FUSED)
def test_rows_are_what_their_labels_say(architecture):
    model = build(architecture)
    for grad_y, kinds in output_gradients(model):
        negligible = 1e-6 * grad_y.abs().max()
        of_last_token = grad_y[:, -1].abs().amax(0)
        assert (of_last_token[np.isin(kinds, ["q", "gate"])] > 0).all()
        assert (of_last_token[np.isin(kinds, ["k", "v"])] <= negligible).all()
        assert (grad_y[:, :-1].abs().amax((0, 1))[kinds != "q"] > negligible).all()
    for grad_y, kinds in output_gradients(without(model, "v")):
        of_rows = grad_y.abs().amax((0, 1))
        assert (of_rows[np.isin(kinds, ["q", "k", "gate"])] == 0).all()
        assert (of_rows[kinds == "v"] > 0).all()
    for grad_y, kinds in output_gradients(without(model, "k")):
        of_rows = grad_y.abs().amax((0, 1))
        assert (of_rows[kinds == "q"] == 0).all()
        assert (of_rows[np.isin(kinds, ["k", "v", "gate"])] > 0).all()


def plan_of(architecture, **changes):
    model = build(architecture)
    config = smtune.SMTConfig(**({"block_size": 8, "budget": 12} | changes))
    return model, smtune.make_plan(model, batches(), config)


def counts(plan):
    """Selected blocks by kind."""
    total: dict[str, int] = {}
    for name in plan.modules:
        for kind, (selected, _) in plan.by_kind(name).items():
            total[kind] = total.get(kind, 0) + selected
    return total


@pytest.mark.parametrize("architecture", ["GPT-2", "GPT-NeoX", "Phi-3 and Phi-4", "Llama"])
def test_shares_of_kinds_mean_the_same_fused_or_not(architecture):
    _, plan = plan_of(architecture, policy="shares", shares={"q": 0.25, "k": 0.25, "v": 0.5})
    assert counts(plan) == {"q": 3, "k": 3, "v": 6}
    assert counts(plan.shuffled(3)) == {"q": 3, "k": 3, "v": 6}


@pytest.mark.parametrize("architecture", ["GPT-2", "Falcon", "Llama", "BLOOM"])
def test_the_plans_table_speaks_of_q_k_and_v(architecture):
    _, plan = plan_of(architecture)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(plan_table(plan))
    rows = [line.split("│")[1].strip() for line in console.export_text().splitlines() if line.startswith("│")]
    assert rows == ["q", "k", "v", "all"]


def test_blocks_that_hold_several_heads_are_mixed():
    _, plan = plan_of("GPT-NeoX", block_size=16)
    assert set(counts(plan)) == {"mixed"}
    _, plan = plan_of("Phi-3 and Phi-4", block_size=32, budget=2)  # k and v of 16 rows each share a row of blocks
    assert set(counts(plan)) == {"q", "mixed"}


def test_latent_attention_is_labelled():
    _, plan = plan_of("DeepSeek V3")
    kinds = {name.rpartition(".")[2]: module.kinds for name, module in plan.modules.items()}
    assert kinds == {
        "q_a_proj": ("q", "q"),
        "q_b_proj": ("q",) * 8,
        "kv_a_proj_with_mqa": ("mixed", "mixed", "k"),
        "kv_b_proj": ("k", "v") * 4,
    }


@pytest.mark.parametrize("architecture", ["GPT-2", "GPT-NeoX"])
def test_the_kinds_travel_with_the_adapter(architecture, tmp_path):
    model, plan = plan_of(architecture)
    config = smtune.SMTConfig(block_size=8, budget=12).with_plan(plan)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    assert smtune.SMTConfig.from_pretrained(tmp_path).get_plan() == plan


@pytest.mark.parametrize("architecture", ["GPT-NeoX", "Falcon", "GPT-J", "Cohere", "GPT-2", "DeepSeek V2 Lite"])
def test_plans_for_the_upper_layers_alone_train_right(architecture, tmp_path):
    """Fused, transposed and parallel layers, of which only the upper ones are targeted, or within a backward cost."""
    base, mode = build(architecture, layers=3), "additive" if architecture == "Falcon" else "resident"
    expected = twin(base, batches(), layers_to_transform=[1, 2])
    assert 0 < expected.plan.backward_cost <= 1
    check_training(expected, mode, tmp_path)
    best = {"block_size": 8, "budget": 6, "policy": "global"}
    whole = smtune.make_plan(base, batches(), smtune.SMTConfig(**best))
    limited = smtune.make_plan(base, batches(), smtune.SMTConfig(**best, max_backward_cost=0.7))
    assert limited.backward_cost <= 0.7 < whole.backward_cost == 1

    config = smtune.SMTConfig(**best, mode=mode).with_plan(limited)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    dense = copy.deepcopy(base).requires_grad_(False)
    weights = []
    for name in limited.modules:
        module = dense.get_submodule(name)
        where = view_OI(mask(limited, name), is_transposed(module))
        module.weight.requires_grad_().register_hook(lambda gradient, where=where: gradient * where)
        weights.append(module.weight)
    losses = train(model, [p for p in model.parameters() if p.requires_grad], batches())
    assert losses == pytest.approx(train(dense, weights, batches()), rel=1e-5)
    tuned, expected_logits = (final_logits(each, batches()[0]) for each in (model, dense))
    torch.testing.assert_close(tuned, expected_logits, rtol=1e-4, atol=1e-5)
