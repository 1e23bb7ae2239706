"""The block kernels for GPUs, in Triton: one launch for all blocks of a layer.

At the paper's budgets a layer has few blocks, 9 of 256² in a 4096² weight: launches and idle processors cost more
than the products. So `block_grad_triton` launches once over (block, part of it) × (split of the tokens). A program
sums its tokens in fp32; where there are several splits, their sums are added in a second stage.
`block_product_triton_` launches once over (tile of tokens) × (part of the output's block columns): a program owns its
piece of the output and goes through the blocks that add to it. Neither has atomics.

The order of summation follows from the shapes alone (`token_splits`, `_depth`, the order of blocks). What is tuned,
on the first call for a shape, is how large a piece a program owns and with how many warps; a tuned configuration
repeats to the bit. fp32 operands are multiplied as torch multiplies them: in TF32 where its settings allow that,
exactly otherwise.

Imported for tensors on CUDA and HIP devices only; needs `triton`. docs/adr/0006 says why it is built so.
Shapes: N tokens, O out, I in, m blocks, l block size, a multiple of 16, S splits. Offsets are 64-bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

Pairs = tuple[tuple[int, int], ...]

LARGEST_TILE = 128
ENOUGH_PROGRAMS = 256
"""About two for each processor of the largest GPUs: tokens are split until there are as many."""
LEAST_TOKENS = 256
"""Of a split: fewer would not pay for its partial sums."""

CONFIGS = [
    triton.Config({"TILE": tile}, num_warps=warps, num_stages=stages)
    for tile, warps, stages in [(16, 2, 4), (32, 4, 4), (64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3)]
]


def start() -> None:
    """Start Triton's driver, a part of which is compiled then. Raises whatever keeps it from that."""
    triton.runtime.driver.active.get_current_target()


def _fitting(configs: Sequence[triton.Config], named_args: dict, L: int, **_) -> list[triton.Config]:
    """The configurations whose tile divides l, without those that are small for no need."""
    largest = max(config.kwargs["TILE"] for config in configs if L % config.kwargs["TILE"] == 0)
    return [
        config for config in configs if L % config.kwargs["TILE"] == 0 and config.kwargs["TILE"] >= min(largest, 64)
    ]


@triton.jit(do_not_specialize=["n_tokens", "n_blocks", "split_tokens", "n_bucket", "m_bucket"])
def block_grad_kernel(
    grad_y,
    x,
    places,
    sums,
    n_tokens,
    n_blocks,
    split_tokens,
    stride_gn,
    stride_go,
    stride_xn,
    stride_xi,
    n_bucket,
    m_bucket,
    L: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
):
    """sums[split, k] = dY[split, row_k]ᵀ X[split, col_k], a TILE² part of it to a program."""
    tiles = L // TILE
    block = tl.program_id(0) // (tiles * tiles)
    part = tl.program_id(0) % (tiles * tiles)
    split = tl.program_id(1)
    o = (part // tiles) * TILE + tl.arange(0, TILE)
    i = (part % tiles) * TILE + tl.arange(0, TILE)
    first_o = tl.load(places + block).to(tl.int64) * L
    first_i = tl.load(places + n_blocks + block).to(tl.int64) * L

    first = split * split_tokens
    end = tl.minimum(first + split_tokens, n_tokens)
    n = first.to(tl.int64) + tl.arange(0, DEPTH)
    grad_y += n[None, :] * stride_gn + (first_o + o)[:, None] * stride_go
    x += n[:, None] * stride_xn + (first_i + i)[None, :] * stride_xi
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(first, end, DEPTH):
        here = start + tl.arange(0, DEPTH) < end
        grad_y_tile = tl.load(grad_y, mask=here[None, :], other=0.0)
        x_tile = tl.load(x, mask=here[:, None], other=0.0)
        total = tl.dot(grad_y_tile, x_tile, total, input_precision=PRECISION)
        grad_y += DEPTH * tl.cast(stride_gn, tl.int64)
        x += DEPTH * tl.cast(stride_xn, tl.int64)

    sums += (split.to(tl.int64) * n_blocks + block) * (L * L)
    tl.store(sums + o[:, None] * L + i[None, :], total)


@triton.jit(do_not_specialize=["n_tokens", "n_blocks", "n_groups", "n_bucket", "m_bucket"])
def block_product_kernel(
    y,
    x,
    blocks,
    groups,
    members,
    n_tokens,
    n_blocks,
    n_groups,
    stride_yn,
    stride_yf,
    stride_xn,
    stride_xf,
    stride_block,
    stride_target,
    stride_source,
    n_bucket,
    m_bucket,
    L: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
):
    """y[:, target] += Σ x[:, source] @ block, over the blocks of the target; TILE tokens by TILE features a program."""
    tiles = L // TILE
    group = tl.program_id(1) // tiles
    f = (tl.program_id(1) % tiles) * TILE + tl.arange(0, TILE)
    target = tl.load(groups + group).to(tl.int64) * L
    first = tl.load(groups + n_groups + group)
    end = tl.load(groups + 2 * n_groups + group)

    n = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    here = n < n_tokens
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for member in range(first, end):
        source = tl.load(members + member).to(tl.int64) * L
        block = blocks + tl.load(members + n_blocks + member).to(tl.int64) * stride_block
        for start in range(0, L, DEPTH):
            k = start + tl.arange(0, DEPTH)
            x_tile = tl.load(
                x + n[:, None] * stride_xn + (source + k)[None, :] * stride_xf, mask=here[:, None], other=0.0
            )
            block_tile = tl.load(block + k[:, None] * stride_source + f[None, :] * stride_target)
            total = tl.dot(x_tile, block_tile, total, input_precision=PRECISION)

    y += n[:, None] * stride_yn + (target + f)[None, :] * stride_yf
    sums = tl.load(y, mask=here[:, None], other=0.0).to(tl.float32) + total
    tl.store(y, sums.to(y.dtype.element_ty), mask=here[:, None])


_KEY = ["n_bucket", "m_bucket", "L", "PRECISION"]
_PRUNE = {"early_config_prune": _fitting}
tuned_block_grad = triton.autotune(CONFIGS, _KEY, prune_configs_by=_PRUNE)(block_grad_kernel)
tuned_block_product = triton.autotune(CONFIGS, _KEY, prune_configs_by=_PRUNE, restore_value=["y"])(block_product_kernel)


def block_grad_triton(grad_y_NO: Tensor, x_NU: Tensor, pairs: Pairs, block_size: int) -> Tensor:
    """As `block_grad_loop`: (m, l, l) in fp32. One launch, and a sum over the splits if there are several.

    Args:
        grad_y_NO: fp32, bf16 or fp16, any strides; never copied.
        x_NU: the same; `pairs` counts block columns in it.
        pairs: m (row, col).
        block_size: l, a multiple of 16.
    """
    n_tokens, n_blocks = len(x_NU), len(pairs)
    if n_tokens == 0 or n_blocks == 0:
        return x_NU.new_zeros(n_blocks, block_size, block_size, dtype=torch.float32)
    n_splits, split_tokens = token_splits(n_tokens, n_blocks, block_size)
    sums = x_NU.new_empty(n_splits, n_blocks, block_size, block_size, dtype=torch.float32)

    def programs(meta: dict) -> tuple[int, int]:
        return n_blocks * (block_size // meta["TILE"]) ** 2, n_splits

    with torch.cuda.device_of(x_NU):
        tuned_block_grad[programs](
            grad_y_NO,
            x_NU,
            _places(pairs, x_NU.device),
            sums,
            n_tokens,
            n_blocks,
            split_tokens,
            *grad_y_NO.stride(),
            *x_NU.stride(),
            triton.next_power_of_2(n_tokens),
            triton.next_power_of_2(n_blocks),
            L=block_size,
            DEPTH=_depth(x_NU.dtype),
            PRECISION=_precision(),
        )
        return sums[0] if n_splits == 1 else sums.sum(0)


def block_product_triton_(y_NO: Tensor, x_NI: Tensor, blocks: Tensor, pairs: Pairs, transpose: bool = False) -> None:
    """As `block_product_loop_`, in one launch; the sum over blocks is fp32 and rounded to y's dtype once.

    Args:
        y_NO, x_NI: fp32, bf16 or fp16, one dtype, any strides.
        blocks: (m, l, l), their dtype, l a multiple of 16.
        pairs: m (row, col).
    """
    n_tokens, n_blocks, block_size = len(x_NI), len(pairs), blocks.shape[-1]
    if n_tokens == 0 or n_blocks == 0:
        return
    groups, members = _groups(pairs, transpose, x_NI.device)
    n_groups = groups.shape[1]
    stride_block, stride_row, stride_col = blocks.stride()

    def programs(meta: dict) -> tuple[int, int]:
        return _ceil_div(n_tokens, meta["TILE"]), n_groups * (block_size // meta["TILE"])

    with torch.cuda.device_of(x_NI):
        tuned_block_product[programs](
            y_NO,
            x_NI,
            blocks,
            groups,
            members,
            n_tokens,
            n_blocks,
            n_groups,
            *y_NO.stride(),
            *x_NI.stride(),
            stride_block,
            *((stride_col, stride_row) if transpose else (stride_row, stride_col)),
            triton.next_power_of_2(n_tokens),
            triton.next_power_of_2(n_blocks),
            L=block_size,
            DEPTH=_depth(x_NI.dtype, block_size),
            PRECISION=_precision(),
        )


def token_splits(n_tokens: int, n_blocks: int, block_size: int) -> tuple[int, int]:
    """(number of splits, tokens of each but perhaps the last): enough programs, none with too few tokens."""
    programs = n_blocks * _ceil_div(block_size, LARGEST_TILE) ** 2
    wanted = min(_ceil_div(ENOUGH_PROGRAMS, programs), max(n_tokens // LEAST_TOKENS, 1))
    split_tokens = _ceil_div(_ceil_div(n_tokens, wanted), 64) * 64
    return _ceil_div(n_tokens, split_tokens), split_tokens


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _depth(dtype: torch.dtype, length: int = 64) -> int:
    """How many terms a program adds at a time: 128 bytes of them, if that divides the sum's `length`."""
    depth = 32 if dtype == torch.float32 else 64
    while length % depth:
        depth //= 2
    return depth


def _precision() -> str:
    """How `tl.dot` multiplies fp32: as torch does, so that a block's gradient is as exact as the dense one."""
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)  # torch 2.9; it forbids asking for the older name after use
    allowed = matmul.allow_tf32 if setting is None else setting == "tf32"
    return "tf32" if allowed and torch.version.hip is None else "ieee"


# The index as the kernels read it, int32, made once for each device: a step copies nothing from the host.


@lru_cache(maxsize=4096)
def _places(pairs: Pairs, device: torch.device) -> Tensor:
    """(2, m): rows and columns."""
    return _table(zip(*pairs), device)


@lru_cache(maxsize=4096)
def _groups(pairs: Pairs, transpose: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The blocks by the part of the output that they add to: a row or, with `transpose`, a column.

    Returns:
        groups: (3, G), the target and the first and last-plus-one of its members.
        members: (2, m), the source and the number of a block; the targets' blocks side by side.
    """
    targets_sources = [(col, row) if transpose else (row, col) for row, col in pairs]
    order = sorted(range(len(pairs)), key=lambda block: targets_sources[block])
    groups, end = [], 0
    for target, members in groupby(order, key=lambda block: targets_sources[block][0]):
        first, end = end, end + len(list(members))
        groups.append((target, first, end))
    return _table(zip(*groups), device), _table(zip(*((targets_sources[b][1], b) for b in order)), device)


def _table(columns, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for later uses, which may be in training
        return torch.tensor(list(columns), dtype=torch.int32, device="cpu").to(device)
