"""The kernels as called from above: checked, shaped, and registered so that compilers and FLOP counters see them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from types import ModuleType
from typing import Any

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
    Cost: 2·N·m·l² FLOP; grad_y is never copied whole.
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
    return _flat_block_grad(grad_y_NO.detach(), x_NI.detach(), index.sides, grid.block_size)


def block_grad_compact(grad_y_NO: Tensor, x_used: Tensor, index: BlockIndex) -> Tensor:
    """As `block_grad`, from `x_used`: only the kept columns of x, (..., U·l), in the order of `index.columns`."""
    return _flat_block_grad(grad_y_NO, x_used, index.compact_sides, index.grid.block_size)


def _flat_block_grad(grad_y: Tensor, x: Tensor, sides: tuple[Sequence[int], Sequence[int]], block_size: int) -> Tensor:
    return torch.ops.smtune.block_grad(flatten(grad_y), flatten(x), *sides, block_size)


def block_product_(y: Tensor, x: Tensor, blocks: Tensor, index: BlockIndex, transpose: bool = False) -> Tensor:
    """Add the blocks' product with `x` to `y` in place; with `transpose`, their input gradient. Returns `y`.

    Args:
        y: (..., O), contiguous, added to in place; (..., I) with `transpose`.
        x: (..., I), same leading dims and dtype as y; dL/dy, (..., O), with `transpose`.
        blocks: (m, l, l) in index order, cast to y's dtype.
    Cost: 2·N·m·l² FLOP; no (O, I) tensor.
    """
    y_flat = y.view(y.shape[:-1].numel(), y.shape[-1])
    _block_product_op(y_flat, flatten(x), blocks.to(y.dtype), *index.sides, transpose)
    return y


def flatten(x: Tensor) -> Tensor:
    """(..., F) as (N, F): any leading dims, none included, and any of them empty."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


# The operators, opaque to compilers. Places of blocks come as lists: a kernel on a device keeps the tables it makes of
# them, since a compiler can trace neither the making in a backward nor a cache that another step has filled. Nor may a
# CUDA graph hold the tables, whose memory is its own to use again: compilers are told to leave the operators out of it.

_TAGS = tuple(
    getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, name)
)
_takes_tags = "tags" in signature(torch.library.custom_op).parameters  # from torch 2.8 on
_TAGGED: dict[str, Any] = {"tags": _TAGS} if _takes_tags else {}


def _block_grad(grad_y: Tensor, x: Tensor, rows: Sequence[int], cols: Sequence[int], block_size: int) -> Tensor:
    return block_grad_loop(grad_y, x, list(zip(rows, cols)), block_size)


def _block_grad_gpu(grad_y: Tensor, x: Tensor, rows: Sequence[int], cols: Sequence[int], block_size: int) -> Tensor:
    triton = _triton_kernels(x, block_size)
    run = triton.block_grad_triton if triton else block_grad_loop
    return run(grad_y, x, tuple(zip(rows, cols)), block_size)


def _block_grad_fake(grad_y: Tensor, x: Tensor, rows: Sequence[int], cols: Sequence[int], block_size: int) -> Tensor:
    return x.new_empty(len(rows), block_size, block_size, dtype=accumulation_dtype(x.dtype))


# Not a `custom_op`: those bring an autograd of their own to every call, and this runs in backwards alone.
torch.library.define(
    "smtune::block_grad",
    "(Tensor grad_y, Tensor x, int[] rows, int[] cols, int block_size) -> Tensor",
    tags=_TAGS,
)
torch.library.impl("smtune::block_grad", "default", _block_grad)
torch.library.impl("smtune::block_grad", "cuda", _block_grad_gpu)
torch.library.register_fake("smtune::block_grad", _block_grad_fake)


@register_flop_formula(torch.ops.smtune.block_grad)
def _block_grad_flop(grad_y_shape, x_shape, rows, cols, block_size, *args, **kwargs) -> int:
    # The counter hands over tensors as shapes; each block is a product of (l, N) and (N, l).
    return 2 * x_shape[0] * len(rows) * block_size**2


@torch.library.custom_op("smtune::block_product_", mutates_args=("y",), **_TAGGED)
def _block_product_op(
    y: Tensor, x: Tensor, blocks: Tensor, rows: Sequence[int], cols: Sequence[int], transpose: bool
) -> None:
    block_product_loop_(y, x, blocks, list(zip(rows, cols)), transpose)


@_block_product_op.register_kernel("cuda")
def _block_product_gpu(
    y: Tensor, x: Tensor, blocks: Tensor, rows: Sequence[int], cols: Sequence[int], transpose: bool
) -> None:
    triton = _triton_kernels(x, blocks.shape[-1])
    run = triton.block_product_triton_ if triton else block_product_loop_
    run(y, x, blocks, tuple(zip(rows, cols)), transpose)


@register_flop_formula(torch.ops.smtune.block_product_)
def _block_product_flop(y_shape, x_shape, blocks_shape, *args, **kwargs) -> int:
    n_blocks, block_size, _ = blocks_shape
    return 2 * x_shape[0] * n_blocks * block_size**2


def _triton_kernels(x: Tensor, block_size: int) -> ModuleType | None:
    """The module of Triton kernels, where Triton is there, starts, and takes these operands on this GPU."""
    fits = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and block_size % 16 == 0
    return _triton_kernels_on(x.device) if fits else None


@cache
def _triton_kernels_on(device: torch.device) -> ModuleType | None:
    if find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        kernels = import_module("smtune.kernels.triton_blocks")
        kernels.start()
    except Exception as error:  # whatever it is, the loop does without
        warnings.warn(
            f"Expected Triton to start, which wants a C compiler and Python's headers (gcc, python3-dev). Got "
            f"{type(error).__name__}: {error}. Blocks are multiplied one by one, which is slower.",
            stacklevel=2,
        )
        return None
    return kernels
