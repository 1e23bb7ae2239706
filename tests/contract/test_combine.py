"""Adapters made of adapters, and adapters exchanged in place: `add_weighted_adapter` and `hotswap_adapter`."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapter import (
    BATCH,
    DTYPES,
    MODES,
    check_logits,
    dense_twin,
    layers,
    logits,
    make_base,
    make_config,
    make_trained,
    same,
    train,
    weights,
    with_two,
)

import smtune
from smtune import InputError
from smtune.tuner import SMTLinear, combine

WEIGHTED = {"column": "{mode}", "against": "the dense sum of the deltas, bit for bit in fp32"}
SWAPPED = {"column": "{mode}", "against": "the saved adapter loaded onto a fresh base, bit for bit"}


# Weighted sums ---------------------------------------------------------------------------------------------------


def deltas(model, module, names):
    layer = model.get_submodule(f"base_model.model.{module}")
    return [layer.get_delta_weight(name) if name in layer.smt_blocks else None for name in names]


@pytest.mark.support("PEFT", row="weighted sum (add_weighted_adapter)", **WEIGHTED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_a_weighted_sum_is_exact(mode, dtype):
    model = with_two(mode, dtype)
    model.base_model.set_adapter("default")
    before = logits(model)
    smtune.add_weighted_adapter(model, ["default", "other"], [0.7, -1.3], "sum")
    plans = {name: config.block_map() for name, config in model.peft_config.items()}
    assert plans["sum"].keys() == plans["default"].keys() | plans["other"].keys()
    for module, index in plans["sum"].items():
        of_parts = [plans[name][module].pairs for name in ("default", "other") if module in plans[name]]
        assert set(index.pairs) == set().union(*of_parts)
        expected = torch.zeros(index.grid.out_features, index.grid.in_features)
        for weight, delta in zip((0.7, -1.3), deltas(model, module, ("default", "other"))):
            if delta is not None:
                expected += weight * delta
        assert torch.equal(deltas(model, module, ["sum"])[0], expected)
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), before)
    model.set_adapter("sum")
    expected = logits(dense_twin(model, ["sum"], dtype))
    assert (expected - before).abs().max() > 1e-2
    check_logits(model, expected, mode)


@pytest.mark.parametrize("mode", MODES)
def test_the_plain_sum_is_both_adapters_at_once(mode):
    model = with_two(mode)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    smtune.add_weighted_adapter(model, ["default", "other"], [1, 1], "sum")
    model.set_adapter("sum")
    assert torch.equal(logits(model), expected)


@pytest.mark.support("PEFT", row="weighted sum, saved and loaded", column="{mode}", against="the sum before saving")
@pytest.mark.parametrize("mode", MODES)
def test_a_weighted_sum_is_saved_and_loaded(tmp_path, mode):
    model = with_two(mode)
    smtune.add_weighted_adapter(model, ["other", "default"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = peft.PeftModel.from_pretrained(make_base(), tmp_path / "sum")
    assert torch.equal(logits(loaded), expected)
    plan = loaded.peft_config["default"].get_plan()
    assert plan == model.peft_config["sum"].get_plan()
    assert plan.criterion == "0.5·other + 0.5·default"
    assert plan.n_blocks == sum(len(index) for index in loaded.peft_config["default"].block_map().values())


def test_a_sum_of_adapters_on_different_layers():
    model = peft.get_peft_model(make_base(), make_config(target_modules=["q_proj"], init_weights=False)).eval()
    model.add_adapter(
        "other", make_config(target_modules=["v_proj"], layers_to_transform=[1], init_weights=False, budget=5)
    )
    smtune.add_weighted_adapter(model, ["default", "other"], [2.0, 3.0], "sum")
    config = model.peft_config["sum"]
    assert config.target_modules == {"q_proj", "v_proj"}
    assert [name for name, _ in make_base().named_modules() if name in config.get_plan().modules] == list(
        config.get_plan().modules
    )
    model.set_adapter("sum")
    assert torch.equal(logits(model), logits(dense_twin(model, ["sum"])))


def test_a_sum_of_adapters_in_different_modes(tmp_path):
    model = make_trained(mode="resident", target_modules=["q_proj"])
    model.add_adapter("other", make_config(seed=1, mode="additive", target_modules=["v_proj"], init_weights=False))
    model.eval().base_model.set_adapter(["default", "other"])
    expected = logits(model)
    smtune.add_weighted_adapter(model, ["default", "other"], [1, 1], "sum")
    model.set_adapter("sum")
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = peft.PeftModel.from_pretrained(make_base(), tmp_path / "sum")
    torch.testing.assert_close(logits(loaded.eval()), expected, rtol=1e-5, atol=1e-5)


def test_a_sum_trains_on():
    model = with_two("resident")
    smtune.add_weighted_adapter(model, ["default", "other"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    before = logits(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".sum." in name for name in trained)
    train(model)
    assert not torch.equal(logits(model), before)


def test_sums_that_cannot_be():
    model = with_two("resident")
    model.add_adapter("tokens", make_config(seed=2, trainable_token_indices=[1]))
    for adapters, of, name, messages in (
        (["default", "othr"], [1, 1], "sum", ["Got 'othr'. Did you mean \"other\""]),
        (["default", "other"], [1], "sum", ["a weight for each of 2 adapters. Got 1"]),
        (["default", "other"], [1, float("nan")], "other", ["finite weights. Got nan", "'other' is taken"]),
        ([], [], "sum", [r"a list of adapters. Got \[\]"]),
        (["default", "tokens"], [1, 1], "sum", ["'tokens' has modules to save or trainable tokens, such as .*embed"]),
    ):
        for message in messages:
            with pytest.raises(InputError, match=message):
                smtune.add_weighted_adapter(model, adapters, of, name)
    assert list(model.peft_config) == ["default", "other", "tokens"]
    with pytest.raises(InputError, match=r"Expected a PEFT model with SMT adapters\. Got a LlamaForCausalLM"):
        smtune.add_weighted_adapter(make_base(), ["default"], [1], "sum")


def test_a_sum_of_two_block_sizes_is_refused():
    model = peft.get_peft_model(make_base(), make_config(target_modules=["q_proj"]))
    model.add_adapter("small", make_config(target_modules=["v_proj"], block_size=8))
    with pytest.raises(InputError, match="one block size. Got 'default' of 16, 'small' of 8"):
        smtune.add_weighted_adapter(model, ["default", "small"], [1, 1], "sum")


def test_a_sum_that_fails_leaves_no_adapter(monkeypatch):
    def fail(*args):
        raise MemoryError

    model = with_two("resident")
    expected, keys = logits(model), list(model.state_dict())
    monkeypatch.setattr(combine, "_weighted_sum", fail)
    with pytest.raises(MemoryError):
        smtune.add_weighted_adapter(model, ["default", "other"], [1, 1], "sum")
    assert list(model.peft_config) == ["default", "other"]
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), expected)


# Hot-swap --------------------------------------------------------------------------------------------------------

OTHER_PLANS = {
    "the same blocks": lambda: make_config().with_plan(smtune.make_plan(make_base(), None, make_config())),
    "as many other blocks": lambda: make_config().with_plan(
        smtune.make_plan(make_base(), None, make_config()).shuffled(seed=5)
    ),
    "more blocks": lambda: make_config(seed=1, budget=30),
    "fewer blocks": lambda: make_config(seed=1, budget=2),
    "other layers": lambda: make_config(seed=1, target_modules=["o_proj"]),
}


def saved(path, config, lr=0.1):
    """An adapter of `config`, trained and saved; the logits it had."""
    model = train(peft.get_peft_model(make_base(), config), lr=lr).eval()
    model.save_pretrained(path)
    return logits(model)


@pytest.mark.support("PEFT", row="hot-swap (hotswap_adapter), {other}", **SWAPPED)
@pytest.mark.parametrize("other", OTHER_PLANS)
@pytest.mark.parametrize("mode", MODES)
def test_a_swapped_adapter_is_the_one_that_was_saved(tmp_path, mode, other):
    config = OTHER_PLANS[other]()
    config.mode = mode
    saved(tmp_path / "other", config)
    model = make_trained(mode=mode)
    first = logits(model)
    model.save_pretrained(tmp_path / "first")
    parameters = {name: p for name, p in model.named_parameters() if ".smt_blocks." in name}
    smtune.hotswap_adapter(model, tmp_path / "other")
    fresh = peft.PeftModel.from_pretrained(make_base(), tmp_path / "other")
    expected = logits(fresh)
    assert not torch.equal(expected, first)
    assert torch.equal(logits(model), expected)
    assert model.peft_config["default"].get_plan() == config.get_plan() or config.plan is None
    assert model.peft_config["default"].get_plan() == fresh.peft_config["default"].get_plan()
    after = {name: p for name, p in model.named_parameters() if ".smt_blocks." in name}
    assert after.keys() == {name for name, _ in fresh.named_parameters() if ".smt_blocks." in name}
    assert all(p.requires_grad for p in after.values())
    if other in ("the same blocks", "as many other blocks"):
        assert all(after[name] is parameter for name, parameter in parameters.items())
    with model.disable_adapter():
        assert same(weights(model), weights(make_base()))
        assert torch.equal(logits(model), logits(make_base()))
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert same(again, load_file(tmp_path / "other" / "adapter_model.safetensors"))
    smtune.hotswap_adapter(model, tmp_path / "first")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("mode", MODES)
def test_swapping_an_adapter_leaves_the_others_alone(tmp_path, mode):
    saved(tmp_path, make_config(seed=7, budget=25, mode=mode))
    model = with_two(mode)
    model.set_adapter("default")
    before = logits(model)
    smtune.hotswap_adapter(model, tmp_path, "other")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), before)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"default"}
    model.base_model.set_adapter(["default", "other"])
    twin = logits(dense_twin(model, ["default", "other"]))
    torch.testing.assert_close(logits(model), twin, rtol=1e-5, atol=1e-5)


def test_a_swapped_adapter_trains_on(tmp_path):
    config = make_config(seed=1, budget=30)
    saved(tmp_path, config)
    model = make_trained()
    smtune.hotswap_adapter(model, tmp_path)
    expected = peft.PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True)
    assert torch.equal(logits(train(model)), logits(train(expected)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
@pytest.mark.filterwarnings("ignore:.*dynamo_pgo.*:UserWarning")
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_model(tmp_path, mode):
    """As many blocks in every matrix: no new graph in resident mode, one in additive mode; right in both."""
    from torch._dynamo.testing import CompileCounter

    config = OTHER_PLANS["as many other blocks"]()
    config.mode = mode
    saved(tmp_path / "other", config)
    saved(tmp_path / "more", make_config(seed=1, budget=30, mode=mode))
    torch._dynamo.reset()
    counter = CompileCounter()
    model = make_trained(mode=mode)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    first = logits(compiled)
    assert torch.equal(first, logits(model))
    assert counter.frame_count == 1
    smtune.hotswap_adapter(compiled, tmp_path / "other")
    assert torch.equal(logits(compiled), logits(peft.PeftModel.from_pretrained(make_base(), tmp_path / "other")))
    assert counter.frame_count == {"resident": 1, "additive": 2}[mode]
    smtune.hotswap_adapter(compiled, tmp_path / "more")
    assert torch.equal(logits(compiled), logits(peft.PeftModel.from_pretrained(make_base(), tmp_path / "more")))
    torch._dynamo.reset()


def damage_missing(path):
    tensors = load_file(path / "adapter_model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("weight"))]
    save_file(tensors, path / "adapter_model.safetensors")


def damage_places(path):
    tensors = load_file(path / "adapter_model.safetensors")
    name = next(name for name, tensor in tensors.items() if name.endswith("index") and len(tensor) > 1)
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, path / "adapter_model.safetensors")


def damage_more(path):
    tensors = load_file(path / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = torch.zeros(1)
    save_file(tensors, path / "adapter_model.safetensors")


def damage_plan(path):
    file = path / "adapter_config.json"
    values = json.loads(file.read_text())
    values["plan"]["modules"][0]["name"] = "model.layers.0.self_attn.q_prj"
    file.write_text(json.dumps(values))


def replace_by_lora(path):
    shutil.rmtree(path)
    peft.get_peft_model(make_base(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, r"blocks of 16² for model\.layers.* Got none: the weights are of another adapter"),
        (damage_places, "Got those of other blocks of model.layers"),
        (damage_more, "Got base_model.model.lm_head.weight too"),
        (damage_plan, 'does not fit this model.*\n.*Did you mean "model.layers.0.self_attn.q_proj"'),
        (replace_by_lora, "an SMT adapter with its plan at .* Got one of .*LORA"),
    ],
)
def test_what_cannot_be_swapped_in_changes_nothing(tmp_path, damage, message):
    saved(tmp_path, make_config(seed=1, budget=30))
    damage(tmp_path)
    model = make_trained()
    expected, keys, plan = logits(model), list(model.state_dict()), model.peft_config["default"].plan
    with pytest.raises(InputError, match=message):
        smtune.hotswap_adapter(model, tmp_path)
    assert list(model.state_dict()) == keys
    assert model.peft_config["default"].plan is plan
    assert torch.equal(logits(model), expected)


def test_a_swap_that_cannot_be_wrapped_changes_nothing(tmp_path):
    """The last check is the layer's own: a new layer that cannot be resident."""
    saved(tmp_path, make_config(target_modules=["k_proj", "o_proj"], mode="resident"))
    base = make_base()
    base.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *args: None)
    model = peft.get_peft_model(base, make_config(init_weights=False)).eval()
    expected, keys = logits(model), list(model.state_dict())
    with pytest.raises(InputError, match="for resident mode. Got Linear at model.layers.1.self_attn.o_proj"):
        smtune.hotswap_adapter(model, tmp_path)
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), expected)


def gradients(model):
    model.zero_grad()
    model.train()(**BATCH).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("swapped", [True, False])
def test_layers_that_no_more_save_their_input_together(tmp_path, swapped):
    """q's blocks become smaller than k's: what is kept of their input for one is not what the other reads."""
    of_q, of_k = {"target_modules": ["q_proj"]}, {"target_modules": ["k_proj"]}
    small = make_config(seed=2, block_size=8, budget=6, **of_q)

    def both(model, names):
        model.base_model.set_adapter(names)
        return gradients(model)

    expected = peft.get_peft_model(make_base(), small)
    expected.add_adapter("other", make_config(seed=1, **of_k))
    model = peft.get_peft_model(make_base(), make_config(**of_q))
    model.add_adapter("other", make_config(seed=1, **of_k))
    both(model, ["default", "other"])  # saved together once
    if swapped:
        peft.get_peft_model(make_base(), small).save_pretrained(tmp_path)
        smtune.hotswap_adapter(model, tmp_path, "default")
    else:
        model.set_adapter("other")
        model.delete_adapter("default")
        model.add_adapter("default", small)
    wanted = both(expected, ["default", "other"])
    found = both(model, ["default", "other"])
    assert wanted
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, wanted[name]), name


def test_adapters_that_cannot_be_swapped(tmp_path):
    saved(tmp_path, make_config(seed=1))
    model = with_two("resident")
    with pytest.raises(InputError, match="Got 'defualt'. Did you mean \"default\""):
        smtune.hotswap_adapter(model, tmp_path, "defualt")
    model.merge_adapter(adapter_names=["other"])
    for name in ("other", "default"):  # a layer that only the saved one has would not be merged
        with pytest.raises(InputError, match="Got other: call `unmerge_adapter` first"):
            smtune.hotswap_adapter(model, tmp_path, name)
    smaller = peft.get_peft_model(make_base(), make_config(block_size=8))
    smaller.add_adapter("second", make_config(block_size=8, seed=1))
    with pytest.raises(InputError, match="one block size for all adapters of a layer: 8, that of 'second'. Got 16"):
        smtune.hotswap_adapter(smaller, tmp_path)
    tokens = peft.get_peft_model(make_base(), make_config(modules_to_save=["lm_head"]))
    with pytest.raises(InputError, match="'default' has modules to save or trainable tokens, such as lm_head"):
        smtune.hotswap_adapter(tokens, tmp_path)


def test_another_block_size_is_swapped_in_where_no_other_adapter_has_the_first(tmp_path):
    saved(tmp_path, make_config(block_size=8, budget=40))
    model = make_trained()
    smtune.hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(peft.PeftModel.from_pretrained(make_base(), tmp_path)))
    assert all(isinstance(layer, SMTLinear) for layer in layers(model))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("mode", MODES)
def test_blocks_of_the_head_are_swapped_in(tmp_path, mode):
    """PEFT saves the frozen weight of a targeted head with them."""
    saved(tmp_path, make_config(seed=1, budget=30, mode=mode, target_modules=["q_proj", "lm_head"]))
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "adapter_model.safetensors")
    model = make_trained(mode=mode)
    smtune.hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(peft.PeftModel.from_pretrained(make_base(), tmp_path)))
