"""Linear layers that train only blocks of their weight: two autograd operators.

`block_linear` (resident): the blocks stand in W, the forward is the plain dense product, and the backward computes
`dX = dY W` as always but the weight gradient only at the blocks (paper §3.1 equation 2, §3.2). What it keeps for that
is one contiguous copy of the columns of x that some block reads, and a reference to W.

`additive_block_linear` (additive): blocks act beside an untouched weight, `y += x Dᵀ`, for bases whose weight cannot
be written, such as quantised ones.

Both take any leading dims and run under autocast.
Shapes: N tokens (all leading dims), I in, O out, m blocks, l block size, U·l used columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from smtune.blocks import BlockIndex, tile
from smtune.errors import InputError
from smtune.kernels import block_grad_compact, block_product_, flatten
from smtune.weights import view_OI

TakeColumns = Callable[[Tensor, BlockIndex], Tensor]
"""As `used_columns`."""


def block_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: Tensor,
    index: BlockIndex,
    take: TakeColumns | None = None,
    transposed: bool = False,
) -> Tensor:
    """`x Wᵀ + b`, differentiable in x, b and the selected blocks of W only.

    Args:
        x: (..., I).
        weight: (O, I), frozen; its values at the index are those the blocks stand for. Receives no gradient.
        bias: (O,) or None.
        blocks: (m, l, l), any float dtype: receives the gradient of W at the index. Its values are not read, so it
            may hold the blocks themselves or, as the tuner does, their distance from the base.
        index: the places of the blocks in W.
        take: gives the kept columns of x where several layers share them. Default: `used_columns`.
        transposed: the weight is stored as (I, O), as in GPT-2's `Conv1D`; `index` is that of (O, I) all the same.
    Returns:
        (..., O) in x's dtype (autocast's under autocast).
    Cost: 2·N·O·I FLOP forward; the same for dX, plus 2·N·m·l², backward.
    Saves: W by reference and N·U·l values of x, U the number of kept block columns. Under autocast W is cast
        again in the backward, some columns at a time, rather than kept as a second copy.
    """
    x = _autocast(x)
    if not (torch.is_grad_enabled() and blocks.requires_grad):
        if weight.requires_grad:
            weight = weight.detach()  # of such a leaf autocast keeps its cast, and would not see what is written later
        return F.linear(x, view_OI(weight, transposed), bias)
    return _BlockLinear.apply(x, weight, bias, blocks, (take or used_columns)(x, index), index, transposed)


def used_columns(x: Tensor, index: BlockIndex) -> Tensor:
    """The columns of x kept for the index's blocks, (..., U·l) contiguous; x itself where every column is."""
    if index.columns.is_all:
        return x.detach()
    blocked = x.detach().unflatten(-1, (-1, index.grid.block_size))
    return blocked.index_select(-2, index.columns.on(x.device)).flatten(-2)


class _BlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, blocks, x_used, index, transposed):
        # The parameter itself, not a view of it: what shards it (ZeRO-3) finds it and may free it until the backward.
        ctx.save_for_backward(weight, x_used)
        ctx.index = index
        ctx.transposed = transposed
        ctx.blocks_dtype = blocks.dtype
        y = F.linear(x, view_OI(weight, transposed), bias)
        # With a bias it may be a view, which autograd lets nobody change in place once a custom function returns it.
        return y if bias is None else torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (grad_y,) = grads
        weight, x_used = ctx.saved_tensors
        grad_x = grad_bias = grad_blocks = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_grad(grad_y, view_OI(weight, ctx.transposed))
        if ctx.needs_input_grad[2]:
            grad_bias = flatten(grad_y).sum(0)
        if ctx.needs_input_grad[3]:
            grad_blocks = block_grad_compact(grad_y, x_used, ctx.index).to(ctx.blocks_dtype)
        return grad_x, None, grad_bias, grad_blocks, None, None, None


CAST_COLUMNS = 1024
"""Of W, cast at a time in the backward of autocast, or half of them: enough for a product at full speed."""


def _input_grad(grad_y: Tensor, weight_OI: Tensor) -> Tensor:
    """dX = dY W in dY's dtype. Where W has another, no (O, I) tensor of it is made, unless a compiler makes one."""
    if weight_OI.dtype == grad_y.dtype or torch.compiler.is_compiling():
        return grad_y @ weight_OI.to(grad_y.dtype)
    in_features = weight_OI.shape[1]
    step = min(CAST_COLUMNS, (in_features + 1) // 2)
    grad_x = grad_y.new_empty(*grad_y.shape[:-1], in_features)
    parts = grad_x.view(grad_y.shape[:-1].numel(), in_features).split(step, dim=1)
    grad_y = flatten(grad_y)
    for part, columns in zip(parts, weight_OI.split(step, dim=1)):
        torch.mm(grad_y, columns.to(grad_y.dtype), out=part)
    return grad_x


def additive_block_linear(
    y: Tensor, x: Tensor, blocks: Tensor, index: BlockIndex, take: TakeColumns | None = None
) -> Tensor:
    """`y + x Dᵀ`, D the (O, I) matrix that is `blocks` at the index and zero elsewhere; D is never formed.

    Args:
        y: (..., O), the base layer's output.
        x: (..., I), the base layer's input.
        blocks: (m, l, l), differentiable, cast to y's dtype for the product.
        index: the places of the blocks.
        take: as for `block_linear`.
    Returns:
        (..., O), a new tensor in y's dtype.
    Raises:
        InputError: x and y are not as wide as the weight that the index is of.
    Cost: 2·N·m·l² FLOP forward, twice that backward.
    Saves: the blocks by reference and N·U·l values of x.
    """
    grid = index.grid
    if (y.shape[-1], x.shape[-1]) != (grid.out_features, grid.in_features):
        raise InputError(
            f"Expected x (..., {grid.in_features}) and y (..., {grid.out_features}), as wide as the weight. Got "
            f"{tuple(x.shape)} and {tuple(y.shape)}. Is the layer split by tensor parallelism? Blocks cannot be."
        )
    x = x.to(y.dtype)
    learns = torch.is_grad_enabled() and blocks.requires_grad
    return _AdditiveBlockLinear.apply(y, x, blocks, (take or used_columns)(x, index) if learns else None, index)


class _AdditiveBlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, blocks, x_used, index):
        ctx.save_for_backward(blocks, x_used)
        ctx.index = index
        out = y.clone(memory_format=torch.contiguous_format)
        return block_product_(out, x, blocks, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (grad_y,) = grads
        blocks, x_used = ctx.saved_tensors
        index = ctx.index
        grad_x = grad_blocks = None
        if ctx.needs_input_grad[1]:
            grad_x = grad_y.new_zeros(*grad_y.shape[:-1], index.grid.in_features)
            block_product_(grad_x, grad_y, blocks, index, transpose=True)
        if ctx.needs_input_grad[2]:
            grad_blocks = block_grad_compact(grad_y, x_used, index).to(blocks.dtype)
        return grad_y, grad_x, grad_blocks, None, None


def block_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor, index: BlockIndex) -> Tensor:
    """The slow, obvious twin of `block_linear`: ordinary autograd through a dense W that holds the blocks' values.

    Here `blocks` are values: the weight used is `weight` with the indexed blocks replaced by them.
    """
    rows, cols = index.on(weight.device)
    tiles = tile(weight, index.grid.block_size).index_put((rows, cols), blocks.to(weight.dtype))
    return F.linear(x, tiles.permute(0, 2, 1, 3).reshape(weight.shape), bias)


def _autocast(x: Tensor) -> Tensor:
    """x as autocast would hand it to a linear layer, so that what is saved is what the product has seen."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):  # tensors without values, on the meta device
        return x
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


__all__ = ["additive_block_linear", "block_linear", "block_linear_reference", "used_columns"]
