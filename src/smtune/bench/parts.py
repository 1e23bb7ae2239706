"""A part of a weight, trained apart from it: the weight's whole gradient is made, and only the part's is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class WeightPart(ABC):
    """What the optimizer trains of a weight, written into it after every step.

    A hook takes the part's gradient out of the weight's, and frees that before the next layer's is made.

    Attributes:
        weight: (O, I), any float dtype; requires a gradient from now on, and never holds one.
        values: fp32, what the optimizer trains.
        kept: what is held beside them.
    """

    def __init__(self, weight: nn.Parameter, values: Tensor, kept: list[Tensor]) -> None:
        self.weight = weight
        self.values = nn.Parameter(values)
        self.kept = kept
        weight.requires_grad_(True)
        weight.register_post_accumulate_grad_hook(self._take_gradient)

    def _take_gradient(self, weight: Tensor) -> None:
        assert weight.grad is not None
        gradient = self.gradient_of(weight.grad)
        weight.grad = None
        self.values.grad = gradient if self.values.grad is None else self.values.grad.add_(gradient)

    @abstractmethod
    def gradient_of(self, gradient: Tensor) -> Tensor:
        """The values' gradient, fp32, by the weight's, (O, I)."""

    @abstractmethod
    def write(self) -> None:
        """Put the trained values into the weight."""
