"""What SMT must hold on any architecture, against a twin that trains whole weights with masked gradients.

The twin is plain autograd: the planned weights require a gradient, a hook zeroes it outside the planned blocks, and the
same optimizer takes the same steps. An entry without gradient does not move under AdamW without weight decay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

import smtune
from smtune.tuner.targets import ATTENTION, find_targets
from smtune.weights import is_transposed, view_OI

STEPS = 3
BLOCKS_EACH = 3
BLOCK_SIZE = 8

Batch = Mapping[str, Tensor]


@dataclass
class Twin:
    """A base model, a plan for its default targets, and what dense training with masked gradients made of it."""

    base: nn.Module
    config: smtune.SMTConfig
    plan: smtune.Plan
    batches: Sequence[Batch]
    losses: list[float]
    weights: dict[str, Tensor]


def optimizer(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    # With a large epsilon an update is smooth in the gradient, also where that is rounding noise about zero.
    return torch.optim.AdamW(parameters, lr=0.02, eps=1e-3, weight_decay=0)


def train(model: nn.Module, parameters: Sequence[Tensor], batches: Sequence[Batch]) -> list[float]:
    """The losses of `STEPS` steps in train mode; dropout and router noise by the number of the step."""
    steps = optimizer(parameters)
    model.train()
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def mask(plan: smtune.Plan, name: str) -> Tensor:
    """Where the plan trains, (O, I) bool."""
    whole = torch.zeros(plan.modules[name].shape, dtype=torch.bool)
    size = plan.block_size
    for row, col in plan.index(name).pairs:
        whole[row * size : (row + 1) * size, col * size : (col + 1) * size] = True
    return whole


def twin(
    base: nn.Module,
    batches: Sequence[Batch],
    block_size: int = BLOCK_SIZE,
    before_training: Callable | None = None,
    **changes: Any,
) -> Twin:
    """Plan and train densely. `base` is left as it was.

    Args:
        base: any model with an entry in `ATTENTION`.
        batches: two or more.
        block_size: l.
        before_training: called with each model before it is trained, to turn checkpointing on, for example.
        changes: further settings of the plan.
    """
    config = smtune.SMTConfig(block_size=block_size, policy="per_module", **changes)
    config.budget = BLOCKS_EACH * len(find_targets(base, config))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    torch.manual_seed(0)
    plan = smtune.make_plan(base, batches[:2], config)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())

    model = copy.deepcopy(base).requires_grad_(False)
    modules = dict(model.named_modules())
    weights, masked = {}, []
    for name, planned in plan.modules.items():
        assert len(planned.rows) == BLOCKS_EACH
        weight = weights[name] = modules[name].weight.requires_grad_()
        where = view_OI(mask(plan, name), is_transposed(modules[name]))
        masked.append((weight, where))
    check_plan(plan, dense_scores(model, weights, batches[:2], block_size))
    for weight, where in masked:
        weight.register_hook(lambda gradient, where=where: gradient * where)
    if before_training:
        before_training(model)
    losses = train(model, list(weights.values()), batches)
    final = {name: view_OI(weight.detach(), is_transposed(modules[name])) for name, weight in weights.items()}
    return Twin(base, config, plan, batches, losses, final)


def dense_scores(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Sequence[Batch], block_size: int
) -> dict[str, Tensor]:
    """(R, C) means over the blocks of |Σ gradient|, by plain autograd in train mode."""
    torch.manual_seed(0)
    model.train()
    modules = dict(model.named_modules())
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in batches:
        gradients = torch.autograd.grad(model(**batch).loss, list(weights.values()))
        for name, gradient in zip(weights, gradients):
            sums[name] += gradient
    return {
        name: smtune.blocks.tile(view_OI(total.abs(), is_transposed(modules[name])), block_size).mean((-1, -2))
        for name, total in sums.items()
    }


def check_plan(plan: smtune.Plan, scores: Mapping[str, Tensor]) -> None:
    """The plan's scores are the dense gradients', and its blocks are the best of each matrix."""
    for name, score in scores.items():
        module = plan.modules[name]
        expected = [score.mean().item(), score.max().item()]
        torch.testing.assert_close([module.score_mean, module.score_max], expected, rtol=1e-4, atol=1e-9)
        chosen = score[list(module.rows), list(module.cols)].sum()
        torch.testing.assert_close(chosen, score.flatten().topk(len(module.rows)).values.sum(), rtol=1e-4, atol=1e-9)


def check_targets(base: nn.Module, plan: smtune.Plan) -> None:
    """Every layer with a default target's name is in the plan, and its rows are told apart as q, k and v."""
    names = ATTENTION[base.config.model_type]
    expected = [name for name, _ in base.named_modules() if name.rpartition(".")[2] in names]
    assert expected == [*plan.modules]
    kinds = {kind for name in plan.modules for kind in plan.by_kind(name)}
    assert kinds >= {"q", "k", "v"} or kinds == {"mixed"}


def check_training(twin: Twin, mode: str, tmp_path, before_training: Callable | None = None) -> None:
    """SMT trains as the twin does and moves what is planned; the adapter survives saving, loading and merging."""
    logits = final_logits(twin.base, twin.batches[0])
    config = twin.config.with_plan(twin.plan)
    config.mode = mode
    model = peft.get_peft_model(copy.deepcopy(twin.base), config)
    layers = [module for module in model.modules() if isinstance(module, smtune.tuner.SMTLinear)]
    assert [layer.resident for layer in layers] == [mode == "resident"] * len(twin.plan.modules)
    if before_training:
        before_training(model)
    losses = train(model, [p for p in model.parameters() if p.requires_grad], twin.batches)
    torch.testing.assert_close(losses, twin.losses, rtol=1e-5, atol=0)

    tuned = final_logits(model, twin.batches[0])
    assert (tuned - logits).abs().max() > 1e-3 * logits.abs().max()  # training has done something

    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(twin.base), tmp_path)
    assert torch.equal(final_logits(loaded, twin.batches[0]), tuned)

    merged = model.merge_and_unload()
    if mode == "resident":
        assert torch.equal(final_logits(merged, twin.batches[0]), tuned)
    else:
        torch.testing.assert_close(final_logits(merged, twin.batches[0]), tuned, rtol=1e-4, atol=1e-5)
    check_weights(merged, twin)


def check_weights(merged: nn.Module, twin: Twin) -> None:
    """Planned blocks are the twin's and every one has moved; everything else is the base's to the last bit."""
    before, after = twin.base.state_dict(), merged.state_dict()
    assert before.keys() == after.keys()
    modules = dict(merged.named_modules())
    for key, value in before.items():
        name = key.removesuffix(".weight")
        if key == name or name not in twin.plan.modules:
            assert torch.equal(after[key], value), key
            continue
        transposed = is_transposed(modules[name])
        base_OI, tuned_OI = view_OI(value, transposed), view_OI(after[key], transposed)
        where = mask(twin.plan, name)
        assert torch.equal(tuned_OI[~where], base_OI[~where]), key
        index = twin.plan.index(name)
        moved = (smtune.blocks.gather(tuned_OI, index) != smtune.blocks.gather(base_OI, index)).flatten(1)
        assert moved.any(1).all(), key
        torch.testing.assert_close(tuned_OI, twin.weights[name], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def final_logits(model: nn.Module, batch: Batch) -> Tensor:
    model.eval()
    output = model(**batch)
    return output.logits
