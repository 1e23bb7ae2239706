"""`torch.compile`, activation checkpointing and autocast: the same training as without, and one graph.

`fullgraph=True` throughout, and a recompilation is an error. What "outside" and "inside" mean: the step is compiled,
checkpoints and all; or what runs inside a checkpoint is. Checkpointing lets the embeddings' output require a gradient,
which torch refuses to compile: call `disable_input_require_grads()` on the base model before compiling the whole step.
"""

from __future__ import annotations

import peft
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from transformers import LlamaConfig, LlamaForCausalLM

from smtune import SMTConfig
from smtune.blocks import gather
from smtune.tuner import SMTLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo's own doing
    pytest.mark.filterwarnings("ignore:.*dynamo_pgo.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # dynamo too
]
MODES = ["resident", "additive"]
each_mode = pytest.mark.parametrize("mode", MODES)
each_kind = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def support(row, column="{mode}", against="the eager step: 3 losses, final blocks"):
    return pytest.mark.support("Compile and checkpointing", row=row, column=column, against=against)


def make(mode, layers=1, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=128, pad_token_id=0)).train()
    setting = {"block_size": 8, "budget": 6 * layers, "criterion": "random", "mode": mode} | changes
    return peft.get_peft_model(base, SMTConfig(**setting))


def checkpointed(model, reentrant):
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    return model


def step_of(model, autocast=False):
    def step(ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    return step


def train(model, step, lengths=(12, 12, 12)):
    """Losses, then the blocks."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    losses = []
    for length in lengths:
        loss = step((torch.arange(2 * length) * 7 % 128).view(2, length))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [torch.stack(losses), *(p.detach() for p in trained)]


def same(actual, expected, rtol=1e-5, atol=1e-6):
    assert len(actual) == len(expected) > 1
    assert expected[0][-1] < expected[0][0] - 0.01
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


class Graphs:
    """A backend that keeps the graphs it is given, forward and backward, and runs them as they are."""

    def __init__(self):
        self.kept = []

    def __call__(self, graph, inputs):
        def keep(inner, example_inputs):
            self.kept.append(inner.graph)
            return make_boxed_func(inner.forward)

        return aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)(
            graph, inputs
        )

    def count(self, name):
        return sum(name in str(node.target) for graph in self.kept for node in graph.nodes)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def n_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# Compiled --------------------------------------------------------------------------------------------------------


@support("torch.compile, one length")
@each_mode
def test_a_step_is_one_graph_with_one_gather(mode):
    model, graphs = make(mode), Graphs()
    assert not any(m.learning().columns.is_all for m in model.modules() if isinstance(m, SMTLinear))
    step = torch.compile(step_of(model), backend=graphs, fullgraph=True, dynamic=False)
    twin = make(mode)
    same(train(model, step), train(twin, step_of(twin)))
    assert n_graphs() == 1
    assert len(graphs.kept) == 2  # its forward and its backward
    assert graphs.count("index_select") == 1  # of the columns that q, k and v read; kept for the backward
    assert graphs.count("smtune.block_grad") == sum(isinstance(module, SMTLinear) for module in model.modules())


@support("torch.compile, one length, Inductor", against="the eager step: 3 losses, final blocks, to 1e-3")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own imports
@pytest.mark.nightly
@each_mode
def test_inductor(mode):
    model, twin = make(mode), make(mode)
    step = torch.compile(step_of(model), fullgraph=True, dynamic=False)
    same(train(model, step), train(twin, step_of(twin)), rtol=1e-3, atol=1e-3)
    assert n_graphs() == 1


@support("torch.compile, changing lengths")
@pytest.mark.nightly
@each_mode
def test_changing_lengths_share_a_graph(mode):
    model, twin, lengths = make(mode), make(mode), (12, 16, 20, 12)
    step = torch.compile(step_of(model), backend="aot_eager", fullgraph=True, dynamic=True)
    same(train(model, step, lengths), train(twin, step_of(twin), lengths))
    assert n_graphs() == 1


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["resident"])
def test_a_compiled_model_is_saved_merged_and_switched_as_any_other(mode):
    """No record of what stands in W is needed to give the base back."""
    model, twin = make(mode), make(mode)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "smt_blocks" not in name}
    step = torch.compile(step_of(model), backend="aot_eager", fullgraph=True, dynamic=False)
    train(model, step)
    train(twin, step_of(twin))
    for tuned in (model, twin):
        saved = tuned.state_dict()
        for name, weight in base.items():
            assert torch.equal(saved[name], weight), name
    step(torch.arange(24).view(2, 12))  # the blocks stand again, and nobody has noted it
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in base.items())
    merged, expected = (dict(m.merge_and_unload().named_parameters()) for m in (model, twin))
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name])


@each_mode
def test_a_step_beside_a_frozen_adapter_is_one_graph(mode):
    model = make(mode, init_weights=False)
    model.add_adapter("other", SMTConfig(block_size=8, budget=6, criterion="random", seed=1, mode=mode))
    model.base_model.set_adapter(["default", "other"])
    model.base_model.set_requires_grad("default", False)
    ids = torch.arange(24).view(2, 12)
    step = torch.compile(step_of(model), backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(step(ids), step_of(model)(ids))


@pytest.mark.nightly
def test_another_adapter_between_a_compiled_forward_and_its_backward():
    model = make("resident", init_weights=False)
    model.add_adapter(
        "other", SMTConfig(block_size=8, budget=6, criterion="random", seed=1, mode="resident", init_weights=False)
    )
    model.set_adapter("default")
    ids = torch.arange(24).view(2, 12)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(step_of(model)(ids), trained)
    step = torch.compile(step_of(model), backend="aot_eager", fullgraph=True, dynamic=False)
    loss = step(ids)
    model.set_adapter("other")
    step_of(model)(ids)
    model.set_adapter("default")
    for actual, gradient in zip(torch.autograd.grad(loss, trained), expected):
        torch.testing.assert_close(actual, gradient)


# Checkpointed ----------------------------------------------------------------------------------------------------


@support("activation checkpointing, {reentrant}", against="the step without: 3 losses, final blocks, bit for bit")
@each_kind
@each_mode
def test_checkpointing(mode, reentrant):
    model, twin = checkpointed(make(mode, layers=2), reentrant), make(mode, layers=2)
    same(train(model, step_of(model)), train(twin, step_of(twin)), rtol=0, atol=0)


@support("torch.compile outside of checkpointing, {reentrant}")
@pytest.mark.nightly
@each_kind
@each_mode
def test_compiled_outside(mode, reentrant):
    model, twin = checkpointed(make(mode), reentrant), make(mode)
    model.base_model.model.disable_input_require_grads()
    step = torch.compile(step_of(model), backend="aot_eager", fullgraph=True, dynamic=False)
    same(train(model, step), train(twin, step_of(twin)))
    assert n_graphs() == 1


@support("torch.compile of each {part}, checkpointing {reentrant}")
@pytest.mark.nightly
@pytest.mark.parametrize("part", ["layer", "attention"])
@each_kind
@each_mode
def test_compiled_inside(mode, reentrant, part):
    """The layer does its checkpointing itself, so that is inside of it; the attention is inside of the checkpoint."""
    model, twin = checkpointed(make(mode), reentrant), make(mode)
    for layer in model.base_model.model.model.layers:
        compiled = layer if part == "layer" else layer.self_attn
        compiled.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    runs_twice = reentrant and part == "attention"  # first without gradients
    with torch._dynamo.config.patch(error_on_recompile=not runs_twice):
        same(train(model, step_of(model)), train(twin, step_of(twin)))
    assert n_graphs() == 1 + runs_twice


# Autocast --------------------------------------------------------------------------------------------------------


@support("autocast, bf16", against="dense gradients under autocast, at the blocks")
@each_mode
def test_autocast(mode):
    model, twin = make(mode), make(mode).unload()
    ids = torch.arange(24).view(2, 12)
    step_of(model, autocast=True)(ids).backward()
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, SMTLinear)}
    dense = {name: twin.get_submodule(name).weight.requires_grad_() for name in layers}
    gradients = torch.autograd.grad(step_of(twin, autocast=True)(ids), list(dense.values()))
    for layer, gradient in zip(layers.values(), gradients):
        blocks = layer.smt_blocks["default"]
        expected = gather(gradient, blocks.places)
        assert blocks.weight.grad.dtype == torch.float32
        # Dense autograd rounds its gradient to bf16, ours is summed in fp32.
        torch.testing.assert_close(blocks.weight.grad, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@support("torch.compile under autocast, bf16", against="the eager step under autocast: gradients to bf16")
@pytest.mark.nightly
@each_mode
def test_compiled_autocast(mode):
    model, twin = make(mode), make(mode)
    ids = torch.arange(24).view(2, 12)
    step = torch.compile(step_of(model, autocast=True), backend="aot_eager", fullgraph=True, dynamic=False)
    for each in (step, step_of(twin, autocast=True)):
        each(ids).backward()
    assert n_graphs() == 1
    for actual, expected in zip(model.parameters(), twin.parameters()):
        if expected.requires_grad:
            scale = expected.grad.abs().max().item()
            torch.testing.assert_close(actual.grad, expected.grad, rtol=0.02, atol=0.02 * scale)
