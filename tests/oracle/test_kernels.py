"""Each candidate for the block gradient against the dense reference, and which of them the loop is."""

from __future__ import annotations

import pytest
import torch

from smtune.blocks import BlockGrid, BlockIndex, scatter_
from smtune.kernels import block_grad, block_grad_reference, loop
from smtune.kernels.candidates import CANDIDATES
from smtune.kernels.loop import block_product_loop_

PAIRS = [(3, 1), (0, 2), (3, 0), (0, 0), (1, 2)]
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5 + 2**-8, torch.float16: 1e-5 + 2**-11}
"""Relative to the largest value: the contract's, with one rounding for 16 bits."""


def operands(dtype, index, n_tokens=37):
    grad_y = torch.randn(n_tokens, index.grid.out_features).to(dtype)
    x = torch.randn(n_tokens, 2 * index.grid.in_features).to(dtype)[:, ::2]
    return grad_y, x


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("name", CANDIDATES)
def test_candidate_equals_the_dense_gradient_at_the_blocks(name, dtype):
    index = BlockIndex.from_pairs(BlockGrid(64, 48, 16), PAIRS)
    grad_y, x = operands(dtype, index)
    expected = block_grad_reference(grad_y, x, index)
    actual = CANDIDATES[name](grad_y, x, index.pairs, 16)
    torch.testing.assert_close(actual, expected, rtol=0, atol=BOUND[dtype] * expected.abs().max().item())


@pytest.mark.parametrize("size", [16, 144])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_the_used_candidate_is_what_block_grad_computes(dtype, size):
    index = BlockIndex.from_pairs(BlockGrid(4 * size, 3 * size, size), PAIRS)
    grad_y, x = operands(dtype, index)
    candidate = CANDIDATES[loop.way(dtype, x.device, size)]
    assert torch.equal(
        block_grad(grad_y.requires_grad_(), x.requires_grad_(), index).detach(),
        candidate(grad_y.detach(), x.detach(), index.pairs, size),
    )


def test_small_bf16_blocks_go_in_batches_where_the_cpu_multiplies_bf16(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(loop, "cpu_multiplies_bf16", lambda: True)
    assert [loop.way(torch.bfloat16, cpu, size) for size in (64, 128, 192)] == ["batched", "batched", "strided"]
    assert [loop.way(dtype, cpu, 64) for dtype in (torch.float32, torch.float16)] == ["strided", "widened"]
    assert loop.way(torch.bfloat16, gpu, 64) == "widened"
    monkeypatch.setattr(loop, "cpu_multiplies_bf16", lambda: False)
    assert loop.way(torch.bfloat16, cpu, 64) == "widened"


@pytest.mark.parametrize(("n_tokens", "limit", "most"), [(37, 2**20, 3), (37, 5000, 2), (37, 1, 1), (0, 2**20, 3)])
def test_a_batch_copies_no_more_than_it_may(n_tokens, limit, most, monkeypatch):
    """Of 37 tokens a block of 16² has 2,368 bytes in bf16; one block always goes."""
    index = BlockIndex.from_pairs(BlockGrid(64, 48, 16), PAIRS)
    grad_y, x = operands(torch.bfloat16, index, n_tokens)
    batches = []
    bmm = torch.bmm
    monkeypatch.setattr(loop.torch, "bmm", lambda a, b, out: (batches.append(len(a)), bmm(a, b, out=out)))
    monkeypatch.setattr(loop, "BATCH_BLOCKS", 3)
    monkeypatch.setattr(loop, "BATCH_BYTES", limit)
    actual = loop.block_grad_loop(grad_y, x, index.pairs, 16, "batched")
    assert (max(batches), sum(batches)) == (most, len(PAIRS))
    expected = block_grad_reference(grad_y, x, index)
    bound = BOUND[torch.bfloat16] * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_the_product_of_a_row_of_blocks_is_rounded_once(dtype, transpose):
    grid = BlockGrid(32, 512, 16)
    index = BlockIndex.from_pairs(grid, [(row, col) for row in range(2) for col in range(32)])
    x = torch.randn(37, 32 if transpose else 512).to(dtype)
    blocks = (1e-3 * torch.randn(64, 16, 16)).to(dtype)
    y = torch.randn(37, 512 if transpose else 32).to(dtype)
    dense = scatter_(torch.zeros(32, 512, dtype=torch.float64), index, blocks.double())
    expected = y.double() + x.double() @ (dense if transpose else dense.T)
    block_product_loop_(y, x, blocks, index.pairs, transpose)
    rounding = torch.finfo(dtype).eps / 2 * expected.abs()
    assert ((y.double() - expected).abs() <= rounding + 1e-5 * expected.abs().max()).all()
