"""What the study asks of SMT beyond the library: other criteria, a dense warm-up, blocks chosen anew during training.

Written to be seen through, not fast: gradients of whole matrices by plain autograd. What wins here moves into the
library; what does not stays as evidence.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import smtune
from smtune import training
from smtune.bench.parts import WeightPart
from smtune.bench.sift import SparseEntries
from smtune.blocks import tile
from smtune.scoring import Scores, modes_and_flags_kept
from smtune.selection import Plan
from smtune.tuner.targets import count_parameters

Batch = dict[str, Tensor]


CRITERIA: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    # of a matrix cut into (R, C, l, l): its values w, the sum of its gradients g, the sum of their squares
    "square_of_sum": lambda w, g, squares: g.square().mean((-1, -2)),
    "over_scale": lambda w, g, squares: g.abs().mean((-1, -2)) / w.square().mean().sqrt(),
    "times_scale": lambda w, g, squares: g.abs().mean((-1, -2)) * w.square().mean().sqrt(),
    "over_mean": lambda w, g, squares: g.abs().mean((-1, -2)) / g.abs().mean(),
    "signal": lambda w, g, squares: (g.square() / squares.clamp_min(1e-30)).mean((-1, -2)),
    "nuclear": lambda w, g, squares: torch.linalg.svdvals(g).sum(-1),
}
"""Scores of blocks that the library has not, for "a better SMT".

- `square_of_sum`: what a step of gradient descent takes off the loss, as `abs_of_sum` is for a step of its sign.
- `over_scale`, `times_scale`: gradient over, or times, the root mean square of the matrix's weights.
- `over_mean`: gradient over the mean of its matrix.
- `signal`: the squared sum over the sum of squares; what a step scaled by the diagonal Fisher takes off the loss.
- `nuclear`: what an orthogonalised step (Muon's) takes off the loss.
"""


def gradient_sums(
    model: Any, weights: Mapping[str, nn.Parameter], batches: Iterable[Batch]
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """By weight, the sum of its gradients and of their squares, and the number of batches."""
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    seen = 0
    with modes_and_flags_kept(model):
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            seen += 1
            model(**batch).loss.backward()
            for name, weight in weights.items():
                assert weight.grad is not None
                sums[name] += weight.grad
                squares[name] += weight.grad.square()
                weight.grad = None
    return sums, squares, seen


def weights_of(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """The weights of layers by the layers' names."""
    return {name: model.get_submodule(name).weight for name in names}


def make_plan(model: nn.Module, config: smtune.SMTConfig, criterion: str, batches: Iterable[Batch]) -> Plan:
    """A plan by one of `CRITERIA`.

    Args:
        config: everything but the criterion.
    """
    names = list(smtune.score_blocks(model, None, config))  # its criterion is "random": it only finds the layers
    weights = weights_of(model, names)
    sums, squares, seen = gradient_sums(model, weights, itertools.islice(batches, config.warmup_steps))
    size = int(config.block_size)
    with torch.no_grad():
        scores = {
            name: CRITERIA[criterion](*(tile(value, size) for value in (weight, sums[name], squares[name]))).float()
            for name, weight in weights.items()
        }
    found = Scores(scores, block_size=size, criterion=criterion, batches_seen=seen)
    return smtune.select_blocks(found, config, count_parameters(model))


def spread_plan(model: nn.Module, config: smtune.SMTConfig, batches: Iterable[Batch]) -> Plan:
    """A plan by scores that are `spread`."""
    scores = smtune.score_blocks(model, batches, config, progress=False)
    for name, score in scores.items():
        scores[name] = spread(score)
    return smtune.select_blocks(scores, config, count_parameters(model))


def spread(score: Tensor) -> Tensor:
    """Scores, (R, C), each over its rank in its row of blocks and over that in its column: blocks of one row or column
    add little rank to an update. Of equal ones the earlier ranks before."""
    orders = [score.argsort(dim=dim, descending=True, stable=True) for dim in (0, 1)]
    in_column, in_row = (1 + order.argsort(dim) for dim, order in enumerate(orders))
    return score / (in_column * in_row)


def dense_warmup(
    model: nn.Module, config: smtune.SMTConfig, batches: Iterable[Batch], learning_rate: float, keep: bool
) -> Plan:
    """The authors' warm-up, `smtune.training.dense_warmup`.

    Args:
        batches: one for each step; `config.warmup_steps` of them are drawn.
        keep: leave the model as it is then, as the released code does; else put it back.
    """
    before = None if keep else {name: value.clone() for name, value in model.state_dict().items()}
    plan, _ = training.dense_warmup(model, batches, config, steps=config.warmup_steps, learning_rate=learning_rate)
    if before is not None:
        model.load_state_dict(before)
    return plan


class BasisBlock(WeightPart):
    """The leading r × r block of Uᵀ W V, U and V some of the singular vectors of W's gradient: it alone is trained.

    Its values, (r, r), are its distance from the base; kept are U, (O, r), V, (I, r), and the weight's original.
    """

    def __init__(self, weight: nn.Parameter, left: Tensor, right: Tensor) -> None:
        values = torch.zeros(left.shape[1], right.shape[1], device=weight.device)
        super().__init__(weight, values, kept=[left, right, weight.detach().clone()])

    def gradient_of(self, gradient: Tensor) -> Tensor:
        left, right, _ = self.kept
        return left.T @ gradient.float() @ right

    @torch.no_grad()
    def write(self) -> None:
        left, right, original = self.kept
        self.weight.copy_(original.float() + left @ self.values @ right.T)


def in_gradient_basis(
    model: nn.Module, config: smtune.SMTConfig, batches: Iterable[Batch], count: int
) -> list[BasisBlock]:
    """Train a block of every weight in the basis of its gradient's singular vectors, where the gradient is diagonal.

    A block of r² parameters holds the r largest singular values. The sizes are chosen greedily over all weights: next
    grows the block whose singular value is largest for the 2r + 1 parameters that it costs.

    Args:
        config: for the layers and the number of batches.
        count: parameters to train, at most.
    """
    weights = weights_of(model, smtune.score_blocks(model, None, config))
    sums, _, _ = gradient_sums(model, weights, itertools.islice(batches, config.warmup_steps))
    bases = {name: torch.linalg.svd(total.float(), full_matrices=False) for name, total in sums.items()}
    gains = [
        (-value / (2 * r + 1), order, name)
        for order, (name, (_, singular, _)) in enumerate(bases.items())
        for r, value in enumerate(singular.tolist())
    ]
    sizes = dict.fromkeys(bases, 0)
    for _, _, name in sorted(gains):
        if 2 * sizes[name] + 1 <= count:
            count -= 2 * sizes[name] + 1
            sizes[name] += 1
    return [
        BasisBlock(weights[name], left[:, :r].clone(), right[:r].T.clone())
        for name, (left, _, right) in bases.items()
        if (r := sizes[name])
    ]


def whole_rows(model: nn.Module, config: smtune.SMTConfig, batches: Iterable[Batch], count: int) -> list[SparseEntries]:
    """Train single rows of the weights, those of largest mean |Σ gradient|: blocks of one row, so to say.

    Args:
        config: for the layers and the number of batches.
        count: parameters to train, at most.
    """
    names = list(smtune.score_blocks(model, None, config))
    weights = weights_of(model, names)
    sums, _, _ = gradient_sums(model, weights, itertools.islice(batches, config.warmup_steps))
    rows = [
        (-score, order, row)
        for order, name in enumerate(names)
        for row, score in enumerate(sums[name].abs().mean(1).tolist())
    ]
    chosen: dict[int, list[int]] = {}
    for _, order, row in sorted(rows):
        width = weights[names[order]].shape[1]
        if count < width:
            break
        count -= width
        chosen.setdefault(order, []).append(row)
    entries = []
    for order, picked in sorted(chosen.items()):
        weight = weights[names[order]]
        starts = torch.tensor(sorted(picked))[:, None] * weight.shape[1]
        entries.append(SparseEntries(weight, (starts + torch.arange(weight.shape[1])).flatten()))
    return entries
