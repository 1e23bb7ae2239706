"""SIFT as a rival: single entries of the weights are trained, found by their gradient (Song et al. 2023).

The paper (§2) names it as the sparse method before SMT. Its whole weight gradient is computed by ordinary autograd; a
hook takes the chosen entries out of it and frees it before the next layer's is made; AdamW has state for the entries
alone; a step writes them into the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from smtune.bench.parts import WeightPart


class SparseEntries(WeightPart):
    """The trained entries of one weight.

    Attributes:
        index: (k,) int64, flat places in the weight; `values` are those there.
    """

    def __init__(self, weight: nn.Parameter, index: Tensor) -> None:
        super().__init__(weight, weight.detach().flatten()[index].float(), kept=[index])
        self.index = index

    def gradient_of(self, gradient: Tensor) -> Tensor:
        return gradient.view(-1)[self.index].float()

    @torch.no_grad()
    def write(self) -> None:
        self.weight.data.view(-1)[self.index] = self.values.to(self.weight.dtype)


def sift(weights: Mapping[str, nn.Parameter], share: float, backward: Callable[[], None]) -> list[SparseEntries]:
    """Choose the entries of largest gradient of one batch, the same share of every weight, and train those alone.

    Args:
        weights: by name.
        share: of a weight's entries, rounded to whole entries.
        backward: runs the forward and backward of one batch.
    """
    chosen: dict[str, Tensor] = {}

    def choose(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            count = max(1, round(share * weight.numel()))
            chosen[name] = weight.grad.view(-1).abs().topk(count, sorted=False).indices.sort().values
            weight.grad = None

        return hook

    handles = []
    for name, weight in weights.items():
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(choose(name)))
    backward()
    for handle in handles:
        handle.remove()
    return [SparseEntries(weight, chosen[name]) for name, weight in weights.items()]
