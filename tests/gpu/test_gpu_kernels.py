"""The block kernels on a real GPU: right, repeatable, and without making the host wait. Skipped where there is none."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import peft
import pytest
import torch
from torch import nn

from smtune import SMTConfig, block_grad
from smtune.blocks import BlockGrid, BlockIndex, scatter_
from smtune.kernels import block_grad_reference, block_product_, dispatch
from smtune.linear import additive_block_linear, block_linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
"""Of a sum, to the largest value: the contract for fp64 and fp32; matrix units cut a little off each 16-bit step."""


def random_index(block_size, n_rows=3, n_cols=4, n_blocks=7):
    grid = BlockGrid(n_rows * block_size, n_cols * block_size, block_size)
    places = torch.randperm(grid.n_blocks)[:n_blocks].tolist()
    return BlockIndex.from_pairs(grid, [divmod(place, n_cols) for place in places])


def operands(index, n_tokens, dtype, layout="contiguous"):
    """grad_y and x on the GPU."""

    def random(features):
        if layout == "sliced":
            return torch.randn(n_tokens, 2 * features, device="cuda").to(dtype)[:, ::2]
        if layout == "transposed":
            return torch.randn(features, n_tokens, device="cuda").to(dtype).T
        return torch.randn(n_tokens, features, device="cuda").to(dtype)

    return random(index.grid.out_features), random(index.grid.in_features)


def close(actual, exact, relative, rounding=0.0):
    torch.testing.assert_close(actual.double(), exact, rtol=rounding, atol=relative * exact.abs().max().item())


@contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_triton_is_what_runs():
    pytest.importorskip("triton")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the Triton kernels are for compute capability 8.0 and newer")
    assert dispatch._triton_kernels(torch.zeros(1, device="cuda"), 64) is not None


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
@pytest.mark.parametrize("n_tokens", [1, 63, 1000, 4100])
@pytest.mark.parametrize("block_size", [24, 32, 64, 96, 128, 192, 256])  # 24: the loop
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_block_grad(dtype, block_size, n_tokens, layout):
    index = random_index(block_size)
    grad_y, x = operands(index, n_tokens, dtype, layout)
    actual = block_grad(grad_y, x, index)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(actual, block_grad_reference(grad_y.double(), x.double(), index), RELATIVE[dtype])


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 63, 1000])
@pytest.mark.parametrize("block_size", [24, 32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_product(dtype, block_size, n_tokens, transpose):
    index = random_index(block_size)
    grad_y, x = operands(index, n_tokens, dtype)
    source, y = (grad_y, x) if transpose else (x, grad_y)
    blocks = torch.randn(len(index), block_size, block_size, device="cuda").to(dtype)
    dense = torch.zeros(index.grid.out_features, index.grid.in_features, dtype=torch.float64, device="cuda")
    dense = scatter_(dense, index, blocks)
    exact = y.double() + source.double() @ (dense if transpose else dense.T)
    eps = torch.finfo(dtype).eps
    # Triton rounds y once; the loop after each block that adds to a place, of which there are four at most.
    relative = RELATIVE[dtype] if block_size % 16 == 0 else 1e-5 + 4 * eps
    close(block_product_(y.clone(), source, blocks, index, transpose), exact, relative, rounding=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_equal_to_the_bit(dtype):
    index = random_index(128)
    grad_y, x = operands(index, 4100, dtype)
    blocks = torch.randn(len(index), 128, 128, device="cuda")
    first, second = (block_grad(grad_y, x, index) for _ in range(2))
    assert torch.equal(first, second)
    first, second = (block_product_(grad_y.clone(), x, blocks, index) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("operator", ["resident", "additive"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_does_not_wait_for_the_gpu(dtype, operator):
    index = random_index(64)
    grad_y, x = operands(index, 1000, dtype)
    weight = torch.randn(index.grid.out_features, index.grid.in_features, device="cuda").to(dtype)
    blocks = torch.randn(len(index), 64, 64, device="cuda", requires_grad=True)
    x.requires_grad_()

    def step():
        if operator == "resident":
            y = block_linear(x, weight, None, blocks, index)
        else:
            y = additive_block_linear(x @ weight.T, x, blocks, index)
        y.backward(grad_y)

    step()  # tunes, and copies the tables
    with no_synchronisation():
        step()


@pytest.mark.parametrize("active", [["default"], ["default", "other"]], ids=str)
@pytest.mark.parametrize("mode", ["resident", "additive"])
def test_a_layer_with_two_adapters_does_not_wait_for_the_gpu(mode, active):
    def config(seed):
        return SMTConfig(
            target_modules=["0"], block_size=16, budget=7, criterion="random", mode=mode, seed=seed, init_weights=False
        )

    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 96)), config(0)).to("cuda")
    model.add_adapter("other", config(1))
    model.base_model.set_adapter(active)
    x, grad_y = torch.randn(1000, 64, device="cuda"), torch.randn(1000, 96, device="cuda")
    model(x).backward(grad_y)  # tunes, and copies the tables
    with no_synchronisation():
        model(x).backward(grad_y)


def test_a_captured_graph_gives_the_same_bits():
    index = random_index(64)
    grad_y, x = operands(index, 1000, torch.bfloat16)
    expected = block_grad(grad_y, x, index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = block_grad(grad_y, x, index)
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("mode", ["resident", "additive"])
def test_training_equals_the_cpus(mode):
    """SGD, three steps in fp32: the blocks end where the CPU's end."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    data = torch.randn(3, 2, 50, 64)
    config = SMTConfig(target_modules=["0", "2"], block_size=16, budget=11, criterion="random", mode=mode)
    trained = {}
    for device in ("cpu", "cuda"):
        model = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).to(device)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for x in data.to(device):
            (model(x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained[device] = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    for name, expected in trained["cpu"].items():
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(trained["cuda"][name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_compiles_to_one_graph():
    index = random_index(64)
    grad_y, x = operands(index, 100, torch.float32)
    weight = torch.randn(index.grid.out_features, index.grid.in_features, device="cuda")
    blocks = torch.randn(len(index), 64, 64, device="cuda", requires_grad=True)
    compiled = torch.compile(
        lambda x, blocks: block_linear(x, weight, None, blocks, index), fullgraph=True, backend="aot_eager"
    )
    compiled(x, blocks).backward(grad_y)
    assert blocks.grad is not None
    close(blocks.grad, block_grad_reference(grad_y.double(), x.double(), index), RELATIVE[torch.float32])
