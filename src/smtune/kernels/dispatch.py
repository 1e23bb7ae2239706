"""The kernels as called from above: checked, shaped, and registered so that compilers and FLOP counters see them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from smtune.blocks import BlockIndex
from smtune.errors import InputError
from smtune.kernels.loop import block_grad_loop, block_product_loop_
from smtune.kernels.reference import accumulation_dtype


def block_grad(grad_y_NO: Tensor, x_NI: Tensor, index: BlockIndex) -> Tensor:
    """Gradient of the loss with respect to the selected blocks only.

    Args:
        grad_y_NO: dL/dy, (N tokens, O out) or any leading dims, any float dtype.
        x_NI: the layer's input, (N, I in) with the same leading dims and dtype.
        index: m distinct blocks of an (O, I) weight.
    Returns:
        (m, l, l) in index order, accumulated in fp32 (fp64 for fp64 operands) and returned in that dtype.
    Raises:
        InputError: the operands do not fit the index or each other.
    Cost: 2·N·m·l² FLOP, no copy of grad_y.
    Source: paper §3.1, equation 2.
    """
    grid = index.grid
    if grad_y_NO.shape[-1] != grid.out_features or x_NI.shape[-1] != grid.in_features:
        raise InputError(
            f"Expected grad_y (..., {grid.out_features}) and x (..., {grid.in_features}) for blocks of a "
            f"({grid.out_features}, {grid.in_features}) weight. Got {tuple(grad_y_NO.shape)} and {tuple(x_NI.shape)}."
        )
    if grad_y_NO.shape[:-1] != x_NI.shape[:-1] or grad_y_NO.dtype != x_NI.dtype:
        raise InputError(
            f"Expected grad_y and x with the same leading dims and dtype. Got {tuple(grad_y_NO.shape)} "
            f"{grad_y_NO.dtype} and {tuple(x_NI.shape)} {x_NI.dtype}."
        )
    return _block_grad(grad_y_NO, x_NI, index.pairs, grid.block_size)


def block_grad_compact(grad_y_NO: Tensor, x_used: Tensor, index: BlockIndex) -> Tensor:
    """As `block_grad`, from `x_used`: only the kept columns of x, (..., U·l), in the order of `index.columns`."""
    return _block_grad(grad_y_NO, x_used, index.compact_pairs, index.grid.block_size)


def _block_grad(grad_y: Tensor, x: Tensor, pairs: Sequence[tuple[int, int]], block_size: int) -> Tensor:
    rows, cols = [row for row, _ in pairs], [col for _, col in pairs]
    return _block_grad_op(flatten(grad_y), flatten(x), rows, cols, block_size)


def flatten(x: Tensor) -> Tensor:
    """(..., F) as (N, F): any leading dims, none included, and any of them empty."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


@torch.library.custom_op("smtune::block_grad", mutates_args=())
def _block_grad_op(grad_y: Tensor, x: Tensor, rows: Sequence[int], cols: Sequence[int], block_size: int) -> Tensor:
    return block_grad_loop(grad_y, x, list(zip(rows, cols)), block_size)


@_block_grad_op.register_fake
def _(grad_y: Tensor, x: Tensor, rows: Sequence[int], cols: Sequence[int], block_size: int) -> Tensor:
    return x.new_empty(len(rows), block_size, block_size, dtype=accumulation_dtype(x.dtype))


@register_flop_formula(torch.ops.smtune.block_grad)
def _block_grad_flop(grad_y_shape, x_shape, rows, cols, block_size, *args, **kwargs) -> int:
    # The counter hands over tensors as shapes; the loop multiplies (l, N) by (N, l) for each block.
    return 2 * x_shape[0] * len(rows) * block_size**2


def block_product_(y: Tensor, x: Tensor, blocks: Tensor, index: BlockIndex, transpose: bool = False) -> Tensor:
    """Add the blocks' product with `x` to `y` in place; with `transpose`, their input gradient. Returns `y`.

    Args:
        y: (..., O), contiguous, added to in place; (..., I) with `transpose`.
        x: (..., I), same leading dims and dtype as y; dL/dy, (..., O), with `transpose`.
        blocks: (m, l, l) in index order, cast to y's dtype.
    Cost: 2·N·m·l² FLOP; no (O, I) tensor.
    """
    y_flat, x_flat = y.view(y.shape[:-1].numel(), y.shape[-1]), flatten(x)
    block_product_loop_(y_flat, x_flat, blocks.to(y.dtype), index.pairs, transpose)
    return y
