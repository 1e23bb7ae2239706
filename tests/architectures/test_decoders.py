"""SMT on causal decoders of transformers, against the same model trained whole with masked gradients."""

from __future__ import annotations

import copy
import math
from functools import lru_cache, partial
from typing import Any

import peft
import pytest
from decoders import DECODERS, batches, build
from dense_twin import check_targets, check_training, twin
from transformers import AutoConfig

import smtune
from smtune import SMTConfig
from smtune.depth import backward_costs
from smtune.errors import InputError
from smtune.tuner import SMTLinear
from smtune.tuner.targets import ATTENTION, find_targets
from smtune.weights import shape_OI

OTHERS = {"bart", "bert", "distilbert", "electra", "modernbert", "roberta", "t5", "vit"}
"""Architectures of test_others.py."""

OWN_FORWARD = ("Falcon", "Falcon, multi-query", "Falcon, multi-head")
"""Their linear layers have a forward of their own, which resident mode would replace: blocks act beside the weight."""

RARER = {
    *("AFMoE", "CWM", "OLMo Hybrid", "Qwen3.5-MoE", "Solar Open", "Youtu"),
    *("Bamba", "DBRX", "DiffLlama", "Doge", "dots1", "ERNIE 4.5 MoE", "Falcon-H1", "FlexOlmo", "Gemma 3n", "GLM 4 MoE"),
    *("GraniteMoeHybrid", "HunYuan V1 MoE", "Jais 2", "Jamba", "LFM2", "MiniCPM3", "MiniMax M2", "Ministral 3"),
    *("nanochat", "OpenAI GPT", "RecurrentGemma", "VaultGemma", "XGLM"),
}
"""Tested nightly only."""

CASES = [
    pytest.param(architecture, mode, marks=[pytest.mark.nightly] * (architecture in RARER), id=f"{architecture}-{mode}")
    for architecture in DECODERS
    for mode in ("resident", "additive")
    if mode == "additive" or architecture not in OWN_FORWARD
]

cached_twin = lru_cache(maxsize=1)(lambda name: twin(build(name), batches()))


def test_every_default_has_a_case():
    assert DECODERS.keys() >= RARER
    assert {model_type for model_type, _ in DECODERS.values()} | OTHERS == ATTENTION.keys()


@pytest.mark.support(
    "Architectures", row="{architecture}", column="{mode}", against="the dense model with masked gradients"
)
@pytest.mark.parametrize(("architecture", "mode"), CASES)
def test_decoder(architecture, mode, tmp_path):
    expected = cached_twin(architecture)
    check_targets(expected.base, expected.plan)
    check_training(expected, mode, tmp_path)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:No layer to choose blocks from matches 2 of layers")  # which has no attention
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("architecture", "mode"), CASES)
def test_deeper_decoder_under_checkpointing(architecture, use_reentrant, mode, tmp_path):
    """Only the upper layers are trained, so the backward ends above the lower ones."""
    base = build(architecture, layers=4)
    if not base.supports_gradient_checkpointing:
        pytest.skip("transformers has no checkpointing for it")

    def checkpoint(model):
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()

    expected = twin(base, batches(), before_training=checkpoint, layers_to_transform=[2, 3])
    check_training(expected, mode, tmp_path, before_training=checkpoint)


HELPERS = {"Gemma 3n": ("altup", "laurel", "per_layer"), "Gemma 4": ("per_layer_model",)}
"""Parts of names of linear layers beside the decoder's own, which are made in another order than they are used in."""

BY_DAY = {
    "Llama",
    "Phi-3 and Phi-4",
    "GPT-J",
    "GPT-NeoX",
    "Cohere",
    "Falcon",
    "Falcon-H1",
    "Qwen3.5",
    "DeepSeek V3",
    "Gemma 4",
}
"""One of each kind of order; the others are nightly."""

IN_BRANCHES = ("DeepSeek V2", "DeepSeek V2 Lite", "DeepSeek V3", "Doge", "MiniCPM3", "Youtu", *HELPERS)
"""Their attention has branches, so that one of them counts as below the other."""


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[pytest.mark.nightly] * (name not in BY_DAY)) for name in DECODERS]
)
def test_costs_follow_the_data(architecture):
    """Against the dX that autograd computes with one layer trained: never too low, and exact for q, k and v."""
    model: Any = build(architecture).requires_grad_(False).train()
    shapes = {name: shape_OI(module) for name, module in model.named_modules()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if shape is not None}
    linears = {name: model.get_submodule(name) for name in sizes}
    trained = {name: module for name, module in linears.items() if module is not model.get_output_embeddings()}
    has_dx: dict[str, bool] = {}

    def see(module, args, name):
        has_dx[name] = has_dx.get(name, False) or args[0].requires_grad

    for name, module in linears.items():
        module.register_forward_pre_hook(partial(see, name=name))
    above = {}
    for name, module in trained.items():
        has_dx.clear()
        module.weight.requires_grad_(True)
        model(**batches()[0], use_cache=False)
        module.weight.requires_grad_(False)
        if name in has_dx:
            above[name] = {other for other, is_above in has_dx.items() if is_above}

    costs = backward_costs(model, linears)
    helpers = HELPERS.get(architecture, ())
    followed = [name for name in above if not any(part in name for part in helpers)]
    assert followed
    for name in followed:
        assert all(costs[other] < costs[name] for other in above[name] if not any(part in other for part in helpers))

    targets = [name for name in find_targets(model, SMTConfig(block_size=1)) if name in above]
    chains = {name: sum(sizes[other] for other in above[name]) for name in targets}
    expected = {name: chain / max(chains.values()) for name, chain in chains.items()}
    counted = backward_costs(model, targets)
    assert (counted == expected) is (architecture not in IN_BRANCHES)


@pytest.mark.parametrize("architecture", OWN_FORWARD)
def test_layers_with_a_forward_of_their_own_are_additive(architecture):
    expected = cached_twin(architecture)
    config = expected.config.with_plan(expected.plan)
    model = peft.get_peft_model(copy.deepcopy(expected.base), config)
    assert not any(layer.resident for layer in model.modules() if isinstance(layer, SMTLinear))
    config.mode = "resident"
    with pytest.raises(InputError, match=r'Got FalconLinear at .*: use mode="additive", or "auto"'):
        peft.get_peft_model(copy.deepcopy(expected.base), config)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba"])
def test_models_without_attention_are_refused(model_type):
    from transformers import AutoModelForCausalLM

    config = AutoConfig.for_model(
        model_type, hidden_size=32, num_hidden_layers=1, vocab_size=48, state_size=8, head_dim=16, num_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=r"Expected a model with attention.*in_proj"):
        smtune.make_plan(model, batches(), smtune.SMTConfig(block_size=8, budget=2))
