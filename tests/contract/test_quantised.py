"""Blocks beside a quantised weight: planned, trained, saved and merged as beside the same weight kept dense.

The twin is a plain model that holds the dequantised weights, scored and trained by ordinary autograd.
"""

from __future__ import annotations

import copy
import gc

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import smtune
from needs import lacks
from smtune import InputError, SMTConfig
from smtune.blocks import tile
from smtune.scoring import Scores
from smtune.tuner import SMTLinear
from smtune.tuner.quantised import check_backward, dense_weight, is_quantised
from smtune.tuner.targets import count_parameters

if lacks("bitsandbytes") or lacks("torchao"):
    pytest.skip("needs bitsandbytes and torchao: pip install -e '.[quant]'", allow_module_level=True)

from torchao import quantization as torchao

SIZE = 32
IDS = torch.arange(4 * 16).view(4, 16) % 128
BATCH = {"input_ids": IDS, "labels": IDS}
BATCHES = [BATCH, {"input_ids": IDS.flip(1), "labels": IDS.flip(1)}]
CONFIG = SMTConfig(block_size=SIZE, budget=10, policy="global")  # gradients that stand out of the noise of 16 bits


def four_bits(quant_type, double=False, **options):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
        **options,
    )


KINDS = {
    "bitsandbytes nf4": four_bits("nf4"),
    "bitsandbytes nf4, double": four_bits("nf4", double=True),
    "bitsandbytes fp4": four_bits("fp4"),
    "bitsandbytes int8": BitsAndBytesConfig(load_in_8bit=True),
    "torchao Int8WeightOnly": TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao Float8WeightOnly": TorchAoConfig(torchao.Float8WeightOnlyConfig()),
    "torchao IntxWeightOnly int4": TorchAoConfig(
        torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32))
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def support(column, against):
    return pytest.mark.support("Quantised bases", row="{kind}", column=column, against=against)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128, pad_token_id=0))
    path = tmp_path_factory.mktemp("base")
    model.save_pretrained(path)
    return path


def load(folder, kind=None, dtype=torch.float32):
    configuration = None if kind is None else copy.deepcopy(KINDS[kind])
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=configuration, dtype=dtype)


def dense_twin(folder, kind, dtype=torch.float32):
    """A plain Llama whose weights are the dequantised ones."""
    quantised, twin = load(folder, kind, dtype), load(folder, dtype=dtype)
    for name, layer in quantised.named_modules():
        if is_quantised(layer):
            twin.get_submodule(name).weight.data.copy_(dense_weight(layer))
    return twin.requires_grad_(False)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def losses_of(model):
    """In train mode, since an evaluation may change a base of bitsandbytes."""
    with torch.no_grad():
        return [model.train()(**batch).loss.item() for batch in BATCHES]


def smt_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SMTLinear)}


def train(model, steps=3, evaluate=False, lr=1e-2):
    """Losses, and the gradients of the first step by parameter name."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0)
    losses, first = [], {}
    for _ in range(steps):
        if evaluate:
            logits(model)
        loss = model.train()(**BATCH).loss
        loss.backward()
        losses.append(loss.item())
        first = first or {name: p.grad.clone() for name, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses), first


def tuned(folder, kind):
    model = smtune.get_smt_model(load(folder, kind), CONFIG, BATCHES)
    train(model)
    return model


def scores_of(model, criterion, on_batch=None):
    config = SMTConfig(block_size=SIZE, budget=10, criterion=criterion)
    return smtune.score_blocks(model, BATCHES, config, progress=on_batch)


def live_matrices():
    """How many floating tensors of a target's shape there are that were made since `gc.freeze`."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum(type(t) is torch.Tensor and t.is_floating_point() and tuple(t.shape) == (128, 128) for t in found)


@support("plan", "scores of the dequantised weights' dense gradients")
@each_kind
def test_plan(folder, kind):
    model, twin = load(folder, kind), dense_twin(folder, kind)
    modules = [name for name, _ in twin.named_modules() if name.endswith(("q_proj", "k_proj", "v_proj"))]
    total = {}
    for batch in BATCHES:
        weights = {name: twin.get_submodule(name).weight.requires_grad_() for name in modules}
        gradients = torch.autograd.grad(twin.train()(**batch).loss, list(weights.values()))
        for name, gradient in zip(modules, gradients):
            total[name] = total.get(name, 0) + gradient
    expected = {
        "abs_of_sum": {name: tile(total[name].abs(), SIZE).mean((-1, -2)) for name in modules},
        "net": {name: tile(total[name], SIZE).mean((-1, -2)).abs() for name in modules},
    }
    before, kept = losses_of(model), {}
    gc.freeze()
    for criterion, scores in expected.items():
        alive = kept[criterion] = []
        actual = scores_of(model, criterion, lambda done, alive=alive: alive.append(live_matrices()))
        assert list(actual) == modules
        for name in modules:
            torch.testing.assert_close(actual[name], scores[name], rtol=1e-3, atol=1e-6 * scores[name].max().item())
    gc.unfreeze()
    # The sums of abs_of_sum, one a target; no gradient, of the criterion `net` nothing at all.
    assert kept == {"abs_of_sum": [len(modules)] * 2, "net": [0, 0]}
    assert all(p.grad is None for p in model.parameters())
    assert losses_of(model) == before

    plan = smtune.make_plan(model, BATCHES, CONFIG)
    scored = Scores(expected["abs_of_sum"], block_size=SIZE, criterion="abs_of_sum")
    by_twin = smtune.select_blocks(scored, CONFIG, twin.num_parameters())
    assert {name: set(plan.index(name).pairs) for name in plan.modules} == {
        name: set(by_twin.index(name).pairs) for name in by_twin.modules
    }
    assert plan.total_params == twin.num_parameters()


class Plus(nn.Module):
    """W + D, D the blocks in a matrix of zeros, for ordinary autograd."""

    def __init__(self, index):
        super().__init__()
        self.index = index
        self.blocks = nn.Parameter(torch.zeros(len(index), SIZE, SIZE))

    def forward(self, weight):
        tiles = tile(torch.zeros_like(weight, dtype=torch.float32), SIZE)
        dense = tiles.index_put(self.index.on(weight.device), self.blocks).permute(0, 2, 1, 3).reshape(weight.shape)
        return (weight + dense).to(weight.dtype)


@support("train, {dtype}", "W + D by autograd on the dequantised W: gradients, 3 losses, final blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@each_kind
def test_train(folder, kind, dtype):
    model = smtune.get_smt_model(load(folder, kind, dtype), CONFIG, BATCHES)
    layers = smt_layers(model)
    assert layers
    assert not any(layer.resident for layer in layers.values())
    twin = dense_twin(folder, kind, dtype)
    plan = model.peft_config["default"].get_plan()
    pluses = {name: Plus(plan.index(name)) for name in plan.modules if len(plan.index(name))}
    for name, plus in pluses.items():
        parametrize.register_parametrization(twin.get_submodule(name), "weight", plus)
    losses, gradients = train(model)
    expected_losses, expected_gradients = train(twin)
    exact = dtype == torch.float32
    torch.testing.assert_close(losses, expected_losses, rtol=1e-6 if exact else 1e-3, atol=0)
    assert losses[-1] < losses[0] - 0.05
    for name, plus in pluses.items():
        gradient = gradients[f"base_model.model.{name}.smt_blocks.default.weight"]
        expected = expected_gradients[f"{name}.parametrizations.weight.0.blocks"]
        torch.testing.assert_close(
            gradient, expected, rtol=0, atol=(1e-5 if exact else 0.02) * expected.abs().max().item()
        )
        blocks = model.get_submodule(f"base_model.model.{name}").smt_blocks["default"].weight
        error = (blocks - plus.blocks).norm() / plus.blocks.norm()
        assert error < (1e-4 if exact else 0.1), f"{name}: {error:.3g}"  # Adam divides small gradients by themselves


@support("save/load", "the adapter before saving, bit for bit")
@each_kind
def test_save_and_load(folder, kind, tmp_path):
    model = tuned(folder, kind)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder, kind), tmp_path, is_trainable=True)
    assert torch.equal(logits(again), expected)
    assert torch.equal(train(again, steps=1)[0], train(model, steps=1)[0])
    # For inference on CPUs bitsandbytes packs 4-bit weights, with scales rounded to bf16.
    loaded = peft.PeftModel.from_pretrained(load(folder, kind), tmp_path)
    packs = "4" in kind and kind.startswith("bitsandbytes")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0.02 if packs else 0)
    assert (logits(load(folder, kind)) - expected).abs().max() > 0.1


@support("merge", "W + D quantised anew by hand; unmerged, the base")
@each_kind
def test_merge_quantises_anew(folder, kind, tmp_path):
    model = tuned(folder, kind)
    expected = logits(model)
    with model.disable_adapter():
        base = logits(model)
    twin = dense_twin(folder, kind)
    layers = {name.removeprefix("base_model.model."): layer for name, layer in smt_layers(model).items()}
    for name, layer in layers.items():
        twin.get_submodule(name).weight.data += layer.get_delta_weight("default")
    twin.save_pretrained(tmp_path)
    by_hand = load(tmp_path, kind)
    model.merge_adapter()
    for name, layer in layers.items():
        assert is_quantised(layer.base_layer)
        assert torch.equal(dense_weight(layer.base_layer), dense_weight(by_hand.get_submodule(name))), name
    change = (expected - base).abs().max()
    assert 0 < (logits(model) - expected).abs().max() < 0.75 * change
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


def test_a_merge_that_fails_to_quantise_leaves_the_layer(folder, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    model = tuned(folder, "torchao Int8WeightOnly")
    expected = logits(model)
    layer = next(iter(smt_layers(model).values()))
    with monkeypatch.context() as patch:
        patch.setattr(type(layer.quantization_backend), "set_base_weight", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.merge_adapter()
    assert torch.equal(logits(model), expected)
    assert layer._put_aside == []


def test_quantising_under_resident_blocks_is_refused(folder):
    model = smtune.get_smt_model(load(folder), CONFIG, BATCHES)
    train(model)
    torchao.quantize_(model.base_model.model.model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(InputError, match="It has been quantised, pruned or parametrised since"):
        logits(model)


def test_what_a_merge_puts_aside_goes_where_the_model_goes(folder):
    model = tuned(folder, "torchao Int8WeightOnly")
    model.merge_adapter()
    model.to("meta")
    model.unmerge_adapter()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@support("dequantise, then merge", "the adapter beside the quantised weight")
@each_kind
def test_dequantise_then_merge(folder, kind, tmp_path):
    model = tuned(folder, kind)
    expected = logits(model)
    change = (expected - logits(load(folder, kind))).abs().max()
    # In evaluation bitsandbytes int8 rounds the layer's input to 8 bits too; in training on a CPU it does not.
    tolerance = (0.01 if kind == "bitsandbytes int8" else 1e-4) * change
    losses = losses_of(model)
    assert smtune.dequantize(model) is model
    assert losses_of(model) == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=tolerance)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=tolerance)
    merged.save_pretrained(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(plain.config, "quantization_config")
    assert torch.equal(logits(plain), logits(merged))


@pytest.mark.parametrize("kind", ["bitsandbytes nf4", "bitsandbytes nf4, double", "bitsandbytes int8"])
def test_an_evaluation_between_steps_changes_nothing(folder, kind):
    """Without care bitsandbytes packs 4-bit weights in an evaluation on a CPU, and has no backward for those."""
    plain, evaluated = (smtune.get_smt_model(load(folder, kind), CONFIG, BATCHES) for _ in range(2))
    assert torch.equal(train(plain)[0], train(evaluated, evaluate=True)[0])


@pytest.mark.parametrize("kind", ["bitsandbytes nf4", "bitsandbytes nf4, double", "bitsandbytes fp4"])
def test_a_packed_weight_is_refused_for_training_and_read_all_the_same(folder, kind, tmp_path):
    model = load(folder, kind)
    layer = model.model.layers[0].self_attn.q_proj
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs on CPUs with AVX-512 BF16 alone")
    expected = dense_weight(layer)
    logits(model)
    packed = layer.weight.data.clone()
    # Scales are rounded to bf16; those of a double quantisation are quantised anew too.
    rtol = 0.02 if "double" in kind else 2**-8
    torch.testing.assert_close(dense_weight(layer), expected, rtol=rtol, atol=0)
    assert torch.equal(layer.weight.data, packed)
    for make in (smtune.make_plan, smtune.score_blocks):
        with pytest.raises(InputError, match="packed it in an evaluation on this CPU: load it anew"):
            make(model, BATCHES, CONFIG)

    trained = tuned(folder, kind)
    trained.save_pretrained(tmp_path)
    trained.merge_adapter()
    expected = logits(trained)
    served = peft.PeftModel.from_pretrained(load(folder, kind), tmp_path)
    before = logits(served)
    served.merge_adapter()
    torch.testing.assert_close(logits(served), expected, rtol=0, atol=0.05)
    served.unmerge_adapter()
    assert torch.equal(logits(served), before)


REFUSED = {
    "Int8DynamicActivationInt8Weight": torchao.Int8DynamicActivationInt8WeightConfig(),
    "Int8DynamicActivationIntxWeight": torchao.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=torchao.PerGroup(32)
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_base_without_gradients_is_refused(folder, name, tmp_path):
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(REFUSED[name]))
    with pytest.raises(InputError, match=r"q_proj, a Linear with a weight of type .*, gives no gradient"):
        smtune.make_plan(model, BATCHES, CONFIG)
    plan = smtune.make_plan(load(folder), BATCHES, CONFIG)
    with pytest.raises(InputError, match="can be trained beside: bitsandbytes"):
        peft.get_peft_model(model, CONFIG.with_plan(plan))
    # It may serve, only not train.
    peft.get_peft_model(load(folder), CONFIG.with_plan(plan)).save_pretrained(tmp_path)
    assert torch.isfinite(logits(peft.PeftModel.from_pretrained(model, tmp_path))).all()


class Packed(nn.Module):
    """A linear layer as GPTQ's: integers and scales in buffers of its own, and nothing called `weight`."""

    def __init__(self, linear, fault=""):
        super().__init__()
        self.in_features, self.out_features, self.fault = linear.in_features, linear.out_features, fault
        scale = linear.weight.detach().abs().max() / 7
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        if self.fault == "no gradient":
            x = x.detach()
        elif self.fault == "a gradient of zero":
            x = x.detach() + 0 * x
        elif self.fault == "another gradient":
            x = 2 * x - x.detach()
        elif self.fault == "cannot run":
            raise RuntimeError("needs a GPU")
        return x @ (self.qweight.to(x.dtype) * self.scale).T


def with_packed(folder, fault="", last="o_proj"):
    model = load(folder)
    for name, module in list(model.named_modules()):
        if name.endswith(last):
            model.set_submodule(name, Packed(module, fault))
    return model


@pytest.mark.parametrize("fault", ["no gradient", "a gradient of zero", "another gradient"])
def test_any_format_is_refused_whose_backward_is_not_its_forwards(folder, fault):
    """Not that of the targets: the gradients of those come through it."""
    with pytest.raises(InputError, match=f"o_proj, a Packed, gives {fault}"):
        smtune.make_plan(with_packed(folder, fault), BATCHES, CONFIG)


def test_a_layer_that_cannot_run_here_is_left_to_say_so(folder):
    with pytest.raises(RuntimeError, match="needs a GPU"):
        smtune.make_plan(with_packed(folder, "cannot run"), BATCHES, CONFIG)


def test_the_check_leaves_everything_as_it_was(folder):
    model = load(folder, "bitsandbytes int8").eval()
    state = torch.get_rng_state()
    check_backward(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_an_unknown_format_trains_and_is_not_merged_into(folder):
    model = with_packed(folder, last="q_proj")
    assert count_parameters(model) == load(folder).num_parameters()
    model = smtune.get_smt_model(model, SMTConfig(block_size=SIZE, budget=6, target_modules=["q_proj"]), BATCHES)
    losses, _ = train(model)
    assert losses[-1] < losses[0]
    with pytest.raises(InputError, match=r"make it dense with `smtune.dequantize\(model\)`"):
        model.merge_adapter()
    with pytest.raises(InputError, match="that can be dequantised: of bitsandbytes, torchao or HQQ. Got a Packed"):
        smtune.dequantize(model)


def test_a_layer_quantised_without_transformers(folder):
    model = load(folder)
    torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    model = smtune.get_smt_model(model, CONFIG, BATCHES)
    train(model)
    expected = logits(model)
    with pytest.raises(InputError, match="Expected a base that can be quantised again"):
        model.merge_adapter()
    torch.testing.assert_close(logits(smtune.dequantize(model).merge_and_unload()), expected)


def test_parameters_packed_in_16_bit_storage_count_by_their_elements(folder):
    options = four_bits("nf4", bnb_4bit_quant_storage=torch.bfloat16)
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=options)
    assert model.model.layers[0].self_attn.q_proj.weight.is_floating_point()
    assert count_parameters(model) == load(folder).num_parameters()
    weight = smtune.score_blocks(model, None, SMTConfig(block_size=SIZE, criterion="weight"))
    dense = smtune.score_blocks(load(folder), None, SMTConfig(block_size=SIZE, criterion="weight"))
    for name, scores in weight.items():
        torch.testing.assert_close(scores, dense[name], rtol=0.05, atol=0)


@each_kind
def test_criteria_that_read_weights(folder, kind):
    model, twin = load(folder, kind), dense_twin(folder, kind)
    for criterion in ("weight", "activation"):
        expected = scores_of(twin, criterion)
        for name, scores in scores_of(model, criterion).items():
            torch.testing.assert_close(scores, expected[name], rtol=1e-3, atol=0)


def test_what_dequantize_refuses(folder):
    with pytest.raises(InputError, match="Expected a quantised model"):
        smtune.dequantize(load(folder))
    model = tuned(folder, "bitsandbytes nf4")
    model.merge_adapter()
    with pytest.raises(InputError, match=r"model.unmerge_adapter\(\)"):
        smtune.dequantize(model)


def test_dequantize_elsewhere_takes_all_of_the_model_there(folder):
    model = tuned(folder, "bitsandbytes nf4")
    assert smtune.dequantize(model, torch.bfloat16, device="meta") is model
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    elsewhere = [name for name, tensor in tensors.items() if tensor.device.type != "meta"]
    assert all(name.endswith(".index") for name in elsewhere)  # of blocks, which stays on the host
    assert not any(is_quantised(module) for module in model.modules())


def test_dequantize_rounds_nothing_that_frozen_adapters_learned(folder, tmp_path):
    kind = "torchao Int8WeightOnly"
    config = SMTConfig(block_size=SIZE, budget=10, trainable_token_indices=[3, 5], modules_to_save=["lm_head"])
    model = smtune.get_smt_model(load(folder, kind), config, BATCHES)
    train(model)
    model.save_pretrained(tmp_path)
    learned = smtune.trained_state_dict(model)
    loaded = peft.PeftModel.from_pretrained(load(folder, kind), tmp_path)
    smtune.dequantize(loaded, torch.bfloat16)
    logits(loaded)
    for name, value in smtune.trained_state_dict(loaded).items():
        # The head has to take the base's activations.
        assert torch.equal(value, learned[name].bfloat16() if ".modules_to_save." in name else learned[name]), name
    loaded = peft.PeftModel.from_pretrained(load(folder, kind, torch.bfloat16), tmp_path)
    loaded.base_model.model.lm_head.modules_to_save["default"].float()
    smtune.dequantize(loaded)
    assert {p.dtype for name, p in loaded.named_parameters() if ".modules_to_save." in name} == {torch.float32}


def test_dequantize_rounds_nothing_of_an_adapter_that_transformers_added(folder):
    model = load(folder, "bitsandbytes nf4", torch.bfloat16)
    plan = smtune.make_plan(model, None, SMTConfig(block_size=SIZE, budget=10, criterion="random"))
    config = SMTConfig(init_weights=False).with_plan(plan)
    model.add_adapter(config)
    learned = {name: p.detach().clone() for name, p in model.named_parameters() if ".smt_blocks." in name}
    smtune.dequantize(model)
    for name, value in learned.items():
        assert torch.equal(model.get_parameter(name), value)
        assert value.dtype == torch.float32


@pytest.mark.parametrize("kind", ["bitsandbytes nf4, double", "torchao Int8WeightOnly"])
def test_dequantize_decides_the_dtype(folder, kind):
    model = load(folder, kind, torch.bfloat16)
    expected = logits(load(folder, kind, torch.bfloat16))
    assert {p.dtype for p in smtune.dequantize(load(folder, kind, torch.bfloat16)).parameters()} == {torch.bfloat16}
    dense = smtune.dequantize(model, torch.float32)
    assert {p.dtype for p in dense.parameters()} == {torch.float32}
    assert not any(is_quantised(module) for module in dense.modules())
    torch.testing.assert_close(logits(dense), expected.float(), rtol=0, atol=0.05)
    dense.to(torch.float64)  # transformers refuses to cast a model that it holds for quantised
