"""GPT-2's `Conv1D` stores its weight as (I, O). A layer with SMT on it is the `nn.Linear` of the transposed weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from smtune.blocks import BlockGrid, BlockIndex
from smtune.tuner import SMTLinear

N, I, O, SIZE = 24, 16, 24, 4  # noqa: E741
PAIRS = [(0, 0), (5, 3), (2, 1), (5, 0)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}
MODES = pytest.mark.parametrize("mode", ["resident", "additive"])


def twins(mode, dtype):
    """(the layer on a Conv1D, the same on an nn.Linear), with one adapter of equal deltas."""
    convolution = Conv1D(O, I).to(dtype)
    nn.init.normal_(convolution.weight)
    nn.init.normal_(convolution.bias)
    linear = nn.Linear(I, O, dtype=dtype)
    linear.weight.data.copy_(convolution.weight.data.T)
    linear.bias.data.copy_(convolution.bias.data)
    index = BlockIndex.from_pairs(BlockGrid(O, I, SIZE), PAIRS)
    layers = []
    for base in (convolution, linear):
        layer = SMTLinear(base.requires_grad_(False), mode, "layer")
        layer.update_layer("default", index)
        layer.set_adapter("default")
        layers.append(layer)
    deltas = 0.1 * torch.randn_like(layers[0].smt_blocks["default"].weight)
    for layer in layers:
        layer.smt_blocks["default"].weight.data.copy_(deltas)
    return layers


def forward_backward(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    gradient = layer.smt_blocks["default"].weight.grad.clone()
    layer.zero_grad()
    return y.detach(), x.grad, gradient


@MODES
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("leading", [(N,), (4, 6), (2, 3, 4)], ids=str)
def test_outputs_and_gradients_are_the_linear_layers(mode, dtype, leading):
    x = torch.randn(*leading, I, dtype=dtype)
    ours, expected = (forward_backward(layer, x) for layer in twins(mode, dtype))
    for value, reference in zip(ours, expected):
        scale = reference.abs().max().item()
        torch.testing.assert_close(value, reference, rtol=0, atol=TOLERANCE[dtype] * scale)


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_deltas_it_is_the_convolution_to_the_bit(mode, dtype):
    layer, _ = twins(mode, dtype)
    layer.smt_blocks["default"].weight.data.zero_()
    x = torch.randn(4, 6, I, dtype=dtype)
    assert torch.equal(layer(x), layer.base_layer(x))


@MODES
def test_merging_changes_the_planned_blocks_and_gives_them_back(mode):
    layer, on_linear = twins(mode, torch.float32)
    base = layer.base_layer.weight.clone()
    x = torch.randn(4, 6, I)
    tuned = layer(x)
    with torch.no_grad():
        layer.merge()
        on_linear.merge()
    assert torch.equal(layer.base_layer.weight, on_linear.base_layer.weight.T)
    torch.testing.assert_close(layer.base_layer.weight - base, layer.get_delta_weight("default"))
    moved = (layer.base_layer.weight != base).T.unflatten(1, (-1, SIZE)).unflatten(0, (-1, SIZE)).any(3).any(1)
    assert {(row, col) for row, col in moved.nonzero().tolist()} == set(PAIRS)
    if mode == "resident":
        assert torch.equal(layer.base_layer(x), tuned)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, base)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
@MODES
def test_the_layer_compiles_in_one_graph(mode):
    layer, _ = twins(mode, torch.float32)
    x = torch.randn(4, 6, I)
    expected = forward_backward(layer, x)
    ours = forward_backward(torch.compile(layer, backend="aot_eager", fullgraph=True), x)
    for value, reference in zip(ours, expected):
        torch.testing.assert_close(value, reference)


def test_the_parameter_itself_is_saved_for_the_backward():
    layer, _ = twins("resident", torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(N, I, requires_grad=True))
    assert any(tensor is layer.base_layer.weight for tensor in saved)


def test_two_adapters_switch_and_the_base_comes_back():
    layer, _ = twins("resident", torch.float32)
    base = layer.base_layer.weight.clone()
    layer.update_layer("second", BlockIndex.from_pairs(BlockGrid(O, I, SIZE), [(2, 1), (3, 3)]))
    layer.smt_blocks["second"].weight.data.normal_()
    x = torch.randn(4, 6, I)
    for active in (["default"], ["second"], ["default", "second"]):
        layer.set_adapter(active)
        change = sum(layer.get_delta_weight(name) for name in active)
        torch.testing.assert_close(
            layer(x), torch.addmm(layer.base_layer.bias, x.flatten(0, 1), base + change).view(4, 6, O)
        )
        assert not torch.equal(layer.base_layer.weight, base)
        assert torch.equal(layer.state_dict()["base_layer.weight"], base)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.equal(layer.base_layer.weight, base)


def test_under_autocast_it_is_the_linear_layer():
    layer, on_linear = twins("resident", torch.float32)
    x = torch.randn(4, 6, I)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, expected = forward_backward(layer, x), forward_backward(on_linear, x)
    assert ours[0].dtype == torch.bfloat16
    for value, reference in zip(ours, expected):
        torch.testing.assert_close(value, reference, rtol=2**-7, atol=2**-7)
