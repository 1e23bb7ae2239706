"""What an SMT adapter must keep through its life: train, switch, disable, merge, save, load, delete."""

from __future__ import annotations

import copy
import json
import pickle

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
)

import smtune
from smtune import InputError, SMTConfig
from smtune.blocks import BlockGrid, BlockIndex, scatter_
from smtune.depth import backward_costs
from smtune.tuner import SMTLinear
from smtune.tuner.layer import Blocks

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 128,
    "pad_token_id": 0,
}
IDS = torch.arange(2 * 12).view(2, 12) % 128
BATCH = {"input_ids": IDS, "labels": IDS}
DTYPES = [torch.float32, torch.bfloat16]
MODES = ["resident", "additive"]


def make_base(dtype=torch.float32, kind="llama"):
    torch.manual_seed(0)
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    return model.to(dtype).eval()


def make_config(seed=0, **changes):
    """A plan of 12 random blocks of 16² over q, k and v."""
    return SMTConfig(**({"block_size": 16, "budget": 12, "criterion": "random", "seed": seed} | changes))


def train(model, steps=3, lr=0.05):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def make_trained(dtype=torch.float32, mode="resident", seed=0, **changes):
    return train(peft.get_peft_model(make_base(dtype), make_config(seed, mode=mode, **changes))).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def weights(model):
    """Base weights by their name in the base model, as they stand in memory now."""
    named = dict(model.named_parameters())
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): parameter.detach().clone()
        for name, parameter in named.items()
        if ".smt_blocks." not in name
    }


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def layers(model):
    return [module for module in model.modules() if isinstance(module, SMTLinear)]


# Making one ------------------------------------------------------------------------------------------------------


def test_a_config_without_a_plan_names_make_plan():
    with pytest.raises(InputError, match=r"make_plan\(model, batches, config\)"):
        peft.get_peft_model(make_base(), SMTConfig(block_size=16))


def test_peft_lists_the_method():
    assert peft.PeftType("SMT") is peft.PeftType.SMT
    assert pickle.loads(pickle.dumps(peft.PeftType.SMT)) is peft.PeftType.SMT
    assert copy.deepcopy(peft.PeftType.SMT) is peft.PeftType.SMT
    assert peft.PeftType.SMT in list(peft.PeftType)


def test_the_three_ways_to_make_one_agree():
    config = SMTConfig(block_size=16, budget=7, warmup_steps=2)
    plan = smtune.make_plan(make_base(), [BATCH] * 3, config)
    assert plan.n_blocks == 7
    assert plan.batches_seen == 2
    one = peft.get_peft_model(make_base(), config.with_plan(plan))
    two = smtune.get_smt_model(make_base(), config, [BATCH] * 3)
    three_config = copy.deepcopy(config)
    base = make_base()
    smtune.preprocess_smt(base, three_config, [BATCH] * 3)
    three = peft.get_peft_model(base, three_config)
    for other in (two, three):
        assert other.peft_config["default"].plan == one.peft_config["default"].plan
        assert same(dict(one.named_parameters()), dict(other.named_parameters()))
    assert config.plan is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_trainables_are_the_planned_blocks_in_fp32(dtype):
    model = peft.get_peft_model(make_base(dtype), make_config())
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == 12 * 16**2
    for name, parameter in trainable.items():
        assert name.endswith("smt_blocks.default.weight")
        assert parameter.dtype == torch.float32
        assert parameter.shape[1:] == (16, 16)
    assert model.get_nb_trainable_parameters()[0] == 12 * 16**2


def test_layers_without_blocks_are_left_alone():
    model = peft.get_peft_model(make_base(), make_config(budget=2))
    config = model.peft_config["default"]
    modules = dict(model.base_model.model.named_modules())
    chosen, targeted = config.block_map().keys(), config.get_plan().modules.keys()
    assert 1 <= len(chosen) <= 2
    assert {name for name, module in modules.items() if isinstance(module, SMTLinear)} == chosen
    assert targeted > chosen
    assert all(type(modules[name]) is nn.Linear for name in targeted - chosen)


def test_layers_and_excludes_limit_the_plan():
    model = peft.get_peft_model(
        make_base(), make_config(layers_to_transform=[1], exclude_modules=["k_proj"], budget=12)
    )
    names = {name for name, module in model.named_modules() if isinstance(module, SMTLinear)}
    assert names
    assert all(".layers.1." in name and not name.endswith("k_proj") for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_prj"]}, 'match none. Did you mean "q_proj".*Linear layers of this model: q_proj'),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is a Embedding"),
        ({"block_size": 48}, r"48, which does not divide model.layers.0.self_attn.q_proj of shape \(64, 64\)"),
        ({"layers_to_transform": [7]}, r"in layers \[7\]"),
    ],
)
def test_targets_that_do_not_fit(changes, message):
    with pytest.raises(InputError, match=message):
        peft.get_peft_model(make_base(), make_config(**changes))


def test_an_unknown_architecture_names_its_linear_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(InputError, match=r"no default for model type None\. Linear layers of this model: 0, 2"):
        smtune.make_plan(model, None, SMTConfig(criterion="weight"))


def test_targets_that_fit_nothing_are_named():
    config = make_config(target_modules=["q_proj", "k_prj"], layers_to_transform=[0, 7])
    with pytest.warns(UserWarning, match="matches 'k_prj' of target_modules, 7 of layers_to_transform"):
        peft.get_peft_model(make_base(), config)


def test_config_faults_come_all_at_once():
    with pytest.raises(InputError) as error:
        SMTConfig(
            block_size=0,
            budget=2.0,
            criterion="abs_of_sums",
            policy="shares",
            mode="residnt",
            warmup_steps=0,
            seed=1.5,  # type: ignore[arg-type]
            layers_to_transform="0",  # type: ignore[arg-type]
        )
    message = str(error.value)
    named = ("block_size", "budget", "shares", "warmup", "seed", "layers_to_transform")
    for part in (*named, 'Did you mean "abs_of_sum"', 'Did you mean "resident"'):
        assert part in message


def test_a_config_may_be_used_again():
    config, models = make_config(), []
    for config.seed, config.budget in ((0, 12), (1, 12), (1, 20)):
        models.append(peft.get_peft_model(make_base(), config))
    plans = [model.peft_config["default"].get_plan() for model in models]
    assert [plan.n_blocks for plan in plans] == [12, 12, 20]
    assert plans[0].modules != plans[1].modules
    for model, plan in zip(models, plans):
        assert {name: len(plan.index(name)) for name in plan.modules if len(plan.index(name))} == {
            name.removeprefix("base_model.model."): len(layer.smt_blocks["default"].weight)
            for name, layer in model.named_modules()
            if isinstance(layer, SMTLinear)
        }


def test_a_config_may_be_used_again_for_another_model():
    config = make_config(target_modules="all-linear", budget=400)
    peft.get_peft_model(make_base(), config)
    deeper = LlamaForCausalLM(LlamaConfig(**(SIZES | {"num_hidden_layers": 4})))
    plan = peft.get_peft_model(deeper, config).peft_config["default"].get_plan()
    assert {name.split(".")[2] for name, own in plan.modules.items() if own.rows} == set("0123")
    config = make_config()
    peft.get_peft_model(make_base(), config)
    other = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16))
    plan = peft.get_peft_model(other, config).peft_config["default"].get_plan()
    assert {name.rpartition(".")[2] for name in plan.modules} == {"c_attn"}


@pytest.mark.parametrize("device", [torch.device("cpu"), "cpu"])
def test_an_accumulator_device_can_be_saved(device, tmp_path):
    config = make_config(accumulator_device=device)
    peft.get_peft_model(make_base(), config).save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).accumulator_device == "cpu"


SMALL_ROBERTA = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}


@pytest.mark.parametrize("mode", MODES)
def test_a_head_that_peft_trains_whole_has_no_blocks(mode, tmp_path):
    """PEFT adds the head to the modules to save, after the plan has been made."""
    torch.manual_seed(0)
    base = RobertaForSequenceClassification(RobertaConfig(**SMALL_ROBERTA, num_labels=16)).eval()
    again = copy.deepcopy(base)
    batch = {"input_ids": IDS % 64, "labels": torch.tensor([0, 1])}
    config = SMTConfig(target_modules="all-linear", task_type="SEQ_CLS", block_size=16, budget=30, mode=mode)
    model = smtune.get_smt_model(base, config, [batch])
    blocks = [name for name, _ in model.named_parameters() if ".smt_blocks." in name]
    assert blocks
    assert not any("classifier" in name for name in blocks)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(**batch).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("mode", MODES)
def test_blocks_of_what_is_trained_whole_are_refused(mode):
    plan = smtune.make_plan(make_base(), None, make_config(target_modules=["gate_proj", "lm_head"]))
    for saved, layer in (("mlp", "gate_proj"), ("lm_head", "lm_head"), ("head", "lm_head")):
        base = make_base()
        with pytest.raises(
            InputError, match=rf"a plan with \S*{layer}, of 'default', and modules_to_save with {saved}"
        ):
            peft.get_peft_model(base, make_config(mode=mode, modules_to_save=[saved]).with_plan(plan))
        assert not layers(base)
    model = peft.get_peft_model(make_base(), make_config(modules_to_save=["lm_head"]))
    with pytest.raises(InputError, match="a plan with lm_head, of 'two', and modules_to_save with lm_head"):
        model.add_adapter("two", make_config(target_modules=["lm_head"]))
    model.add_adapter("three", make_config(target_modules="all-linear"))
    assert not any("lm_head" in name for name in model.peft_config["three"].block_map())
    model = peft.get_peft_model(make_base(), make_config(target_modules=["gate_proj"]))
    with pytest.raises(InputError, match=r"gate_proj, of 'default', and modules_to_save with mlp"):
        model.add_adapter("two", make_config(modules_to_save=["mlp"]))


def test_a_plan_with_a_head_that_peft_trains_whole_is_refused():
    base = RobertaForTokenClassification(RobertaConfig(**SMALL_ROBERTA, num_labels=16))
    plan = smtune.make_plan(base, None, make_config(target_modules="all-linear", budget=1.0))
    with pytest.raises(InputError, match="a plan with classifier, of 'default', and modules_to_save with classifier"):
        peft.get_peft_model(base, make_config(task_type="TOKEN_CLS").with_plan(plan))


def test_a_layer_that_cannot_be_resident_is_told_before_any_is_replaced(tmp_path):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    tied = make_config(mode="resident", target_modules=["q_proj", "lm_head"], budget=1.0)
    with pytest.raises(InputError, match="lm_head is shared"):
        peft.get_peft_model(base, tied)
    assert not layers(base)
    model = peft.get_peft_model(base, make_config(mode="resident"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 12 * 16**2
    with pytest.raises(InputError, match="lm_head is shared"):
        model.add_adapter("two", make_config(mode="resident", target_modules=["o_proj", "lm_head"], budget=1.0))
    model.save_pretrained(tmp_path)
    assert not any(".two." in name for name in model.state_dict())
    assert not any("o_proj.base_layer" in name for name in model.state_dict())


def test_what_ddp_leaves_out_follows_a_swap(tmp_path):
    peft.get_peft_model(make_base(), make_config(target_modules=["o_proj"])).save_pretrained(tmp_path)
    model = peft.get_peft_model(make_base(), make_config())
    smtune.hotswap_adapter(model, tmp_path, "default")
    left_out = model._ddp_params_and_buffers_to_ignore
    wanted = [name for name, _ in model.named_buffers() if "smt_originals" in name or name.endswith(".index")]
    assert any("o_proj" in name for name in wanted)
    assert set(wanted) <= set(left_out)


def test_a_config_whose_plan_is_taken_away_plans_anew():
    config = make_config()
    plan = peft.get_peft_model(make_base(), config).peft_config["default"].get_plan()
    for config.seed in (0, 1):
        config.plan = None
        again = peft.get_peft_model(make_base(), config).peft_config["default"].get_plan()
        assert (again.modules == plan.modules) == (config.seed == 0)


def test_paper_setting():
    config = SMTConfig.paper(budget=0.0491)
    assert (config.block_size, config.criterion, config.warmup_steps, config.budget) == (256, "abs_of_sum", 100, 0.0491)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj"}
    assert (config.policy, SMTConfig().policy, SMTConfig().criterion) == ("global", "sampled", "abs_of_sum")


def test_a_plan_for_another_model_is_refused():
    plan = smtune.make_plan(make_base(), None, make_config())
    torch.manual_seed(0)
    other = LlamaForCausalLM(LlamaConfig(**(SIZES | {"num_hidden_layers": 1})))
    with pytest.raises(InputError, match="does not fit this model"):
        peft.get_peft_model(other, make_config().with_plan(plan))


def test_parameters_are_counted_once_and_by_logical_shape():
    torch.manual_seed(0)
    tied = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    plan = smtune.make_plan(tied, None, make_config())
    assert plan.total_params == tied.num_parameters()
    untied = smtune.make_plan(make_base(), None, make_config())
    assert untied.total_params == plan.total_params + 128 * 64


# Training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_unselected_weights_are_bit_identical_after_training(dtype, mode):
    base = weights(make_base(dtype))
    model = make_trained(dtype, mode)
    config = model.peft_config["default"]
    output = logits(model)
    resident = weights(model)
    assert torch.equal(logits(model), output)
    for name, before in base.items():
        module = name.removesuffix(".weight")
        expected = before.clone()
        if module in config.block_map() and mode == "resident":
            index = config.block_map()[module]
            blocks = model.get_submodule(f"base_model.model.{module}").smt_blocks["default"]
            moved = scatter_(torch.zeros_like(before, dtype=torch.float32), index, blocks.weight.detach())
            assert moved.count_nonzero() == len(index) * 16**2  # every entry of every planned block has moved
            expected = (before.float() + moved).to(dtype)
        assert torch.equal(resident[name], expected), name


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 8, dtype=torch.float64), nn.Linear(8, 12, dtype=torch.float64)

    def forward(self, x):
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("mode", MODES)
def test_every_block_selected_is_dense_training(mode):
    """fp64, AdamW without decay, 20 steps: 1e-9 (the contract)."""
    torch.manual_seed(0)
    dense = Stack()
    config = SMTConfig(target_modules=["first", "second"], block_size=4, budget=12, criterion="weight", mode=mode)
    sparse = peft.get_peft_model(copy.deepcopy(dense), config)
    assert sparse.peft_config["default"].get_plan().n_blocks == 12
    data = torch.randn(20, 5, 3, 12, dtype=torch.float64)
    for model, parameters in (
        (dense, [dense.first.weight, dense.second.weight]),
        (sparse, [p for p in sparse.parameters() if p.requires_grad]),
    ):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        for x in data:
            (model(x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    merged = sparse.merge_and_unload()
    assert (merged.first.weight - dense.first.weight).abs().max() < 1e-9
    assert (merged.second.weight - dense.second.weight).abs().max() < 1e-9
    assert (dense.first.weight - Stack().first.weight).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the evaluations, under checkpointing
@pytest.mark.parametrize("use_reentrant", [None, True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_resident_and_additive_train_alike(use_reentrant, accumulate):
    """One slow twin: additive on the same plan, with no weight ever written. In fp64: a fault is no rounding."""
    results = []
    for mode in MODES:
        model = peft.get_peft_model(make_base(torch.float64).train(), make_config(mode=mode))
        if mode == "resident" and use_reentrant is not None:
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            if use_reentrant:
                model.enable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
        for _ in range(4):
            for k in range(accumulate):
                model(input_ids=IDS + k, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            logits(model)  # evaluation in the middle
        results.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, parameter in results[0].items():
        assert parameter.abs().max() > 1e-3
        torch.testing.assert_close(parameter, results[1][name], rtol=1e-7, atol=1e-10)


def set_by_step(model):
    train(model, steps=1)


def set_by_load_state_dict(model):
    state = {
        name: tensor + 0.1 if name.endswith("default.weight") else tensor for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state)


def set_by_data_copy(model):
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.data.copy_(parameter.data + 0.1)


def set_by_ema(model):
    for name, parameter in model.named_parameters():
        if ".default." in name:
            torch._foreach_lerp_([parameter.data], [torch.ones_like(parameter)], 0.1)


def set_by_fused_step(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, fused=True)
    model(**BATCH).loss.backward()
    optimizer.step()
    model.zero_grad()


@pytest.mark.parametrize(
    "change", [set_by_step, set_by_load_state_dict, set_by_data_copy, set_by_ema, set_by_fused_step]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_forward_sees_stale_blocks(change, dtype):
    model = make_trained(dtype)
    before = logits(model)
    change(model)
    after = logits(model)
    assert not torch.equal(before, after)
    # An independent reading of the deltas: a fresh base with W = round(base + delta).
    expected = make_base(dtype)
    for module, index in model.peft_config["default"].block_map().items():
        delta = model.get_submodule(f"base_model.model.{module}").get_delta_weight("default")
        weight = expected.get_submodule(module).weight
        weight.data.copy_((weight.data.float() + delta).to(dtype))
        assert len(index)
    assert torch.equal(after, logits(expected))


def test_a_backward_sees_its_own_forward():
    """Another adapter's forward between an adapter's forward and its backward does no harm."""

    def gradients(interrupt):
        model = make_trained()
        model.add_adapter("other", make_config(seed=1, init_weights=False))
        model.set_adapter("default")
        loss = model(**BATCH).loss
        interrupt(model)
        for name, parameter in model.named_parameters():  # switching has frozen it
            parameter.requires_grad_(".default." in name)
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if ".default." in name}

    def other(model):
        model.set_adapter("other")
        logits(model)

    def other_and_back(model):
        other(model)
        model.set_adapter("default")

    def disabled(model):
        with model.disable_adapter():
            logits(model)

    def evaluated(model):
        logits(model)
        model.state_dict()

    expected = gradients(lambda model: None)
    for interrupt in (other, other_and_back, disabled, evaluated):
        assert same(gradients(interrupt), expected)


def test_a_backward_sees_its_own_forward_through_a_hooked_base():
    """Such a layer acts beside its weight; blocks that a later forward writes into it do no harm."""
    model = make_trained()
    layers = [module for module in model.modules() if isinstance(module, SMTLinear)]
    hooks = [layer.base_layer.register_forward_hook(lambda *_: None) for layer in layers]
    loss = model(**BATCH).loss
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(loss, trained, retain_graph=True)
    for hook in hooks:
        hook.remove()
    logits(model)  # writes the blocks into the weights
    assert all(torch.equal(*pair) for pair in zip(torch.autograd.grad(loss, trained), expected))


def test_what_another_adapter_copied_is_no_part_of_the_budget():
    config = make_config(criterion="random", budget=0.05)
    expected = smtune.make_plan(make_base(), None, config)
    saving = make_config(modules_to_save=["lm_head", "embed_tokens"], target_modules=["o_proj"])
    model = peft.get_peft_model(make_base(), saving)
    model.add_adapter("other", config)
    plan = model.peft_config["other"].get_plan()
    assert (plan.total_params, plan.n_params) == (expected.total_params, expected.n_params)
    names = list(expected.modules)
    base, wrapped = make_base(), model.base_model.model
    assert backward_costs(wrapped, names) == backward_costs(base, names)


def test_a_merged_adapter_is_not_deleted(monkeypatch):
    monkeypatch.setattr(peft.tuners.tuners_utils, "_check_adapters_not_merged", lambda *_: None, raising=False)  # 0.20
    model = make_trained()
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    model.delete_adapter("default")


@pytest.mark.parametrize("layers", [range(1), (0,), {0}])
def test_numbers_of_layers_are_saved(tmp_path, layers):
    model = peft.get_peft_model(make_base(), make_config(layers_to_transform=layers))
    model.save_pretrained(tmp_path)
    assert smtune.SMTConfig.from_pretrained(tmp_path).layers_to_transform == [0]


def test_an_adapter_that_is_refused_leaves_nothing_behind():
    model = peft.get_peft_model(make_base(), make_config(mode="resident", layers_to_transform=[1]))
    before = set(model.state_dict())
    with pytest.raises(InputError, match='Expected mode="resident"'):
        model.add_adapter("other", make_config(mode="additive"))
    assert set(model.state_dict()) == before
    model.add_adapter("other", make_config(mode="resident"))


def step(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


@pytest.mark.parametrize(
    ("mode", "change", "message"),
    [
        ("resident", step, "Expected the blocks of .* as they were in the forward"),
        ("resident", lambda model: model.merge_adapter(), "Expected the blocks of .* as they were in the forward"),
        ("additive", step, "modified by an inplace operation"),
    ],
)
def test_a_backward_refuses_blocks_that_changed_since(mode, change, message):
    model = make_trained(mode=mode)
    loss = model(**BATCH).loss
    change(model)
    with pytest.raises(RuntimeError, match=message):
        loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_a_backward_after_the_adapter_is_deleted(mode):
    """Refused in words of the resident mode; additive blocks keep their values when they are gone from the model."""
    model = with_two(mode)
    model.base_model.set_adapter("default")
    weight = next(layer.smt_blocks["default"].weight for layer in layers(model) if "default" in layer.smt_blocks)
    (expected,) = torch.autograd.grad(model(**BATCH).loss, [weight])
    loss = model(**BATCH).loss
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("default")
    if mode == "resident":
        with pytest.raises(RuntimeError, match="Expected the blocks of .* a deleted or swapped adapter"):
            loss.backward()
    else:
        loss.backward()
        assert torch.equal(weight.grad, expected)


def test_a_backward_after_unload_is_refused():
    model = make_trained()
    loss = model(**BATCH).loss
    base = model.unload()
    with pytest.raises(RuntimeError, match="Expected the blocks of .* an unmerge, an unload"):
        loss.backward()
    assert same(weights(base), weights(make_base()))


def test_a_late_backward_does_not_leave_blocks_behind():
    base = weights(make_base())
    model = make_trained()
    loss = model(**BATCH).loss
    model.disable_adapter_layers()
    expected = logits(make_base())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default." in name)
    loss.backward()
    assert torch.equal(logits(model), expected)
    assert same(weights(model), base)


def test_parameters_copied_into_a_model_that_never_ran():
    """Averaging and weight synchronisation copy parameters as they stand in memory, resident blocks included."""
    source = make_trained()
    expected = logits(source)
    copied = peft.get_peft_model(make_base(), make_config()).eval()
    for theirs, ours in zip(copied.parameters(), source.parameters()):
        theirs.data.copy_(ours.data)
    assert torch.equal(logits(copied), expected)
    averaged = torch.optim.swa_utils.AveragedModel(peft.get_peft_model(make_base(), make_config()))
    averaged.update_parameters(source)
    assert torch.equal(logits(averaged.eval()), expected)


def test_an_adapter_added_between_forward_and_backward():
    expected = make_trained().train()
    expected(**BATCH).loss.backward()
    model = make_trained().train()
    loss = model(**BATCH).loss
    model.add_adapter("other", make_config(seed=1, budget=20))
    loss.backward()
    assert same(*({n: p.grad for n, p in m.named_parameters() if ".default." in n} for m in (model, expected)))


# Layers that cannot be written into -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_tied_weight_is_not_written_into():
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    embedding = base.model.embed_tokens.weight.detach().clone()
    head = base.lm_head.weight.detach().clone()
    config = make_config(target_modules=["lm_head"], init_weights=False, budget=5)
    model = peft.get_peft_model(base, config).eval()
    (layer,) = layers(model)
    assert not layer.resident
    hidden = torch.randn(3, 64)
    expected = hidden @ (head + layer.get_delta_weight("default")).T
    torch.testing.assert_close(layer(hidden), expected)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    with pytest.raises(InputError, match=r"own to merge into\. That of lm_head is shared"):
        model.merge_adapter()
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    with pytest.raises(InputError, match="shared with another module"):
        peft.get_peft_model(model.unload(), make_config(target_modules=["lm_head"], mode="resident"))


class TwoPlaces(nn.Module):
    """One layer under two names, or two whose weights are the same memory."""

    def __init__(self, one_layer: bool):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.other = self.q_proj if one_layer else nn.Linear(4, 4)
        self.other.weight = self.q_proj.weight if one_layer else nn.Parameter(self.q_proj.weight.data)


@pytest.mark.parametrize("one_layer", [True, False])
def test_blocks_do_not_act_where_the_weight_is_used_beside(one_layer):
    torch.manual_seed(0)
    base = TwoPlaces(one_layer)
    plain, x = copy.deepcopy(base.other), torch.randn(3, 4)
    model = peft.get_peft_model(base, small_config())
    assert not torch.equal(base.q_proj(x), plain(x))
    assert torch.equal(base.other(x), plain(x))
    assert isinstance(model.base_model.model.q_proj, SMTLinear)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)

    def forward(self, x):
        return self.q_proj(x)


def small_config(**changes):
    return SMTConfig(
        **(
            {"target_modules": ["q_proj"], "block_size": 2, "budget": 3, "criterion": "random", "init_weights": False}
            | changes
        )
    )


def test_hooks_and_forwards_of_the_base_layer_are_kept():
    calls = []
    x = torch.randn(3, 4)
    for change in ("hook", "later hook", "forward"):
        model = Small()
        if change == "hook":
            model.q_proj.register_forward_hook(lambda *a: calls.append("hook"))
        if change == "forward":
            original = model.q_proj.forward
            model.q_proj.forward = lambda x, original=original: 2 * original(x)
        base = model(x).detach()
        adapted = peft.get_peft_model(model, small_config())
        adapted(x)
        if change == "later hook":
            adapted.base_model.model.q_proj.base_layer.register_forward_hook(lambda *a: calls.append("later hook"))
        calls.clear()
        delta = adapted.base_model.model.q_proj.get_delta_weight("default")
        torch.testing.assert_close(adapted(x), base + x @ delta.T)
        assert calls == ([] if change == "forward" else [change])


def test_a_parametrised_weight_is_adapted_beside_it():
    model = Small()
    torch.nn.utils.parametrizations.weight_norm(model.q_proj)
    x = torch.randn(3, 4)
    base = model(x).detach()
    adapted = peft.get_peft_model(model, small_config())
    delta = adapted.base_model.model.q_proj.get_delta_weight("default")
    torch.testing.assert_close(adapted(x), base + x @ delta.T)


CONVERSIONS = {
    "pruned": lambda layer: prune.identity(layer, "weight"),
    "parametrised": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
}


@pytest.mark.parametrize("how", CONVERSIONS)
def test_converting_the_base_under_resident_blocks_is_refused(how):
    """What was converted may have the blocks in it, which would act twice."""
    model = make_trained()
    expected = logits(model)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    n_layers = len(layers(model))
    for layer in [*layers(model), *layers(merged)]:
        CONVERSIONS[how](layer.base_layer)
    for use in (logits, train, lambda model: model.state_dict(), lambda model: model.unload()):
        with pytest.raises(InputError, match="It has been quantised, pruned or parametrised since"):
            use(model)
    assert len(layers(model)) == n_layers
    assert torch.equal(logits(merged), expected)
    with pytest.raises(InputError, match="Convert the base before its adapters are made"):
        merged.unmerge_adapter()
    assert torch.equal(logits(merged.unload()), expected)


def test_blocks_under_data_parallel_name_the_launcher():
    layer = layers(make_trained())[0]
    layer.base_layer._is_replica = True  # as torch marks the copies that it makes for each GPU
    with pytest.raises(InputError, match=r"replica of nn\.DataParallel.*torchrun"):
        layer.restore()


def test_a_weight_in_parts_is_not_merged_into():
    layer = layers(make_trained(mode="additive"))[0]
    weight = layer.base_layer.weight  # as ZeRO-3 leaves it
    weight.ds_id, weight.ds_shape, weight.data = 0, weight.shape, torch.empty(0)
    with pytest.raises(InputError, match="Expected the whole weight .* is sharded or offloaded"):
        layer.check_merge()


def test_what_is_never_called_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    with pytest.raises(InputError, match="inside an nn.MultiheadAttention"):
        peft.get_peft_model(model, small_config(target_modules=["out_proj"]))


def test_an_offloaded_model_computes_the_same():
    from accelerate import cpu_offload

    model = make_trained()
    expected = logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_planning_under_a_default_device():
    for config in (make_config(criterion="random"), make_config(criterion="weight", policy="sampled")):
        expected = smtune.make_plan(make_base(), None, config)
        model = make_base()
        with torch.device("meta"):
            plan = smtune.make_plan(model, None, config)
            shuffled = plan.shuffled(1)
        assert plan.modules == expected.modules
        assert shuffled == expected.shuffled(1)


def test_wrapping_under_a_default_device():
    plan = smtune.make_plan(make_base(), None, make_config())
    model = make_base().to("meta")
    with torch.device("meta"):
        wrapped = peft.get_peft_model(model, make_config().with_plan(plan))
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == 12 * 16**2


def test_a_second_plan_by_weight_reads_the_base():
    config = {"criterion": "weight", "budget": 20}
    expected = smtune.make_plan(make_base(), None, make_config(**config))
    model = make_trained()
    logits(model)
    model.add_adapter("other", make_config(**config))
    assert model.peft_config["other"].get_plan().modules == expected.modules


# Switching and merging -------------------------------------------------------------------------------------------


@pytest.mark.support("PEFT", row="disable_adapter", column="{mode}", against="the base, bit for bit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_disabling_gives_the_base_back(dtype, mode):
    base, base_logits = weights(make_base(dtype)), logits(make_base(dtype))
    model = make_trained(dtype, mode)
    tuned = logits(model)
    assert not torch.equal(tuned, base_logits)
    with model.disable_adapter():
        assert same(weights(model), base)
        assert torch.equal(logits(model), base_logits)
    assert torch.equal(logits(model), tuned)


@pytest.mark.support(
    "PEFT", row="merge, unmerge", column="{mode}", against="the unmerged model's logits, and the base bit for bit"
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_merge_and_unmerge(dtype, mode):
    base = weights(make_base(dtype))
    model = make_trained(dtype, mode)
    tuned = logits(model)
    model.merge_adapter()
    if mode == "resident":
        assert torch.equal(logits(model), tuned)
    else:
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(logits(model), tuned, rtol=tolerance, atol=tolerance)
    merged = weights(model)
    logits(model)
    assert same(weights(model), merged)
    model.unmerge_adapter()
    assert same(weights(model), base)
    assert torch.equal(logits(model), tuned)


@pytest.mark.support("PEFT", row="merge_and_unload", column="{mode}", against="the unmerged model's logits")
@pytest.mark.parametrize("mode", MODES)
def test_merge_and_unload_is_a_plain_model(mode):
    model = make_trained(mode=mode)
    tuned = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    assert not layers(merged)
    assert not [name for name in merged.state_dict() if "smt" in name or "base_layer" in name]
    if mode == "resident":
        assert torch.equal(logits(merged), tuned)
    else:
        torch.testing.assert_close(logits(merged), tuned, rtol=1e-5, atol=1e-5)


@pytest.mark.support("PEFT", row="unload", column="{mode}", against="the base, bit for bit")
@pytest.mark.parametrize("mode", MODES)
def test_unload_gives_the_base_back(mode):
    model = make_trained(mode=mode)
    logits(model)
    unloaded = model.unload()
    assert same(weights(unloaded), weights(make_base()))
    assert not layers(unloaded)


def with_two(mode, dtype=torch.float32):
    """Two trained adapters, `default` and `other`, whose plans overlap without being the same."""
    model = make_trained(dtype, mode, budget=20)
    model.add_adapter("other", make_config(seed=1, mode=mode, budget=20))
    model.set_adapter("other")
    train(model)
    one, two = (model.peft_config[name].block_map() for name in ("default", "other"))
    shared = [set(one[m].pairs) & set(two[m].pairs) for m in one.keys() & two.keys()]
    assert any(shared)
    assert any(one[m].pairs != two[m].pairs for m in one.keys() & two.keys())
    return model.eval()


def dense_twin(model, names, dtype=torch.float32):
    """A fresh base with W = round(base + Σ deltas), added in fp32 in order."""
    twin = make_base(dtype)
    for module in dict.fromkeys(m for name in names for m in model.peft_config[name].block_map()):
        layer = model.get_submodule(f"base_model.model.{module}")
        weight = twin.get_submodule(module).weight
        total = torch.zeros_like(weight, dtype=torch.float32)
        for name in names:
            if name in layer.smt_blocks:
                total += layer.get_delta_weight(name)
        weight.data.copy_((weight.data.float() + total).to(dtype))
    return twin


def check_logits(model, expected, mode):
    """Against a dense twin's: bit for bit where blocks stand in W, else to the dtype's rounding."""
    if mode == "resident":
        assert torch.equal(logits(model), expected)
    else:
        tolerance = 1e-5 if expected.dtype == torch.float32 else 0.05
        torch.testing.assert_close(logits(model), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.support(
    "PEFT",
    row="two adapters: switching, both at once",
    column="{mode}",
    against="a dense model of the base plus the deltas",
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_adapters_switch_and_add(mode, dtype):
    base = weights(make_base(dtype))
    model = with_two(mode, dtype)
    for names in (["default"], ["other"], ["default", "other"], ["other", "default"], ["default"]):
        model.base_model.set_adapter(names)
        assert same(weights(model), base)
        check_logits(model, logits(dense_twin(model, names, dtype)), mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_deltas_of_16_bits_are_added_in_fp32(mode, dtype):
    """As after `model.to(torch.bfloat16)`, alone or beside an adapter that came later."""
    base = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    base.weight.fill_(-1.0)
    layer = SMTLinear(base, mode, "layer")
    for name, value, own in (("a", 1.0, torch.bfloat16), ("b", 2.0**-9, dtype)):
        layer.update_layer(name, BlockIndex.from_pairs(BlockGrid(8, 8, 4), [(0, 1)]))
        layer.smt_blocks[name].weight.data = torch.full((1, 4, 4), value, dtype=own)
    layer.set_adapter(["a", "b"])
    weight = layer(torch.eye(8, dtype=torch.bfloat16)).T
    assert (weight[:4, 4:] == (2.0**-9 if mode == "resident" else 0.0)).all()  # 1 + 2⁻⁹ is 1 in bf16
    assert (weight[4:] == -1.0).all()


@pytest.mark.parametrize("mode", MODES)
def test_two_active_adapters_both_learn(mode):
    model = with_two(mode)
    model.base_model.set_adapter(["default", "other"])
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model)
    assert {name.split(".")[-2] for name in before} == {"default", "other"}
    assert all(not torch.equal(dict(model.named_parameters())[name], value) for name, value in before.items())


@pytest.mark.parametrize("names", [["default"], ["default", "other"]])
def test_training_after_a_first_use_in_inference_mode(names):
    model = peft.get_peft_model(make_base(), make_config(budget=20))
    model.add_adapter("other", make_config(seed=1, budget=20))
    model.base_model.set_adapter(names)
    with torch.inference_mode():
        model(input_ids=IDS)
    before = logits(model)
    train(model)
    assert not torch.equal(logits(model), before)


def test_positions_travel_without_what_was_copied_to_a_device():
    model = with_two("resident")
    model.base_model.set_adapter(["default", "other"])
    logits(model)

    def kept(model):
        sets = [each for layer in layers(model) for each in layer._active_sets.values()]
        return [slots._on for each in sets for slots in each.slots if slots is not None]

    assert any(kept(model))
    twin = pickle.loads(pickle.dumps(model))
    assert len(kept(twin)) == len(kept(model))
    assert not any(kept(twin))
    assert torch.equal(logits(twin), logits(model))


def test_no_forward_of_another_thread_sees_the_base_in_between(monkeypatch):
    """With a second adapter loaded too, all that a forward writes into a layer's weight goes in one call."""
    model = with_two("resident")
    model.set_adapter("default")
    expected, seen = logits(model), []

    def write(weight, index, values):
        seen.append(weight.data_ptr())
        return scatter_(weight, index, values)

    monkeypatch.setattr("smtune.tuner.layer.scatter_", write)
    assert torch.equal(logits(model), expected)
    assert seen
    assert len(seen) == len(set(seen))


def test_an_unfrozen_weight_under_resident_blocks_is_refused():
    model = make_trained(mode="resident").requires_grad_(True)
    with pytest.raises(InputError, match=r"q_proj requires a gradient, and what it learned would not last"):
        model(**BATCH)
    logits(model)  # without gradients nothing is missed
    beside = make_trained(mode="additive").requires_grad_(True)
    beside(**BATCH).loss.backward()
    assert all(parameter.grad is not None for parameter in beside.parameters())


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
def test_training_the_base_under_inactive_blocks_is_refused():
    """The originals are copied into it, so what it learned there would be lost."""
    model = peft.get_peft_model(make_base(), make_config(mode="resident"))
    model.disable_adapter_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".smt_blocks." not in name)
    with pytest.raises(InputError, match="would not last where blocks are: freeze it"):
        model(**BATCH)
    logits(model)
    model.delete_adapter("default")
    base = model.base_model.model
    train(base, steps=1)
    trained = weights(base)
    logits(base)
    assert same(weights(base), trained)


def test_autocast_keeps_no_cast_of_an_unfrozen_weight():
    model = with_two("resident").requires_grad_(True)
    seen = []
    for names in (["default", "other"], ["other"]):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # which keeps casts until it ends
            for name in names:
                model.set_adapter(name)
                seen.append(logits(model))
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_adapters_of_two_block_sizes_are_refused_before_anything_changes():
    model = make_trained()
    expected, keys = logits(model), list(model.state_dict())
    with pytest.raises(InputError, match="block size for all adapters of a layer: 16, that of 'default'. Got 8"):
        model.add_adapter("other", make_config(block_size=8, budget=40))
    assert list(model.peft_config) == ["default"]
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), expected)


@pytest.mark.support(
    "PEFT",
    row="merging several adapters in any order",
    column="{mode}",
    against="a dense model of the base plus the deltas",
)
@pytest.mark.parametrize("order", [["default"], ["other"], ["default", "other"], ["other", "default"]])
@pytest.mark.parametrize("mode", MODES)
def test_merging_in_any_order_and_back(mode, order):
    base = weights(make_base())
    model = with_two(mode)
    model.base_model.set_adapter("default")
    logits(model)  # `default` is resident when others are merged
    model.merge_adapter(adapter_names=order[:1])
    for name in order[1:]:
        with pytest.warns(UserWarning, match="additionally merging"):
            model.merge_adapter(adapter_names=[name])
    twin = dense_twin(model, order)
    assert same(weights(model), weights(twin))
    assert torch.equal(logits(model), logits(twin))
    model.unmerge_adapter()
    assert same(weights(model), base)


@pytest.mark.parametrize("mode", MODES)
def test_merging_an_inactive_adapter_takes_out_the_active_one_in_every_layer(mode):
    options = {"mode": mode, "init_weights": False}
    model = peft.get_peft_model(make_base(), make_config(target_modules=["q_proj"], **options)).eval()
    model.add_adapter("b", make_config(target_modules=["v_proj"], **options))
    before = logits(model)
    model.merge_adapter(adapter_names=["b"])
    assert torch.equal(logits(model), logits(dense_twin(model, ["b"])))
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter()
    assert torch.equal(logits(model), logits(dense_twin(model, ["b", "default"])))
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    assert same(weights(copy.deepcopy(model).unload()), weights(make_base()))
    with pytest.raises(InputError, match="Expected names of adapters: default, b. Got 'defalt'. Did you mean"):
        model.merge_adapter(adapter_names=["defalt"])
    assert torch.equal(logits(model), before)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_a_merge_that_fails_in_one_layer_changes_none(method, mode):
    torch.manual_seed(0)
    tied = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    targets = {"target_modules": ["q_proj", "lm_head"], "budget": 40, "init_weights": False}
    shared = peft.get_peft_model(tied, make_config(**targets))
    broken = make_trained(mode=mode)
    layers(broken)[-1].smt_blocks["default"].weight.data[0, 0, 0] = torch.nan
    for model, options, message in (
        (shared, {}, "That of lm_head is shared with another module"),
        (broken, {"safe_merge": True}, "NaNs detected in the merged weights"),
    ):
        with model.disable_adapter():
            base, n_layers = weights(model), len(layers(model))
        with pytest.raises(ValueError, match=message):
            getattr(model, method)(**options)
        assert len(layers(model)) == n_layers
        assert not any(layer.merged for layer in layers(model))
        assert same(weights(model), base)
    assert mode == "resident" or all(layer.smt_originals is None for layer in layers(broken))


@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_an_adapter_to_a_merged_model(dtype):
    base = weights(make_base(dtype))
    model = make_trained(dtype)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("other", make_config(seed=1, budget=20))
    assert same(weights(model), base)
    model.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits(model), logits(dense_twin(model, ["default"], dtype)))


def test_a_plan_by_weight_for_a_merged_model_is_of_the_base():
    config = {"criterion": "weight", "budget": 20}
    expected = smtune.make_plan(make_base(), None, make_config(**config))
    model = make_trained()
    for layer in layers(model):
        layer.smt_blocks["default"].weight.data.mul_(100)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("other", make_config(**config))
    assert model.peft_config["other"].get_plan().modules == expected.modules


@pytest.mark.parametrize("mode", MODES)
def test_a_merged_or_disabled_model_may_be_moved_and_added_to(mode):
    model = make_trained(mode=mode, budget=40)
    assert any(layer._shared is not None for layer in layers(model))
    tuned = logits(model)
    model.merge_adapter()
    merged = logits(model)
    model.to("cpu")
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    model.base_model.set_adapter("default")
    model.add_adapter("other", make_config(seed=1, mode=mode, budget=40))
    assert torch.equal(logits(model), logits(make_base()))
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), tuned)


def test_disabling_unmerges():
    base = weights(make_base())
    model = make_trained()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(make_base()))
    assert same(weights(model), base)


@pytest.mark.support(
    "PEFT", row="delete_adapter", column="{mode}", against="the other adapter's logits before, and the base"
)
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
@pytest.mark.parametrize("mode", MODES)
def test_deleting(mode):
    base = weights(make_base())
    model = with_two(mode)
    model.base_model.set_adapter("default")
    expected = logits(model)
    model.base_model.set_adapter("other")
    logits(model)
    model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), expected)
    assert not [name for name in model.state_dict() if ".other." in name]
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), logits(make_base()))
    assert same(weights(model), base)


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
def test_deleting_with_adapters_on_different_layers():
    model = peft.get_peft_model(make_base(), make_config(target_modules=["q_proj"], init_weights=False))
    for name, target in (("b", "k_proj"), ("a", "v_proj")):
        model.add_adapter(name, make_config(target_modules=[target], init_weights=False))
    with pytest.warns(UserWarning, match="active adapter to a"):
        model.delete_adapter("default")
    assert model.active_adapters == ["a"]
    assert {tuple(layer.active_adapters) for layer in layers(model)} == {("a",)}
    assert torch.equal(logits(model), logits(dense_twin(model, ["a"])))


def test_safe_merge_refuses_what_is_not_finite():
    model = make_trained()
    layer = layers(model)[-1]
    base = make_base().get_submodule(layer._name).weight
    layer.smt_blocks["default"].weight.data[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, base)
    assert not layer.merged


def test_safe_merge_looks_at_the_result():
    model = make_trained(torch.float16)
    layer = layers(model)[0]
    layer.smt_blocks["default"].weight.data[0, 0, 0] = 1e6  # finite, but not in fp16
    with pytest.raises(ValueError, match="infinity.*float16 too narrow"):
        layer.merge(safe_merge=True)


# Saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.support("PEFT", row="save and load", column="{mode}", against="the saved model's logits, bit for bit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load_is_bit_identical(tmp_path, dtype, mode, low_cpu_mem_usage):
    model = make_trained(dtype, mode)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_base(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), expected)
    deltas = {name: p for name, p in loaded.named_parameters() if ".smt_blocks." in name}
    assert deltas
    for name, parameter in deltas.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, dict(model.named_parameters())[name])


def test_what_is_saved(tmp_path):
    from safetensors.torch import load_file

    model = make_trained(torch.bfloat16)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "SMT"
    assert smtune.Plan.from_dict(config["plan"]) == model.peft_config["default"].get_plan()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"weight", "index"}
    assert sum(t.numel() for name, t in tensors.items() if name.endswith("weight")) == 12 * 16**2
    assert not [name for name in tensors if "base_layer" in name or "originals" in name]


def test_auto_peft_model(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = train(peft.get_peft_model(base, make_config())).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.support(
    "PEFT", row="load_adapter onto an adapter", column="{mode}", against="the saved model's logits, bit for bit"
)
@pytest.mark.parametrize("mode", MODES)
def test_loading_onto_an_existing_name(tmp_path, mode):
    """What Trainer does to resume and to load its best model."""
    model = make_trained(mode=mode)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    train(model)
    assert not torch.equal(logits(model.eval()), expected)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(model.eval()), expected)


def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    """Resuming with another plan of the same shape would land deltas on the wrong blocks without an error."""
    from safetensors.torch import load_file, save_file

    model = make_trained()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if name.endswith("index") and len(tensor) > 1)
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="trains other blocks"):
        model.load_adapter(tmp_path, "default")


def test_a_checkpoint_of_other_layers_is_refused(tmp_path):
    peft.get_peft_model(make_base(), make_config(target_modules=["k_proj"])).save_pretrained(tmp_path)
    model = peft.get_peft_model(make_base(), make_config(target_modules=["v_proj"]))
    with pytest.raises(InputError, match="trains other layers, such as .*k_proj"):
        model.load_adapter(tmp_path, "default")
    model.load_adapter(tmp_path, "other")


def test_a_state_dict_holds_the_base_and_loads_into_a_fresh_model():
    model = make_trained()
    expected = logits(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = weights(make_base())
    for name, tensor in state.items():
        if ".smt_blocks." not in name:
            assert torch.equal(tensor, base[name.replace("base_model.model.", "").replace(".base_layer", "")])
    fresh = peft.get_peft_model(make_base(), make_config())
    logits(fresh)  # originals are taken, blocks stand
    fresh.load_state_dict(state)
    assert torch.equal(logits(fresh), expected)


def test_loading_other_base_weights_moves_the_base():
    model = make_trained()
    logits(model)
    shifted = {name: t + 0.5 if name.endswith("base_layer.weight") else t for name, t in model.state_dict().items()}
    model.load_state_dict(shifted)
    logits(model)
    with model.disable_adapter():
        for name, value in weights(model).items():
            key = f"base_model.model.{name.removesuffix('.weight')}.base_layer.weight"
            assert torch.equal(value, shifted.get(key, value))


def test_copy_and_pickle():
    model = make_trained()
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


def test_biases_are_kept():
    base = make_base(kind="qwen2")
    expected = logits(base)
    model = peft.get_peft_model(make_base(kind="qwen2"), make_config())
    assert torch.equal(logits(model), expected)
    train(model)
    twin = make_base(kind="qwen2")
    for module in model.peft_config["default"].block_map():
        twin.get_submodule(module).weight.data += model.get_submodule(f"base_model.model.{module}").get_delta_weight(
            "default"
        )
    assert torch.equal(logits(model.eval()), logits(twin))


@pytest.mark.support(
    "PEFT",
    row="modules_to_save, trainable_token_indices",
    column="{mode}",
    against="the saved model's logits, bit for bit",
)
@pytest.mark.parametrize("mode", MODES)
def test_further_modules_train_and_travel(tmp_path, mode):
    further = {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5]}
    model = peft.get_peft_model(make_base(), make_config(mode=mode, **further))
    train(model)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_base(), tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert not torch.equal(loaded.base_model.model.lm_head.weight.detach(), make_base().lm_head.weight.detach())
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), logits(make_base()))


def test_what_is_trained_besides_is_saved_when_frozen_too(tmp_path):
    config = make_config(modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    model = train(peft.get_peft_model(make_base(), config)).eval()
    expected = logits(model)
    model.requires_grad_(False)
    model.save_pretrained(tmp_path, state_dict=smtune.trained_state_dict(model))
    assert torch.equal(logits(peft.PeftModel.from_pretrained(make_base(), tmp_path).eval()), expected)


def test_mode_is_checked_against_the_layer():
    class Odd(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(InputError, match=r"plain nn\.Linear"):
        SMTLinear(Odd(4, 4), mode="resident", name="odd")
    assert not SMTLinear(Odd(4, 4), mode="auto").resident
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, args, y: y)
    with pytest.raises(InputError, match="Got Linear at q, with a forward that is hooked or replaced"):
        SMTLinear(hooked, mode="resident", name="q")
    assert SMTLinear(nn.Linear(4, 4), mode="auto").resident


@pytest.mark.parametrize(("first", "second"), [("resident", "additive"), ("additive", "resident")])
def test_a_second_adapter_acts_as_the_first(first, second):
    model = peft.get_peft_model(make_base(), make_config(mode=first))
    with pytest.raises(InputError, match=f'Expected mode="{first}"'):
        model.add_adapter("second", make_config(mode=second))


def test_an_index_is_where_its_blocks_are():
    places = BlockIndex.from_pairs(BlockGrid(32, 32, 16), [(0, 0), (1, 1)])
    blocks = Blocks(places, torch.float32, torch.device("meta"), init_weights=True)
    assert blocks.index.device == blocks.weight.device


@pytest.mark.parametrize("published", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mode", MODES)
def test_originals_take_16_bits_where_those_hold_them(mode, published):
    base = make_base()
    for parameter in base.parameters():
        parameter.data.copy_(parameter.data.to(published))
    before = copy.deepcopy(base.state_dict())
    model = peft.get_peft_model(base, make_config(mode=mode, init_weights=False))
    layers = [module for module in model.modules() if isinstance(module, SMTLinear)]
    if mode == "resident":
        assert {layer.smt_originals.dtype for layer in layers} == {published}
    else:  # nothing is written, so nothing need be kept
        assert all(layer.smt_originals is None for layer in layers)
    model.merge_adapter()
    assert {layer.smt_originals.dtype for layer in layers} == {published}
    model.unmerge_adapter()
    assert mode == "resident" or all(layer.smt_originals is None for layer in layers)
    after = model.unload().state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
