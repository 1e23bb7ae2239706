"""The Triton kernels against the reference, in Triton's interpreter. Run in a process of its own by
test_triton_kernels.py: the interpreter must be chosen before triton is imported, and then holds for the process.

The interpreter has no bf16: it keeps the bits as integers. Its `tl.dot` would multiply those, so here bf16 operands
become fp32 first, which changes no value: the products are summed in fp32, as on a GPU. Storing in bf16, it cuts bits
off where a GPU rounds.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from smtune.blocks import BlockGrid, BlockIndex, scatter_
from smtune.kernels import block_grad_reference, block_product_reference, dispatch, triton_blocks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RELATIVE = 1e-5
"""The contract for fp32 sums, to the largest value."""


def widened(handle):
    """The same values in fp32, if they are bf16: its bits are the upper half of fp32's."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def create_dot(self, a, b, *rest, original=InterpreterBuilder.create_dot):
    return original(self, widened(a), widened(b), *rest)


InterpreterBuilder.create_dot = create_dot


def choose(number):
    """Have the tuners take the fitting configuration of this number, as if it had been the fastest."""
    for tuner in (triton_blocks.tuned_block_grad, triton_blocks.tuned_block_product):
        times = iter([abs(place - number) for place in range(len(triton_blocks.CONFIGS))])
        tuner.cache.clear()
        # Called as a benchmark calls it, so that a configuration that was tried must have left y as it was.
        tuner.do_bench = lambda kernel_call, quantiles, times=times: (kernel_call(), [next(times)] * 3)[1]


@st.composite
def cases(draw):
    """(index, n_tokens, layout, dtype, seed): any blocks in any order; one split and several, with and without tail."""
    size = draw(st.sampled_from([16, 32, 48, 64, 96, 128]))
    n_rows, n_cols = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    places = draw(st.lists(st.integers(0, n_rows * n_cols - 1), min_size=1, max_size=5, unique=True))
    grid = BlockGrid(n_rows * size, n_cols * size, size)
    index = BlockIndex.from_pairs(grid, [divmod(place, n_cols) for place in places])
    n_tokens = draw(st.one_of(st.integers(1, 200), st.sampled_from([256, 512, 513, 600])))
    layout = draw(st.sampled_from(["contiguous", "sliced", "transposed", "expanded"]))
    return index, n_tokens, layout, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**16))


def random(layout, n_tokens, features, dtype):
    if layout == "sliced":
        return torch.randn(n_tokens, 2 * features, dtype=dtype)[:, ::2]
    if layout == "transposed":
        return torch.randn(features, n_tokens, dtype=dtype).T
    if layout == "expanded":
        return torch.randn(features, dtype=dtype).expand(n_tokens, features)
    return torch.randn(n_tokens, features, dtype=dtype)


def close(actual, expected, rounding=0.0):
    atol = RELATIVE * expected.abs().max().item()
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=rounding, atol=atol)


EVERY_TILE = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
LARGE = BlockIndex.from_pairs(BlockGrid(512, 256, 256), [(1, 0)])
OF_192 = BlockIndex.from_pairs(BlockGrid(384, 384, 192), [(1, 0), (0, 1), (1, 1)])


@given(cases(), st.integers(0, 3))
@example((LARGE, 600, "contiguous", torch.float32, 0), 3)
@example((LARGE, 130, "sliced", torch.float16, 1), 1)
@example((OF_192, 513, "transposed", torch.float32, 2), 0)
@example((OF_192, 70, "contiguous", torch.float16, 3), 2)
@example((LARGE, 513, "transposed", torch.bfloat16, 4), 0)
@example((OF_192, 130, "sliced", torch.bfloat16, 5), 1)
@EVERY_TILE
def test_block_grad(case, config):
    index, n_tokens, layout, dtype, seed = case
    torch.manual_seed(seed)
    choose(config)
    grad_y = random(layout, n_tokens, index.grid.out_features, dtype)
    x = random("contiguous" if layout == "expanded" else layout, n_tokens, index.grid.in_features, dtype)
    actual = triton_blocks.block_grad_triton(grad_y, x, index.pairs, index.grid.block_size)
    close(actual, block_grad_reference(grad_y, x, index))


@given(cases(), st.integers(0, 3), st.booleans())
@example((LARGE, 130, "contiguous", torch.float32, 0), 3, False)
@example((OF_192, 70, "sliced", torch.float32, 1), 0, False)
@example((OF_192, 130, "contiguous", torch.float16, 2), 1, True)
@example((LARGE, 70, "transposed", torch.bfloat16, 3), 2, True)
@example((OF_192, 130, "sliced", torch.bfloat16, 4), 0, False)
@EVERY_TILE
def test_block_product(case, config, transpose):
    index, n_tokens, layout, dtype, seed = case
    n_tokens = min(n_tokens, 140)
    torch.manual_seed(seed)
    choose(config)
    grid = index.grid
    blocks = torch.randn(len(index), grid.block_size, grid.block_size, dtype=dtype)
    n_in, n_out = (grid.out_features, grid.in_features) if transpose else (grid.in_features, grid.out_features)
    x, y = random(layout, n_tokens, n_in, dtype), torch.randn(n_tokens, n_out, dtype=dtype)
    if transpose:
        expected = y + x.float() @ scatter_(torch.zeros(grid.out_features, grid.in_features), index, blocks)
    else:
        expected = y + block_product_reference(x.float(), blocks, index)
    triton_blocks.block_product_triton_(y, x, blocks, index.pairs, transpose)
    eps = torch.finfo(dtype).eps
    close(y, expected, rounding=eps if dtype == torch.bfloat16 else eps / 2)  # bf16 is cut off, not rounded


@pytest.mark.parametrize("n_blocks", [1, 9])
def test_a_layer_is_one_launch(n_blocks, monkeypatch):
    index = BlockIndex.from_pairs(BlockGrid(96, 96, 32), [divmod(place, 3) for place in range(n_blocks)])
    choose(0)
    grad_y, x, blocks = torch.randn(600, 96), torch.randn(600, 96), torch.randn(n_blocks, 32, 32)
    calls = {
        triton_blocks.tuned_block_grad: lambda: triton_blocks.block_grad_triton(grad_y, x, index.pairs, 32),
        triton_blocks.tuned_block_product: lambda: triton_blocks.block_product_triton_(grad_y, x, blocks, index.pairs),
    }
    for tuned, call in calls.items():
        call()  # tunes
        launches = []

        def run(*args, original=tuned.fn.run, launches=launches, **kwargs):
            launches.append(kwargs["grid"])
            return original(*args, **kwargs)

        monkeypatch.setattr(tuned.fn, "run", run)
        call()
        assert len(launches) == 1


def test_nothing_to_do():
    index = BlockIndex.from_pairs(BlockGrid(32, 48, 16), [(1, 2)])
    none = torch.zeros(0, 32), torch.zeros(0, 48)
    assert torch.equal(triton_blocks.block_grad_triton(*none, index.pairs, 16), torch.zeros(1, 16, 16))
    triton_blocks.block_product_triton_(*none, torch.zeros(1, 16, 16), index.pairs)
    y = torch.ones(4, 32)
    triton_blocks.block_product_triton_(y, torch.ones(4, 48), torch.zeros(0, 16, 16), ())
    assert torch.equal(y, torch.ones(4, 32))
    assert triton_blocks.block_grad_triton(y, torch.ones(4, 48), (), 16).shape == (0, 16, 16)


@pytest.mark.parametrize("triton", [triton_blocks, None])
def test_a_gpu_tensor_goes_to_triton_or_else_to_the_loop(triton, monkeypatch):
    """What the operators run for tensors on a GPU, called here on a CPU."""
    called = []

    def seen(module, name, run):
        monkeypatch.setattr(module, name, lambda *args: [called.append(name), run(*args)][1])

    for module in (dispatch, triton_blocks):
        for name in ("block_grad_loop", "block_product_loop_", "block_grad_triton", "block_product_triton_"):
            if hasattr(module, name):
                seen(module, name, getattr(module, name))
    monkeypatch.setattr(dispatch, "_triton_kernels_on", lambda device: triton)
    choose(0)
    index = BlockIndex.from_pairs(BlockGrid(32, 48, 16), [(1, 2), (0, 0), (1, 0)])
    rows, cols = zip(*index.pairs)
    grad_y, x, blocks = torch.randn(20, 32), torch.randn(20, 48), torch.randn(3, 16, 16)
    close(dispatch._block_grad_gpu(grad_y, x, rows, cols, 16), block_grad_reference(grad_y, x, index))
    y = torch.zeros(20, 32)
    dispatch._block_product_gpu(y, x, blocks, rows, cols, False)
    close(y, block_product_reference(x, blocks, index))
    expected = ["block_grad_triton", "block_product_triton_"] if triton else ["block_grad_loop", "block_product_loop_"]
    assert called == expected


def test_which_operands_triton_takes(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_kernels_on", lambda device: triton_blocks)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert dispatch._triton_kernels(torch.zeros(1, dtype=dtype), 48) is triton_blocks
        assert dispatch._triton_kernels(torch.zeros(1, dtype=dtype), 24) is None
    assert dispatch._triton_kernels(torch.zeros(1, dtype=torch.float64), 48) is None
