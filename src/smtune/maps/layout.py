"""A plan seen as the paper's Figure 4 sees it: a grid of layers and projections, and its sums by projection.

A projection is a kind (q, k, v; see `smtune.selection`), so that a fused matrix is drawn as the projections it holds.
Where kinds are not known it is the last component of a module's path.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from smtune.selection import Plan

NO_LAYER = "–"
"""The layer of a matrix outside the stack of layers, such as `lm_head`."""


@dataclass(frozen=True)
class Cell:
    """The matrices of one projection in one layer, or its part of a fused one; nearly always a single one.

    Attributes:
        trained: blocks selected.
        blocks: blocks in all.
    """

    trained: int = 0
    blocks: int = 0


@dataclass(frozen=True)
class Projection:
    """Sums over all matrices of one projection.

    Attributes:
        trained, frozen: matrices, or parts of fused ones, with and without a selected block.
        blocks: blocks selected.
        params: parameters trained.
        share: `params` over all parameters trained; 0 where nothing is.
    """

    name: str
    trained: int
    frozen: int
    blocks: int
    params: int
    share: float


def cells(plan: Plan) -> dict[tuple[str, str], Cell]:
    """Cells by (projection, layer), in model order.

    The layer is the first number of a module's path, or `NO_LAYER`.
    Matrices that agree in both, such as self- and cross-attention of a decoder layer, add up.
    """
    found: dict[tuple[str, str], Cell] = {}
    for path in plan.modules:
        layer = next((part for part in path.split(".") if part.isdecimal()), NO_LAYER)
        for projection, (selected, n_blocks) in plan.by_kind(path).items():
            before = found.get((projection, layer), Cell())
            found[projection, layer] = Cell(before.trained + selected, before.blocks + n_blocks)
    return found


def layers(cells: Iterable[tuple[str, str]]) -> list[str]:
    """All layers up to the last targeted one, those between that are not targeted included; `NO_LAYER` if it occurs."""
    found = {layer for _, layer in cells}
    last = max((int(layer) for layer in found if layer != NO_LAYER), default=-1)
    return [*map(str, range(last + 1)), *([NO_LAYER] if NO_LAYER in found else [])]


def projections(plan: Plan) -> list[Projection]:
    """Every `Projection`, in model order."""
    counts: dict[str, list[int]] = {}
    for path in plan.modules:
        for projection, (selected, _) in plan.by_kind(path).items():
            counts.setdefault(projection, []).append(selected)
    return [
        Projection(
            name=name,
            trained=sum(map(bool, blocks)),
            frozen=blocks.count(0),
            blocks=sum(blocks),
            params=sum(blocks) * plan.block_size**2,
            share=sum(blocks) / (plan.n_blocks or 1),
        )
        for name, blocks in counts.items()
    ]


def in_short(number: int) -> str:
    """About three digits and a unit: 950, 56.6 k, 134 M, 6.74 B."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            value = number / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return str(number)
