"""The slow, obvious twins: form the dense matrix, then take the blocks. The oracle of every faster path."""

from __future__ import annotations

import torch
from torch import Tensor

from smtune.blocks import BlockIndex, gather, scatter_


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; every other floating dtype accumulates in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_grad_reference(grad_y_NO: Tensor, x_NI: Tensor, index: BlockIndex) -> Tensor:
    """`dYᵀ X`, whole and in the accumulation dtype, then its blocks, as `block_grad` gives them.

    Args:
        grad_y_NO: (..., O).
        x_NI: (..., I), the same leading dims.
        index: m blocks of an (O, I) weight.
    Returns:
        (m, l, l), fp32, or fp64 of fp64 operands.
    """
    dtype = accumulation_dtype(x_NI.dtype)
    grad_y_NO, x_NI = (t.reshape(t.shape[:-1].numel(), t.shape[-1]).to(dtype) for t in (grad_y_NO, x_NI))
    dense_OI = grad_y_NO.T @ x_NI
    return gather(dense_OI, index)


def block_product_reference(x_NI: Tensor, blocks: Tensor, index: BlockIndex) -> Tensor:
    """`x Dᵀ` with D the (O, I) matrix that holds `blocks` at the index and zero elsewhere: (..., O)."""
    grid = index.grid
    dense_OI = x_NI.new_zeros(grid.out_features, grid.in_features)
    return x_NI @ scatter_(dense_OI, index, blocks).T
