"""What is saved for the backward: the union of the columns that q, k and v read, once, by storage, and nothing else."""

from __future__ import annotations

import copy
import gc
import pickle

import peft
import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import smtune
from smtune.bench.measure import memory_changes
from smtune.selection import ModulePlan, Plan
from smtune.tuner.layer import SMTLinear

N_TOKENS = 2 * 16
SIZE = 8


def config(model, mode="auto", blocks=40, **changes):
    changes = {"target_modules": ["q_proj", "k_proj", "v_proj"], "criterion": "random"} | changes
    return smtune.SMTConfig(block_size=SIZE, budget=blocks, mode=mode, init_weights=False, **changes)


def batch():
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def saved_bytes(model, forward):
    """Bytes of the distinct storages handed to the backward, parameters and buffers apart; and the forward's output."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    return sum(storage.nbytes() for storage in held.values()), output


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def floor_bytes(base, names=QKV):
    """What a frozen model saves whose backward ends where that of blocks in the lowest of these layers does."""
    model = copy.deepcopy(base).requires_grad_(False)
    for name in names:
        layer = model.model.layers[0].get_submodule(name)
        layer.register_forward_hook(lambda module, args, y: y.requires_grad_())
    return saved_bytes(model, lambda: model(**batch()).loss)[0]


def attentions(model):
    return [module for module in model.modules() if hasattr(module, "q_proj")]


def smt_layers(model):
    return [module for module in model.modules() if isinstance(module, SMTLinear)]


def union(parent):
    """The block columns that the adapted layers of an attention or an MLP read."""
    indices = [layer.learning() for layer in parent.children() if isinstance(layer, SMTLinear)]
    return {col for index in indices if index is not None for _, col in index.pairs}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, rtol=0.0, atol=0.0):
    """The same gradients by name, of which there are some; by default to the bit."""
    assert expected
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def alone(model):
    """The same model whose layers share nothing."""
    model = copy.deepcopy(model)
    for layer in smt_layers(model):
        layer._shared = None
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["resident", "additive"])
@pytest.mark.parametrize("blocks", [2, 12, 40])
def test_saved_bytes_are_the_contract_exactly(tiny_llama, mode, dtype, blocks):
    base = tiny_llama.to(dtype)
    # Blocks in every layer, so that both backwards end at the lowest one.
    pairs = [(k % 4, (3 * k) % 8) for k in range(blocks // 2)][:16]
    modules = {}
    for layer in range(2):
        for k, projection in enumerate(("q_proj", "k_proj", "v_proj")):
            chosen = sorted(set(pairs[k::3]))
            name = f"model.layers.{layer}.self_attn.{projection}"
            shape = tuple(base.get_submodule(name).weight.shape)
            modules[name] = ModulePlan(shape, tuple(r for r, _ in chosen), tuple(c for _, c in chosen))
    plan = Plan(modules, SIZE, "by hand", "by hand", blocks, 1)
    model = peft.get_peft_model(copy.deepcopy(base), config(base, mode).with_plan(plan))
    actual, _ = saved_bytes(model, lambda: model(**batch()).loss)
    expected = sum(N_TOKENS * len(union(attention)) * SIZE * dtype.itemsize for attention in attentions(model))
    assert expected > 0
    assert actual - floor_bytes(base) == expected


@pytest.mark.parametrize("mode", ["resident", "additive"])
def test_saved_bytes_and_gathers_under_autocast(tiny_llama, mode):
    """q, k and v each cast x, and still keep one copy of its columns. The resident mode keeps no cast of W either."""
    model = peft.get_peft_model(copy.deepcopy(tiny_llama), config(tiny_llama, mode, blocks=20)).train()
    with torch.autocast("cpu", torch.bfloat16):
        actual, _ = saved_bytes(model, lambda: model(**batch()).loss)
        floor = floor_bytes(tiny_llama)
        assert n_gathers(model, lambda: model(**batch()).loss.backward()) == 2
    columns = sum(N_TOKENS * len(union(attention)) * SIZE * 2 for attention in attentions(model))
    above_lowest = tiny_llama.model.layers[1].self_attn  # the lowest one's dX is not computed
    casts = sum(2 * above_lowest.get_submodule(name.split(".")[1]).weight.numel() for name in QKV)
    assert min(columns, casts) > 0
    assert actual - floor == columns - (casts if mode == "resident" else 0)


def test_every_column_saves_x_itself_once(tiny_llama):
    model = peft.get_peft_model(copy.deepcopy(tiny_llama), config(tiny_llama, blocks=1000))
    actual, _ = saved_bytes(model, lambda: model(**batch()).loss)
    assert actual - floor_bytes(tiny_llama) == 2 * N_TOKENS * 64 * 4


@pytest.mark.parametrize("blocks", [12, 40])
def test_gate_and_up_share_too(tiny_llama, blocks):
    targets = {"target_modules": ["gate_proj", "up_proj"]}
    model = peft.get_peft_model(copy.deepcopy(tiny_llama), config(tiny_llama, blocks=blocks, **targets))
    mlps = [layer.mlp for layer in model.base_model.model.model.layers]
    for mlp in mlps:
        assert mlp.gate_proj._shared is mlp.up_proj._shared is not None
    actual, _ = saved_bytes(model, lambda: model(**batch()).loss)
    expected = sum(N_TOKENS * len(union(mlp)) * SIZE * torch.float32.itemsize for mlp in mlps)
    assert expected > 0
    assert actual - floor_bytes(tiny_llama, ("mlp.gate_proj", "mlp.up_proj")) == expected


@pytest.mark.parametrize("mode", ["resident", "additive"])
@pytest.mark.parametrize("how", ["plain", "reentrant", "non-reentrant", "offload", "autocast"])
def test_gradients_are_those_of_layers_that_share_nothing(tiny_llama, how, mode):
    model = peft.get_peft_model(tiny_llama, config(tiny_llama, mode))
    other = alone(model)
    for each in (model, other):
        each.train()
        if "reentrant" in how:
            each.base_model.model.activation_checkpointing_enable({"use_reentrant": how == "reentrant"})
            each.enable_input_require_grads()
        if how == "offload":
            with save_on_cpu():
                each(**batch()).loss.backward()
        elif how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                each(**batch()).loss.backward()
        else:
            each(**batch()).loss.backward()
    assert_same(gradients(model), gradients(other))


def n_gathers(model, forward_and_backward):
    """How often columns of x were copied."""
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.index_select.default:
                calls.append(func)
            return func(*args, **(kwargs or {}))

    with Count():
        forward_and_backward()
    return len(calls)


def test_one_gather_for_an_attention_also_when_recomputed(tiny_llama):
    model = peft.get_peft_model(tiny_llama, config(tiny_llama, blocks=20)).train()
    assert all(len(union(attention)) < 8 for attention in attentions(model))
    assert n_gathers(model, lambda: model(**batch()).loss.backward()) == 2
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    assert n_gathers(model, lambda: model(**batch()).loss.backward()) == 2 * 2
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    assert n_gathers(model, lambda: model(**batch()).loss.backward()) == 2  # none in the gradient-free forward


@pytest.mark.parametrize("mode", ["resident", "additive"])
@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_nothing_survives_a_step(tiny_llama, mode, use_reentrant):
    model = peft.get_peft_model(tiny_llama, config(tiny_llama, mode)).train()
    if use_reentrant is not None:
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()

    def step():
        model(**batch()).loss.backward()

    def alive():
        gc.collect()
        return {id(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)}

    step()
    before = alive()
    step()
    assert alive() - before == set()
    assert sum(memory_changes(step)) == 0  # what autograd holds is no Python object
    loss = model(**batch()).loss  # a forward without its backward
    assert all(layer._shared._held is None for layer in smt_layers(model))
    del loss
    assert alive() - before == set()


class Attention(nn.Module):
    """q reads `x`, k and v read `memory`; `skips` leaves v out; `changes` alters x in place after q."""

    def __init__(self, skips=False, changes=False):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, 64) for _ in range(3))
        self.skips, self.changes = skips, changes

    def forward(self, x, memory):
        y = self.q_proj(x)
        if self.changes:
            memory.mul_(2)
        y = y + self.k_proj(memory)
        return y if self.skips else y + self.v_proj(memory)


@pytest.mark.parametrize("case", ["cross", "skips", "changes"])
def test_layers_that_do_not_share_after_all(case):
    attention = Attention(skips=case == "skips", changes=case == "changes")
    model = nn.Sequential()
    model.add_module("attention", attention)
    setting = config(model, blocks=9, target_modules=["q_proj", "k_proj", "v_proj"])
    tuned = peft.get_peft_model(model, setting).base_model.model.attention
    other = alone(tuned)
    x, memory = torch.randn(5, 64), torch.randn(5, 64)
    for each in (tuned, other):
        inputs = (x, memory) if case == "cross" else (x.clone(),) * 2
        each(*inputs).sum().backward()
    del inputs
    assert_same(gradients(tuned), gradients(other))
    shared = tuned.q_proj._shared
    assert shared is not None
    gc.collect()
    assert shared._held is None  # where v never came for it, it went with x; memory is here still


def test_a_frozen_sibling_needs_no_columns(tiny_llama):
    model = peft.get_peft_model(tiny_llama, config(tiny_llama, blocks=20))
    attention = attentions(model)[0]
    attention.v_proj.smt_blocks["default"].requires_grad_(False)
    kept = attention.q_proj._shared.columns().cols
    reads = {col for layer in (attention.q_proj, attention.k_proj) for _, col in layer.learning().pairs}
    assert set(kept) == reads


@pytest.mark.parametrize("mode", ["resident", "additive"])
def test_a_frozen_adapter_beside_one_that_learns_costs_nothing(tiny_llama, mode):
    model = peft.get_peft_model(tiny_llama, config(tiny_llama, mode, blocks=20, seed=1))
    model.add_adapter("other", config(tiny_llama, mode, blocks=20, seed=2))
    model.base_model.set_adapter(["default", "other"])
    loss = model(**batch()).loss
    loss.backward()
    expected = {name: gradient for name, gradient in gradients(model).items() if ".other." in name}
    model.zero_grad()
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.requires_grad_(False)

    learns = {layer: layer.smt_blocks["other"].places for layer in smt_layers(model) if "other" in layer.smt_blocks}
    with FlopCounterMode(display=False) as counter:
        again = model(**batch()).loss
        again.backward()
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0.0)
    assert_same(gradients(model), expected, rtol=1e-5, atol=1e-7)
    n_blocks = sum(map(len, learns.values()))
    assert n_blocks < sum(len(layer._union) for layer in smt_layers(model))
    assert counter.get_flop_counts()["Global"][torch.ops.smtune.block_grad] == 2 * N_TOKENS * n_blocks * SIZE**2
    for attention in attentions(model):
        reads = {col for layer in attention.children() for _, col in getattr(learns.get(layer), "pairs", ())}
        assert set(next(layer for layer in attention.children() if layer in learns)._shared.columns().cols) == reads


def test_columns_follow_the_active_adapter(tiny_llama):
    model = peft.get_peft_model(tiny_llama, config(tiny_llama, blocks=20, seed=1))
    model.add_adapter("other", config(tiny_llama, blocks=20, seed=2))
    shared = attentions(model)[0].q_proj._shared
    first = shared.columns().cols
    model.set_adapter("other")
    assert shared.columns().cols == tuple(sorted(union(attentions(model)[0])))
    model.set_adapter("default")
    assert shared.columns().cols == first
    model.base_model.set_adapter(["default", "other"])
    assert set(shared.columns().cols) >= set(first)
    model(**batch()).loss.backward()


def test_copies_and_pickles_share_among_themselves(tiny_llama):
    model = peft.get_peft_model(tiny_llama, config(tiny_llama, blocks=20))
    model(**batch()).loss.backward()
    expected = gradients(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layers = smt_layers(twin)
        assert all(any(each is layer for layer in layers) for each in layers[0]._shared.layers)
        twin.zero_grad()
        twin(**batch()).loss.backward()
        assert_same(gradients(twin), expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
@pytest.mark.filterwarnings("ignore:.*dynamo_pgo.*:UserWarning")
def test_compiled_gathers_are_merged(tiny_llama):
    model = peft.get_peft_model(tiny_llama, config(tiny_llama, blocks=20)).train()
    attention = attentions(model)[0]
    graphs = []

    def capture(graph, example_inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def project(x):
        return attention.q_proj(x).sum() + attention.k_proj(x).sum() + attention.v_proj(x).sum()

    backend = aot_autograd(fw_compiler=capture, bw_compiler=capture, partition_fn=min_cut_rematerialization_partition)
    x = torch.randn(2, 16, 64)
    torch.compile(project, backend=backend, fullgraph=True)(x).backward()
    gathers = [node for graph in graphs for node in graph.graph.nodes if "index_select" in str(node.target)]
    assert len(gathers) == 1
    compiled = gradients(model)
    model.zero_grad()
    project(x).backward()
    assert_same(compiled, gradients(model), rtol=1.3e-6, atol=1e-5)


def test_checkpoint_by_hand(tiny_llama):
    """A plain checkpoint around an attention's projections, x kept alive outside."""
    model = peft.get_peft_model(tiny_llama, config(tiny_llama, blocks=20)).train()
    attention = attentions(model)[0]
    x = torch.randn(2, 16, 64, requires_grad=True)

    def project(x):
        return attention.q_proj(x).sum() + attention.k_proj(x).sum() + attention.v_proj(x).sum()

    project(x).backward()
    expected, expected_x = gradients(model), x.grad.clone()
    for use_reentrant in (False, True):
        model.zero_grad()
        x.grad = None
        checkpoint(project, x, use_reentrant=use_reentrant).backward()
        assert torch.equal(x.grad, expected_x)
        assert_same(gradients(model), expected)
        assert attention.q_proj._shared._held is None
