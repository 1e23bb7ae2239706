"""What layers that read one input save of it, once: q, k and v of an attention, gate and up of an MLP.

Each layer's block gradients need some columns of x. Layers of a group keep the union of their columns; the first that
reads an x gathers it, and the others take that tensor for their own backward. The group holds it only until the last
of them has read, or x is gone. A layer that reads another x than its siblings gathers for itself, so the grouping need
only be a good guess. Under a compiler every layer gathers, from one index, and the compiler merges the three.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from smtune.blocks import BlockColumns, BlockIndex
from smtune.linear import used_columns


class Learner(Protocol):
    """A layer of a group."""

    def learning(self) -> BlockIndex | None:
        """The blocks that the layer's next forward takes gradients for; None if there are none."""
        ...


@dataclass
class _Held:
    """Gathered columns, until every layer of `waiting` has read them."""

    source: weakref.ref[Tensor]
    version: int
    columns: BlockColumns
    saved: Tensor
    waiting: set[int]


class SharedInput:
    """Layers that read one input.

    Args:
        layers: in the order of the model.
    """

    def __init__(self, layers: Sequence[Learner]) -> None:
        self.layers = list(layers)
        self._columns: tuple[tuple[BlockIndex | None, ...], BlockColumns] | None = None
        self._held: _Held | None = None

    def columns(self) -> BlockColumns:
        """The union of the columns that the layers' learning blocks read; one object while those stay the same."""
        learning = tuple(layer.learning() for layer in self.layers)
        known = self._columns
        if known is None or any(now is not then for now, then in zip(learning, known[0])):
            known = self._columns = learning, _union([index.columns for index in learning if index is not None])
        return known[1]

    def take(self, layer: Learner, source: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
        """As `used_columns(x, index)`, but gathered once for all layers.

        Args:
            layer: the one that asks.
            source: the layer's input, by which an input is told from another.
            x: the same in the dtype that is to be saved.
            index: the layer's blocks, keeping `columns()`.
        """
        if torch.compiler.is_compiling():
            return used_columns(x, index)
        held = self._held
        if not (
            held is not None
            and id(layer) in held.waiting
            and held.source() is source
            and held.version == source._version
            and held.columns is index.columns
            and held.saved.dtype == x.dtype
        ):
            if held is not None and id(layer) in held.waiting:
                waiting = held.waiting  # the others have read already, another input: cross-attention
            else:
                waiting = {id(other) for other in self.layers if other.learning() is not None}
            held = _Held(
                weakref.ref(source, self._forget), source._version, index.columns, used_columns(x, index), waiting
            )
            self._held = held
        held.waiting.discard(id(layer))
        if not held.waiting:
            self._held = None
        return held.saved

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        if self._held is not None and self._held.source is source:
            self._held = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_held": None}


def _union(columns: Sequence[BlockColumns]) -> BlockColumns:
    first = columns[0]
    cols = tuple(sorted({col for each in columns for col in each.cols}))
    return first if cols == first.cols else BlockColumns(cols, first.n_cols)
