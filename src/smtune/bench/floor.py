"""The floor: a frozen model's forward, and dX from the loss down to given layers; nothing is kept for anything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class _Source(torch.autograd.Function):
    """The identity, at which a gradient arrives and ends. `anchor` requires one, so that the output does.

    An output that is itself made to require a gradient would do too, but autograd keeps it, and its gradient.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def end_backward_at(modules: Iterable[nn.Module]) -> list[RemovableHandle]:
    """Let the backward of a frozen model reach the outputs of these modules, until the handles are removed."""

    anchor = torch.zeros((), requires_grad=True)

    def hook(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        return _Source.apply(y, anchor)

    return [module.register_forward_hook(hook) for module in modules]
