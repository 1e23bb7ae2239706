"""One GEMM per block (or per row of blocks), on strided views. Runs on every device; the floor on CPUs.

Measured on 2 CPU cores at 4096², 2048 tokens, fp32, m = 8 blocks of 256²: ideal 11.8 ms, this 13.4 ms, gather and
`bmm` 21.7 ms, covering rectangle 51 ms. 16-bit operands are widened to fp32, dY one row of blocks at a time: products
are then exactly fp32-accumulated, and a strided 16-bit GEMM is 10-100 times slower than a plain one on CPUs that
lack native 16-bit arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from smtune.kernels.reference import accumulation_dtype

Pairs = Sequence[tuple[int, int]]


def block_grad_loop(grad_y_NO: Tensor, x_NU: Tensor, pairs: Pairs, block_size: int) -> Tensor:
    """Block k is `dY[:, row]ᵀ X[:, col]` for pairs[k] = (row, col): (m, l, l) in the accumulation dtype.

    Args:
        grad_y_NO: dL/dy, (N, O), any strides; never copied whole.
        x_NU: the input, (N, I), or only its used columns, (N, U); `pairs` counts columns in it.
        pairs: m (row, col); fastest when equal rows are neighbours.
        block_size: l.
    Cost: 2·N·m·l² FLOP.
    """
    size, dtype = block_size, accumulation_dtype(x_NU.dtype)
    grad = torch.empty(len(pairs), size, size, dtype=dtype, device=x_NU.device)
    x_NU = x_NU.to(dtype)
    numbered = enumerate(pairs)
    for row, group in groupby(numbered, key=lambda item: item[1][0]):
        grad_y_lN = grad_y_NO[:, row * size : (row + 1) * size].to(dtype).T
        for k, (_, col) in group:
            torch.mm(grad_y_lN, x_NU[:, col * size : (col + 1) * size], out=grad[k])
    return grad


def block_product_loop_(y_NO: Tensor, x_NI: Tensor, blocks: Tensor, pairs: Pairs, transpose: bool = False) -> None:
    """Add each block's product to `y` in place: `y[:, row] += x[:, col] @ blockᵀ`.

    With `transpose`, the input gradient of the same: x is dY, y is dX, `y[:, col] += x[:, row] @ block`.

    Args:
        y_NO: (N, O), added to in place.
        x_NI: (N, I), dtype of y.
        blocks: (m, l, l), dtype of y.
    Cost: 2·N·m·l² FLOP.
    """
    size = blocks.shape[-1]
    for (row, col), block in zip(pairs, blocks.unbind()):
        source, target, factor = (row, col, block) if transpose else (col, row, block.T)
        y_NO[:, target * size : (target + 1) * size].addmm_(x_NI[:, source * size : (source + 1) * size], factor)
