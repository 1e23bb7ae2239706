"""Optimizers of the study for tensors of blocks, (m, l, l): AdamW with a count of steps for each block, and Muon.

All their state has m in front, so that a plan that changes during training can carry it over block by block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration of Jordan et al. 2024 (Muon); five steps bring singular values near one."""


class BlockAdamW(torch.optim.Optimizer):
    """AdamW without weight decay, each block with its own count of steps.

    A block that joins late is corrected for its own youth; with all blocks of one age it is torch's AdamW.

    Args:
        params: tensors of shape (m, …); block k of one is its k-th slice.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, self.state[p], group)

    @staticmethod
    def _step(p: Tensor, grad: Tensor, state: dict[str, Tensor], group: Mapping[str, Any]) -> None:
        if not state:
            state["steps"] = p.new_zeros(len(p), *[1] * (p.dim() - 1))
            state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
        (beta1, beta2), steps = group["betas"], state["steps"].add_(1)
        mean = state["mean"].lerp_(grad, 1 - beta1)
        square = state["square"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = (square / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        p.addcdiv_(mean / (1 - beta1**steps), scale, value=-group["lr"])


class ColumnAdamW(BlockAdamW):
    """Shorter steps where inputs are large.

    The gradient of a linear layer's weight is the larger the larger the input of its column, and so is the curvature,
    squared; Adam's step is as long in every column. Here it is times 2m / (c + m), c the root mean square of the
    gradients of a block's column and m the mean of c over the tensor.
    """

    @staticmethod
    def _step(p: Tensor, grad: Tensor, state: dict[str, Tensor], group: Mapping[str, Any]) -> None:
        before = p.clone()
        BlockAdamW._step(p, grad, state, group)
        column = state["square"].mean(-2, keepdim=True).sqrt_()
        mean = column.mean()
        p.copy_(before.lerp_(p, 2 * mean / (column + mean).clamp_min(1e-30)))


class BlockMuon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on a batch of square blocks: the momentum, orthogonalised, is the step.

    One moment is kept, where Adam keeps two. Steps are scaled by 0.2·√l, so that an entry moves about as far as by
    AdamW of the same learning rate (Liu et al. 2025, *Muon is scalable for LLM training*).

    Args:
        params: tensors of shape (m, l, l).
    """

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.95, steps: int = 5) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "steps": steps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                mean = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                nesterov = p.grad.lerp(mean, group["momentum"])
                p.add_(orthogonalised(nesterov, group["steps"]), alpha=-group["lr"] * 0.2 * p.shape[-1] ** 0.5)


def orthogonalised(blocks: Tensor, steps: int = 5) -> Tensor:
    """Each (l, l) of (m, l, l) with its singular values brought near one, by a Newton–Schulz iteration."""
    a, b, c = NEWTON_SCHULZ
    x = blocks / blocks.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x


def carry(
    old: torch.optim.Optimizer,
    new: torch.optim.Optimizer,
    kept: Mapping[nn.Parameter, tuple[nn.Parameter, Tensor, Tensor]],
) -> None:
    """Give blocks that stay the state they had; all others start anew.

    Args:
        kept: by the new tensor of blocks, the old one, and which of its slices become which of the new ones.
    """
    for after, (before, places, new_places) in kept.items():
        for name, values in old.state[before].items():
            moved = values.new_zeros(len(after), *values.shape[1:])
            moved[new_places] = values[places]
            new.state[after][name] = moved
