"""One GEMM per block (or per row of blocks), on strided views. Runs on every device; the floor on CPUs.

A block gradient reads its columns of dY and X where they lie. What may be copied is the dtype: 16-bit operands are
widened to fp32, dY one row of blocks at a time, unless the device multiplies bf16 itself, which is then three times as
fast. Small blocks of bf16 are too little work for a product of their own: they go in batches, of bounded copies
(docs/adr/0008 and 0020 have the candidates, timed).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from itertools import groupby

import torch
from torch import Tensor

from smtune.kernels.reference import accumulation_dtype

Pairs = Sequence[tuple[int, int]]


@cache
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 products that accumulate in fp32 (AVX-512 BF16, AMX)."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


BATCHED_SIZE = 128
"""The largest block of bf16 that a CPU multiplies in batches."""
BATCH_BLOCKS, BATCH_BYTES = 16, 4 * 2**20
"""Blocks of a batch, at most, and what its copies of dY and X may take: what stays in the caches."""


def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the loop widens operands of `dtype` to fp32 before it multiplies them on `device`.

    bf16 is multiplied as it is on CPUs that can: the sum is fp32 and rounded once. Elsewhere a strided 16-bit product
    is 10-100 times slower than a plain one on CPUs, and cuBLAS may round its partial sums too.
    """
    native = dtype == torch.bfloat16 and device.type == "cpu" and cpu_multiplies_bf16()
    return dtype != accumulation_dtype(dtype) and not native


def way(dtype: torch.dtype, device: torch.device, block_size: int) -> str:
    """How the loop computes blocks, by its name in `candidates.CANDIDATES`: "strided", "widened" or "batched"."""
    if widens(dtype, device):
        return "widened"
    is_small = dtype == torch.bfloat16 and device.type == "cpu" and block_size <= BATCHED_SIZE
    return "batched" if is_small else "strided"


def block_grad_loop(grad_y_NO: Tensor, x_NU: Tensor, pairs: Pairs, block_size: int, how: str | None = None) -> Tensor:
    """Block k is `dY[:, row]ᵀ X[:, col]` for pairs[k] = (row, col): (m, l, l) in the accumulation dtype.

    Args:
        grad_y_NO: dL/dy, (N, O), any strides; never copied whole: in batches, at most `BATCH_BYTES` of it and x.
        x_NU: the input, (N, I), or only some of its columns, (N, U); `pairs` counts columns in it.
        pairs: m (row, col); fastest when equal rows are neighbours.
        block_size: l.
        how: "widened" multiplies in the accumulation dtype; "strided" and "batched" in the operands' own, which rounds
            each sum to it once. Default: `way`.
    Cost: 2·N·m·l² FLOP.
    """
    size, dtype = block_size, accumulation_dtype(x_NU.dtype)
    if how is None:
        how = way(x_NU.dtype, x_NU.device, size)
    if how == "batched":
        return _in_batches(grad_y_NO, x_NU, pairs, size).to(dtype)
    product_dtype = dtype if how == "widened" else x_NU.dtype
    grad = torch.empty(len(pairs), size, size, dtype=product_dtype, device=x_NU.device)
    x_NU = x_NU.to(product_dtype)
    numbered = enumerate(pairs)
    for row, group in groupby(numbered, key=lambda item: item[1][0]):
        grad_y_lN = grad_y_NO[:, row * size : (row + 1) * size].to(product_dtype).T
        for k, (_, col) in group:
            torch.mm(grad_y_lN, x_NU[:, col * size : (col + 1) * size], out=grad[k])
    return grad.to(dtype)


def _in_batches(grad_y_NO: Tensor, x_NU: Tensor, pairs: Pairs, size: int) -> Tensor:
    """One batched product for some blocks at a time, on copies of their columns; (m, l, l) in the operands' dtype."""
    of_one = 2 * len(x_NU) * size * x_NU.itemsize
    batch = min(BATCH_BLOCKS, max(1, BATCH_BYTES // max(1, of_one)))
    grad = torch.empty(len(pairs), size, size, dtype=x_NU.dtype, device=x_NU.device)
    copies = x_NU.new_empty(2, min(batch, len(pairs)), len(x_NU), size)  # the same memory for every batch
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        grad_y_bNl, x_bNl = copies[:, : len(some)]
        torch.stack([grad_y_NO[:, row * size : (row + 1) * size] for row, _ in some], out=grad_y_bNl)
        torch.stack([x_NU[:, col * size : (col + 1) * size] for _, col in some], out=x_bNl)
        torch.bmm(grad_y_bNl.transpose(1, 2), x_bNl, out=grad[start : start + batch])
    return grad


def block_product_loop_(y_NO: Tensor, x_NI: Tensor, blocks: Tensor, pairs: Pairs, transpose: bool = False) -> None:
    """Add each block's product to `y` in place: `y[:, row] += x[:, col] @ blockᵀ`.

    With `transpose`, the input gradient of the same: x is dY, y is dX, `y[:, col] += x[:, row] @ block`.

    Args:
        y_NO: (N, O), added to in place.
        x_NI: (N, I), dtype of y.
        blocks: (m, l, l), dtype of y. In 16 bits the columns of x that one target reads are copied side by side, so
            that their sum is rounded once.
    Cost: 2·N·m·l² FLOP.
    """
    size = blocks.shape[-1]
    terms: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for (row, col), block in zip(pairs, blocks.unbind()):
        source, target, factor = (row, col, block) if transpose else (col, row, block.T)
        terms[target].append((x_NI[:, source * size : (source + 1) * size], factor))
    for target, of_target in terms.items():
        if len(of_target) > 1 and blocks.dtype != accumulation_dtype(blocks.dtype):
            xs, factors = zip(*of_target)
            of_target = [(torch.cat(xs, dim=1), torch.cat(factors))]  # one sum in fp32, rounded once
        for x_Nl, factor in of_target:
            y_NO[:, target * size : (target + 1) * size].addmm_(x_Nl, factor)
