"""The listing of the paper's Appendix A (Code Snippets 6 to 8), in our own writing: an arm for `smtune bench`.

It keeps what the listing does and what it costs. The forward copies every block into W in a Python loop, in
evaluation too. The "partial" activations are slices: views that keep the whole input alive, and they sit on `ctx`,
where neither gradient checkpointing nor saved-tensor hooks see them. The backward makes one batched product for each
block and adds up the samples afterwards. Biases are not supported, and inputs have three dims.

A module for a comparison, not for use: `smtune.SMTConfig` is the method.

Shapes: B samples, T tokens, I in, O out, m blocks of l×l.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import smtune

NAME = "appendix-a"
LABEL = "paper's Appendix A listing"


def build(model: nn.Module, plan: smtune.Plan) -> list[nn.Parameter]:
    """Freeze the model and put the listing's layer in the place of every linear in which the plan has blocks.

    Args:
        model: patched in place.
        plan: of this model.
    Returns:
        The trained parameters, in the plan's order: (m·l, l) fp32 each, the blocks below one another.
    Raises:
        InputError: a planned module that is not a linear layer without bias.
    """
    model.requires_grad_(False)
    trained = []
    for name, module in plan.modules.items():
        if not module.rows:
            continue
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear) or linear.bias is not None:
            raise smtune.InputError(
                f"Expected linear layers without bias, all that the listing supports. Got {name}: {linear}. "
                "Choose another model for this arm."
            )
        layer = SparseLinear(linear.weight, list(zip(module.rows, module.cols)), plan.block_size)
        model.set_submodule(name, layer)
        trained.append(layer.selected_weight)
    return trained


def kept_slices(output: Tensor) -> list[Tensor]:
    """The slices of inputs that the backward of `output` will read: saved-tensor hooks cannot see these."""
    slices, seen, nodes = [], set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        slices += getattr(node, "x_slices", [])
        nodes += [following for following, _ in node.next_functions]
    return slices


class SparseLinear(nn.Module):
    """`x Wᵀ` that trains the blocks in `selected_weight` (Code Snippet 6)."""

    def __init__(self, weight: nn.Parameter, index: list[tuple[int, int]], block_size: int) -> None:
        super().__init__()
        self.weight = weight
        self.index = index
        self.block_size = block_size
        blocks = torch.empty(len(index) * block_size, block_size, device=weight.device)
        for k, (row, col) in enumerate(index):
            blocks[_span(k, block_size)] = weight.data[_span(row, block_size), _span(col, block_size)]
        self.selected_weight = nn.Parameter(blocks)

    def forward(self, x_BTI: Tensor) -> Tensor:
        size = self.block_size
        for k, (row, col) in enumerate(self.index):
            self.weight.data[_span(row, size), _span(col, size)] = self.selected_weight.data[_span(k, size)]
        return _SparseProduct.apply(x_BTI, self.selected_weight, self.weight, self.index, size)


class _SparseProduct(torch.autograd.Function):
    """The dense product, and a backward that loops over the blocks (Code Snippets 7 and 8)."""

    @staticmethod
    def forward(ctx, x_BTI, selected_weight, weight, index, size):
        ctx.save_for_backward(weight)
        ctx.x_slices = [x_BTI[:, :, _span(col, size)] for _, col in index]
        ctx.index, ctx.size = index, size
        return F.linear(x_BTI, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (grad_y_BTO,) = grads
        (weight,) = ctx.saved_tensors
        size = ctx.size
        grad_blocks = torch.empty(len(ctx.index) * size, size, device=weight.device)
        for k, (row, _) in enumerate(ctx.index):
            rows_BlT = grad_y_BTO.permute(0, 2, 1)[:, _span(row, size), :]
            grad_blocks[_span(k, size)] = torch.sum(torch.matmul(rows_BlT, ctx.x_slices[k]), dim=0)
        grad_x = torch.matmul(grad_y_BTO, weight) if ctx.needs_input_grad[0] else None
        return grad_x, grad_blocks, None, None, None


def _span(position: int, size: int) -> slice:
    return slice(position * size, (position + 1) * size)
