"""One GEMM per block (or per row of blocks), on strided views. Runs on every device; the floor on CPUs.

Nothing is gathered: a block gradient reads its columns of dY and X where they lie. What may be copied is the dtype:
16-bit operands are widened to fp32, dY one row of blocks at a time, unless the device multiplies bf16 itself, which is
then three times as fast (docs/adr/0008 has the candidates, timed).
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


def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the loop widens operands of `dtype` to fp32 before it multiplies them on `device`.

    bf16 is multiplied as it is on CPUs that can: the sum is fp32 and rounded once. Elsewhere a strided 16-bit product
    is 10-100 times slower than a plain one on CPUs, and cuBLAS may round its partial sums too.
    """
    native = dtype == torch.bfloat16 and device.type == "cpu" and cpu_multiplies_bf16()
    return dtype != accumulation_dtype(dtype) and not native


def block_grad_loop(
    grad_y_NO: Tensor, x_NU: Tensor, pairs: Pairs, block_size: int, widen: bool | None = None
) -> Tensor:
    """Block k is `dY[:, row]ᵀ X[:, col]` for pairs[k] = (row, col): (m, l, l) in the accumulation dtype.

    Args:
        grad_y_NO: dL/dy, (N, O), any strides; never copied whole.
        x_NU: the input, (N, I), or only some of its columns, (N, U); `pairs` counts columns in it.
        pairs: m (row, col); fastest when equal rows are neighbours.
        block_size: l.
        widen: multiply in the accumulation dtype; otherwise in the operands' own, which rounds each sum to it once.
            Default: `widens`.
    Cost: 2·N·m·l² FLOP.
    """
    size, dtype = block_size, accumulation_dtype(x_NU.dtype)
    if widen is None:
        widen = widens(x_NU.dtype, x_NU.device)
    product_dtype = dtype if widen else x_NU.dtype
    grad = torch.empty(len(pairs), size, size, dtype=product_dtype, device=x_NU.device)
    x_NU = x_NU.to(product_dtype)
    numbered = enumerate(pairs)
    for row, group in groupby(numbered, key=lambda item: item[1][0]):
        grad_y_lN = grad_y_NO[:, row * size : (row + 1) * size].to(product_dtype).T
        for k, (_, col) in group:
            torch.mm(grad_y_lN, x_NU[:, col * size : (col + 1) * size], out=grad[k])
    return grad.to(dtype)


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
