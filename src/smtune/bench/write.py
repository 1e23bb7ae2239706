"""When resident blocks are written into the weight: at each use, as the tuner does it, or after each optimizer step.

The two are built here from the core alone and differ in nothing else, so that what is measured is the write.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smtune.blocks import BlockIndex, gather, scatter_
from smtune.linear import block_linear
from smtune.selection import Plan


class WrittenLinear(nn.Module):
    """A linear layer of which blocks are trained.

    Attributes:
        delta: (m, l, l) fp32, what the optimizer trains.
        originals: (m, l, l), the base's blocks.
    """

    originals: Tensor

    def __init__(self, layer: nn.Linear, index: BlockIndex, at_use: bool) -> None:
        super().__init__()
        self.base_layer = layer
        self.index = index
        self.at_use = at_use
        self.register_buffer("originals", gather(layer.weight.data, index))
        self.delta = nn.Parameter(torch.zeros_like(self.originals, dtype=torch.float32))

    @torch.no_grad()
    def write(self) -> None:
        weight = self.base_layer.weight
        scatter_(weight.data, self.index, (self.originals.float() + self.delta).to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.at_use:
            self.write()
        y = block_linear(x, self.base_layer.weight, self.base_layer.bias, self.delta, self.index)
        if self.at_use and y.requires_grad:
            y.register_hook(lambda grad_y: self.write())
        return y


def train_blocks(model: nn.Module, plan: Plan, at_use: bool) -> list[WrittenLinear]:
    """Put a `WrittenLinear` in place of every layer of the plan that has blocks."""
    written = []
    for name, module in plan.modules.items():
        if module.rows:
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            written.append(WrittenLinear(layer, plan.index(name), at_use))
            model.set_submodule(name, written[-1])
    return written
