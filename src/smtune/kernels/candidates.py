"""Ways to compute a block gradient with plain products, for the benchmarks to time side by side.

Each takes (grad_y_NO, x_NI, pairs, block_size) and returns the (m, l, l) of `block_grad_loop`, which is three of
them: `loop.way` says which. What each one costs is in docs/adr/0008 and 0020.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from smtune.kernels.loop import Pairs, block_grad_loop
from smtune.kernels.reference import accumulation_dtype

Candidate = Callable[[Tensor, Tensor, Pairs, int], Tensor]


def strided(grad_y_NO: Tensor, x_NI: Tensor, pairs: Pairs, block_size: int) -> Tensor:
    """One GEMM a block, dYᵀ X on strided views, in the operands' dtype."""
    return block_grad_loop(grad_y_NO, x_NI, pairs, block_size, "strided")


def strided_transposed(grad_y_NO: Tensor, x_NI: Tensor, pairs: Pairs, block_size: int) -> Tensor:
    """As `strided`, but as Xᵀ dY, written through the transposed block."""
    grad = _empty_like_operands(x_NI, len(pairs), block_size)
    for block, (row, col) in zip(grad.unbind(), pairs):
        torch.mm(_part(x_NI, col, block_size).T, _part(grad_y_NO, row, block_size), out=block.T)
    return grad.to(accumulation_dtype(x_NI.dtype))


def widened(grad_y_NO: Tensor, x_NI: Tensor, pairs: Pairs, block_size: int) -> Tensor:
    """As `strided`, with 16-bit operands first converted to fp32."""
    return block_grad_loop(grad_y_NO, x_NI, pairs, block_size, "widened")


def batched(grad_y_NO: Tensor, x_NI: Tensor, pairs: Pairs, block_size: int) -> Tensor:
    """One batched product for some blocks at a time, on copies of their columns that stay in the caches."""
    return block_grad_loop(grad_y_NO, x_NI, pairs, block_size, "batched")


def copied(grad_y_NO: Tensor, x_NI: Tensor, pairs: Pairs, block_size: int) -> Tensor:
    """One GEMM a block, each operand first copied into one piece."""
    grad = _empty_like_operands(x_NI, len(pairs), block_size)
    for block, (row, col) in zip(grad.unbind(), pairs):
        grad_y_lN = _part(grad_y_NO, row, block_size).T.contiguous()
        torch.mm(grad_y_lN, _part(x_NI, col, block_size).contiguous(), out=block)
    return grad.to(accumulation_dtype(x_NI.dtype))


def grouped(grad_y_NO: Tensor, x_NI: Tensor, pairs: Pairs, block_size: int) -> Tensor:
    """One GEMM for each group of neighbouring `pairs` of one row, on a copy of their columns side by side."""
    parts = []
    for row, group in groupby(pairs, key=lambda pair: pair[0]):
        x_Nkl = torch.cat([_part(x_NI, col, block_size) for _, col in group], dim=1)
        blocks_lkl = _part(grad_y_NO, row, block_size).T @ x_Nkl
        parts.append(blocks_lkl.unflatten(1, (-1, block_size)).transpose(0, 1))
    return torch.cat(parts).to(accumulation_dtype(x_NI.dtype))


def bmm(grad_y_NO: Tensor, x_NI: Tensor, pairs: Pairs, block_size: int) -> Tensor:
    """One batched product of gathered operands: m copies of (N, l) each."""
    grad_y_mNl = torch.stack([_part(grad_y_NO, row, block_size) for row, _ in pairs])
    x_mNl = torch.stack([_part(x_NI, col, block_size) for _, col in pairs])
    return torch.bmm(grad_y_mNl.transpose(1, 2), x_mNl).to(accumulation_dtype(x_NI.dtype))


def rectangle(grad_y_NO: Tensor, x_NI: Tensor, pairs: Pairs, block_size: int) -> Tensor:
    """One product of all used rows with all used columns, of which the blocks are a part."""
    rows, cols = (sorted(set(side)) for side in zip(*pairs))
    grad_y_NV = torch.cat([_part(grad_y_NO, row, block_size) for row in rows], dim=1)
    x_NU = torch.cat([_part(x_NI, col, block_size) for col in cols], dim=1)
    tiles = (grad_y_NV.T @ x_NU).unflatten(0, (-1, block_size)).unflatten(2, (-1, block_size))
    blocks = [tiles[rows.index(row), :, cols.index(col)] for row, col in pairs]
    return torch.stack(blocks).to(accumulation_dtype(x_NI.dtype))


CANDIDATES: dict[str, Candidate] = {
    candidate.__name__: candidate
    for candidate in (strided, strided_transposed, widened, batched, copied, grouped, bmm, rectangle)
}


def _part(matrix: Tensor, block_column: int, block_size: int) -> Tensor:
    return matrix[:, block_column * block_size : (block_column + 1) * block_size]


def _empty_like_operands(x: Tensor, n_blocks: int, block_size: int) -> Tensor:
    return torch.empty(n_blocks, block_size, block_size, dtype=x.dtype, device=x.device)
