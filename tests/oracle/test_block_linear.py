"""The operators against dense autograd: random shapes, dtypes, strides and plans; gradcheck; counted cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.gradcheck import gradcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import smtune
from smtune.blocks import BlockGrid, BlockIndex, gather, scatter_
from smtune.kernels import block_grad, block_grad_reference
from smtune.kernels.loop import block_grad_loop, widens
from smtune.linear import additive_block_linear, block_linear, block_linear_reference, used_columns

RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""The contract: relative to the largest value of the block gradient."""


@st.composite
def cases(draw, dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)):
    """(x, weight, bias, index): any grid, any non-empty set of blocks in any order, strided x, 0-3 leading dims."""
    size = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    n_rows, n_cols = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    places = draw(
        st.one_of(
            st.just(list(range(n_rows * n_cols))),  # all blocks
            st.just([n_cols - 1 + row * n_cols for row in range(n_rows)]),  # one shared column
            st.lists(st.integers(0, n_rows * n_cols - 1), min_size=1, unique=True),
        )
    )
    grid = BlockGrid(n_rows * size, n_cols * size, size)
    index = BlockIndex.from_pairs(grid, [divmod(place, n_cols) for place in places])
    leading = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    layout = draw(st.sampled_from(["contiguous", "sliced", "transposed"]))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    if layout == "sliced":
        x = random(*leading, 2 * grid.in_features)[..., ::2]
    elif layout == "transposed":
        x = random(grid.in_features, *leading).movedim(0, -1)
    else:
        x = random(*leading, grid.in_features)
    weight = random(grid.out_features, grid.in_features)
    bias = random(grid.out_features) if draw(st.booleans()) else None
    return x, weight, bias, index


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = expected.abs().max().item() or 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=RELATIVE[dtype] * scale)


def close_block_grad(actual: Tensor, expected: Tensor, operands: torch.dtype) -> None:
    """The contract for a block gradient, in fp32, of operands of this dtype.

    16-bit operands accumulate in fp32 like the oracle's, so the fp32 bound holds for them too where they are widened.
    Where a CPU multiplies bf16 itself, the sum is rounded to bf16 once.
    """
    assert actual.dtype == expected.dtype
    if operands in RELATIVE or widens(operands, actual.device):
        close(actual, expected, actual.dtype)
        return
    rounding = torch.finfo(operands).eps / 2 * expected.abs()
    excess = (actual - expected).abs() - rounding - RELATIVE[torch.float32] * expected.abs().max()
    assert excess.max() <= 0


@given(cases())
@settings(max_examples=150)
def test_block_grad_equals_the_dense_gradient_at_the_blocks(case):
    x, weight, _, index = case
    grad_y = torch.randn(*x.shape[:-1], weight.shape[0], generator=torch.Generator().manual_seed(1)).to(x.dtype)
    expected = block_grad_reference(grad_y, x, index)
    assert expected.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    close_block_grad(block_grad(grad_y, x, index), expected, x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [64, 128, 256])
def test_block_grad_of_blocks_and_tokens_as_models_have_them(size, dtype):
    """What is chosen by size, and how sums over many tokens round, no small case tells."""
    grid = BlockGrid(2 * size, 3 * size, size)
    index = BlockIndex.from_pairs(grid, [(0, 0), (0, 2), (1, 2)])
    generator = torch.Generator().manual_seed(0)
    grad_y, x = (torch.randn(2, 1030, n, generator=generator).to(dtype) for n in (2 * size, 3 * size))
    close_block_grad(block_grad(grad_y, x, index), block_grad_reference(grad_y, x, index), dtype)


@given(cases(dtypes=(torch.bfloat16, torch.float16)))
@settings(max_examples=60)
def test_widened_block_grads_are_never_rounded_to_16_bits(case):
    x, weight, _, index = case
    x = x.flatten(0, -2)
    grad_y = torch.randn(len(x), weight.shape[0], generator=torch.Generator().manual_seed(1)).to(x.dtype)
    actual = block_grad_loop(grad_y, x, index.pairs, index.grid.block_size, "widened")
    close(actual, block_grad_reference(grad_y, x, index), torch.float32)


@given(cases(dtypes=(torch.float64, torch.float32)), st.booleans())
@settings(max_examples=150)
def test_block_linear_agrees_with_dense_autograd(case, x_needs_grad):
    x, weight, bias, index = case

    def run(operator):
        x_leaf = x.detach().requires_grad_(x_needs_grad)
        bias_leaf = bias.clone().requires_grad_() if bias is not None else None
        blocks = gather(weight, index).requires_grad_()
        y = operator(x_leaf, weight, bias_leaf, blocks, index)
        (y.sin() * torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        return y.detach(), blocks.grad, x_leaf.grad, bias_leaf.grad if bias_leaf is not None else None

    y, *grads = run(block_linear)
    y_reference, *references = run(block_linear_reference)
    torch.testing.assert_close(y, y_reference, rtol=0, atol=0)
    for grad, reference in zip(grads, references):
        assert (grad is None) == (reference is None)
        if grad is not None:
            close(grad, reference, x.dtype)


@given(cases(dtypes=(torch.bfloat16,)))
@settings(max_examples=60)
def test_bf16_gradients_are_one_rounding_from_an_fp32_accumulated_product(case):
    x, weight, bias, index = case
    blocks = gather(weight, index).requires_grad_()
    x = x.requires_grad_()
    y = block_linear(x, weight, bias, blocks, index)
    grad_y = torch.ones_like(y).cumsum(-1).clamp(max=7)
    y.backward(grad_y)
    assert y.dtype == torch.bfloat16
    assert blocks.grad is not None
    exact = block_grad_reference(grad_y, x.detach(), index)
    bound = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 1e-5 * exact.abs().max()
    assert ((blocks.grad.float() - exact).abs() <= bound).all()


@given(cases(dtypes=(torch.float64, torch.float32)))
@settings(max_examples=100)
def test_additive_agrees_with_a_dense_delta(case):
    x, weight, bias, index = case
    delta = torch.randn(len(index), *[index.grid.block_size] * 2, generator=torch.Generator().manual_seed(2))
    delta = delta.to(x.dtype)

    def run(additive: bool):
        x_leaf, blocks = x.detach().requires_grad_(), delta.clone().requires_grad_()
        if additive:
            y = additive_block_linear(F.linear(x_leaf, weight, bias), x_leaf, blocks, index)
        else:
            dense = torch.zeros_like(weight)
            rows, cols = index.rows, index.cols
            size = index.grid.block_size
            tiles = dense.unflatten(0, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 1, 3)
            tiles = tiles.index_put((rows, cols), blocks)
            y = F.linear(x_leaf, weight + tiles.permute(0, 2, 1, 3).reshape(weight.shape), bias)
        (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()).sum().backward()
        return y.detach(), x_leaf.grad, blocks.grad

    for actual, expected in zip(run(True), run(False)):
        close(actual, expected, x.dtype)


@pytest.mark.parametrize("pairs", [[(0, 1)], [(0, 0), (1, 2), (1, 0)], [(r, c) for r in range(2) for c in range(3)]])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(pairs, with_bias):
    grid = BlockGrid(4, 6, 2)
    index = BlockIndex.from_pairs(grid, pairs)
    weight = torch.randn(4, 6, dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True) if with_bias else None
    blocks = gather(weight, index).requires_grad_()

    def resident(x, blocks, bias=None):
        # The blocks stand in a copy of W, as in the tuner; written without autograd, so only the operator's own
        # gradient can be right.
        standing = scatter_(weight.clone(), index, blocks.detach())
        return block_linear(x, standing, bias, blocks, index)

    def additive(x, blocks, bias=None):
        return additive_block_linear(F.linear(x, weight, bias), x, blocks, index)

    inputs = (x, blocks) if bias is None else (x, blocks, bias)
    assert gradcheck(resident, inputs)
    assert gradcheck(additive, inputs)


def layer_case(dtype=torch.float32):
    """A layer whose every tensor has a size of its own: N = 96, O = 512, I = 640, l = 64, 5 blocks, 3 columns."""
    grid = BlockGrid(512, 640, 64)
    index = BlockIndex.from_pairs(grid, [(0, 1), (0, 7), (3, 1), (6, 1), (7, 4)])
    x = torch.randn(96, 640, dtype=dtype, requires_grad=True)
    weight = torch.randn(512, 640, dtype=dtype)
    return x, weight, gather(weight, index).requires_grad_(), index


def test_cost_of_a_layers_backward_counted():
    """FLOPs are dX + 2·m·l²·N and nothing of (O, I) is allocated: a dense gradient that is sliced cannot pass."""
    x, weight, blocks, index = layer_case()
    y = block_linear(x, weight, None, blocks, index)
    grad_y = torch.randn_like(y)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True, with_flops=True) as prof:
        y.backward(grad_y)
    flops = sum(event.flops for event in prof.events() if event.flops)
    expected = 2 * 96 * 512 * 640 + 2 * len(index) * 64**2 * 96
    assert flops == expected
    largest = max(event.self_cpu_memory_usage for event in prof.events())
    assert largest < 512 * 640 * 4
    assert largest == 96 * 640 * 4  # dX


def test_the_count_would_catch_a_dense_gradient():
    x, _, _, index = layer_case()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True, with_flops=True) as prof:
        block_grad_reference(torch.randn(96, 512), x.detach(), index)
    assert sum(event.flops for event in prof.events() if event.flops) == 2 * 96 * 512 * 640
    assert max(event.self_cpu_memory_usage for event in prof.events()) >= 512 * 640 * 4


def test_flop_counter_mode_sees_the_operator():
    x, weight, blocks, index = layer_case()
    with FlopCounterMode(display=False) as counter:
        block_linear(x, weight, None, blocks, index).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 96 * 512 * 640) + 2 * len(index) * 64**2 * 96


def test_cost_of_an_additive_layer_counted():
    """The frozen layer's two products and three of the blocks; no (O, I) tensor, neither D nor its gradient."""
    x, weight, blocks, index = layer_case()

    def step():
        additive_block_linear(F.linear(x, weight), x, blocks, index).sum().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == 2 * (2 * 96 * 512 * 640) + 3 * (2 * len(index) * 64**2 * 96)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    assert max(event.self_cpu_memory_usage for event in prof.events()) == 96 * 640 * 4  # dX


def test_x_without_gradient_costs_no_dx():
    x, weight, blocks, index = layer_case()
    y = block_linear(x.detach(), weight, None, blocks, index)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * len(index) * 64**2 * 96


def saved_tensors(function) -> list[Tensor]:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return saved


def test_saves_one_contiguous_copy_of_the_used_columns():
    x, weight, blocks, index = layer_case()
    saved = saved_tensors(lambda: block_linear(x, weight, None, blocks, index))
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in saved}
    assert weight.untyped_storage().data_ptr() in storages
    assert x.untyped_storage().data_ptr() not in storages
    (columns,) = [t for pointer, t in storages.items() if pointer != weight.untyped_storage().data_ptr()]
    assert columns.is_contiguous()
    assert columns.untyped_storage().nbytes() == 96 * 3 * 64 * 4
    expected = torch.cat([x[:, col * 64 : (col + 1) * 64] for col in (1, 4, 7)], dim=1)
    assert torch.equal(columns, expected)


def test_saves_x_itself_where_every_column_is_used():
    x, weight, _, _ = layer_case()
    index = BlockIndex.from_pairs(BlockGrid(512, 640, 64), [(col % 8, col) for col in range(10)])
    blocks = gather(weight, index).requires_grad_()
    saved = saved_tensors(lambda: block_linear(x, weight, None, blocks, index))
    assert {t.untyped_storage().data_ptr() for t in saved} == {
        x.untyped_storage().data_ptr(),
        weight.untyped_storage().data_ptr(),
    }


def test_saves_nothing_of_x_for_frozen_blocks():
    x, weight, blocks, index = layer_case()
    saved = saved_tensors(lambda: block_linear(x, weight, None, blocks.detach(), index))
    assert {t.untyped_storage().data_ptr() for t in saved} == {weight.untyped_storage().data_ptr()}


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast(autocast_dtype):
    x, weight, blocks, index = layer_case()
    with torch.autocast("cpu", dtype=autocast_dtype):
        y = block_linear(x, weight, None, blocks, index)
        reference = F.linear(x, weight)
    assert y.dtype == autocast_dtype
    assert torch.equal(y, reference)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    assert blocks.grad is not None
    assert blocks.grad.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    close_block_grad(blocks.grad, block_grad_reference(grad_y, x.detach().to(autocast_dtype), index), autocast_dtype)


class Born(TorchDispatchMode):
    """Shapes and dtypes of all tensors that operators return."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.seen.add((tuple(output.shape), output.dtype))
        return output


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("in_features", [640, 1600])
def test_autocast_makes_no_second_weight_in_the_backward(in_features, transposed, monkeypatch):
    monkeypatch.setattr("smtune.linear.CAST_COLUMNS", 256)  # of which neither is a multiple
    index = BlockIndex.from_pairs(BlockGrid(512, in_features, 64), [(0, 1), (3, 1), (7, 9)])
    x, weight = torch.randn(2, 5, in_features, requires_grad=True), torch.randn(512, in_features)
    blocks = gather(weight, index).requires_grad_()
    stored = weight.T.contiguous() if transposed else weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block_linear(x, stored, None, blocks, index, transposed=transposed)
    grad_y = torch.randn_like(y)
    with Born() as born:
        y.backward(grad_y)
    assert x.grad is not None
    by_parts = torch.empty(10, in_features, dtype=torch.bfloat16)
    for part, columns in zip(by_parts.split(256, dim=1), (stored.T if transposed else stored).split(256, dim=1)):
        torch.mm(grad_y.flatten(0, 1), columns.bfloat16(), out=part)
    assert torch.equal(x.grad.flatten(0, 1), by_parts.float())
    # Without AVX-512 the sums of part of the columns are in another order than those of all.
    torch.testing.assert_close(x.grad, (grad_y @ weight.bfloat16()).float(), rtol=2**-7, atol=2**-7)
    matrices = {shape for shape, dtype in born.seen if dtype == torch.bfloat16 and 512 in shape and len(shape) == 2}
    assert matrices - {(10, 512)} == {(512, 256), (512, in_features % 256)}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    x, weight, blocks, index = layer_case()
    block_linear(x, weight, None, blocks, index).square().sum().backward()
    expected = blocks.grad.clone(), x.grad.clone()
    blocks.grad = x.grad = None
    y = checkpoint(lambda x: block_linear(x, weight, None, blocks, index), x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    assert torch.equal(blocks.grad, expected[0])
    assert torch.equal(x.grad, expected[1])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_compiles_to_one_graph():
    x, weight, blocks, index = layer_case()
    block_linear(x, weight, None, blocks, index).square().sum().backward()
    expected = blocks.grad.clone()
    blocks.grad = None
    compiled = torch.compile(
        lambda x, blocks: block_linear(x, weight, None, blocks, index), fullgraph=True, backend="aot_eager"
    )
    compiled(x, blocks).square().sum().backward()
    close(blocks.grad, expected, torch.float32)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_output_may_be_changed_in_place(with_bias, is_compiled):
    """As models with activations in place do. With a bias the output is a view of a sum."""
    index = BlockIndex.from_pairs(BlockGrid(8, 8, 4), [(0, 1)])
    x, weight, blocks = torch.randn(2, 3, 8), torch.randn(8, 8), torch.randn(1, 4, 4, requires_grad=True)
    bias = torch.randn(8) if with_bias else None

    def rectified(x):
        return torch.relu_(block_linear(x, weight, bias, blocks, index))

    if is_compiled:
        rectified = torch.compile(rectified, backend="aot_eager", fullgraph=True)
    rectified(x).sum().backward()
    grad_y = (F.linear(x, weight, bias) > 0).float()
    torch.testing.assert_close(blocks.grad, block_grad_reference(grad_y, x, index))


@pytest.mark.parametrize(("y", "x"), [((3, 4), (3, 8)), ((3, 8), (3, 4))])
def test_additive_refuses_a_part_of_a_layer(y, x):
    index = BlockIndex.from_pairs(BlockGrid(8, 8, 4), [(1, 1)])
    with pytest.raises(smtune.InputError, match=r"x \(\.\.\., 8\) and y \(\.\.\., 8\).*tensor parallelism"):
        additive_block_linear(torch.zeros(y), torch.zeros(x), torch.zeros(1, 4, 4), index)


def test_inputs_without_leading_dims_and_without_tokens():
    x, weight, blocks, index = layer_case()
    bias = torch.zeros(512, requires_grad=True)
    for case in (x.detach()[0], x.detach()[:0]):
        blocks.grad = bias.grad = None
        block_linear(case, weight, bias, blocks, index).sum().backward()
        assert torch.allclose(blocks.grad, block_grad_reference(torch.ones(*case.shape[:-1], 512), case, index))
        assert bias.grad.sum() == (512 if case.dim() == 1 else 0)


def test_used_columns_is_a_copy_and_carries_no_gradient():
    x, _, _, index = layer_case()
    columns = used_columns(x, index)
    assert not columns.requires_grad
    assert columns.shape == (96, 3 * 64)


def test_block_grad_loop_takes_strided_gradients():
    x, _, _, index = layer_case()
    wide = torch.randn(96, 1024)
    grad_y = wide[:, ::2]
    close(
        block_grad_loop(grad_y, x.detach(), index.pairs, 64),
        block_grad_reference(grad_y, x.detach(), index),
        torch.float32,
    )


@pytest.mark.parametrize(
    ("grad_y", "x", "message"),
    [
        (torch.zeros(4, 8), torch.zeros(4, 640), r"Expected grad_y \(\.\.\., 512\)"),
        (torch.zeros(4, 512), torch.zeros(5, 640), "same leading dims"),
        (torch.zeros(4, 512), torch.zeros(4, 640, dtype=torch.float64), "dtype"),
    ],
)
def test_block_grad_refuses_operands_that_do_not_fit(grad_y, x, message):
    *_, index = layer_case()
    with pytest.raises(smtune.InputError, match=message):
        smtune.block_grad(grad_y, x, index)
