"""The backward ends at the lowest trained layer: counted, under every kind of checkpointing, whoever asks for what."""

from __future__ import annotations

from functools import partial

import peft
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import smtune
from smtune import SMTConfig

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 64,
    "vocab_size": 80,
    "attn_implementation": "eager",
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "grouped queries": lambda: LlamaForCausalLM(LlamaConfig(**(SIZES | {"num_key_value_heads": 1}))),
    "tied embeddings": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "smollm2, reduced": lambda: LlamaForCausalLM(
        LlamaConfig(
            **(SIZES | {"num_key_value_heads": 1, "intermediate_size": 128}),
            tie_word_embeddings=True,
            rope_theta=100_000,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
        )
    ),
    "qwen2, with biases": lambda: Qwen2ForCausalLM(Qwen2Config(**(SIZES | {"num_key_value_heads": 1}))),
}
IDS = torch.arange(2 * 8).view(2, 8)
TOKENS = IDS.numel()
BATCH = {"input_ids": IDS, "labels": IDS, "use_cache": False}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHECKPOINTING = [None, {"use_reentrant": False}, {"use_reentrant": True}]


def make_base(kind="llama"):
    torch.manual_seed(0)
    return MODELS[kind]().train()


def plan_of(base, *names):
    """A plan of one block in each of the named modules, all projections being targeted."""
    config = SMTConfig(
        target_modules=PROJECTIONS, block_size=16, budget=len(names), criterion="random", policy="global"
    )
    scores = smtune.score_blocks(base, None, config)
    for name in names:
        scores[name][0, 0] = 10.0
    plan = smtune.select_blocks(scores, config, base.num_parameters())
    assert {name for name, module in plan.modules.items() if module.rows} == set(names)
    return plan


def config_of(base, *names, **changes):
    return SMTConfig(target_modules=PROJECTIONS, **changes).with_plan(plan_of(base, *names))


def name_of(layer, projection):
    parent = "self_attn" if projection in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.layers.{layer}.{parent}.{projection}"


def backward_products(model):
    """FLOPs of one backward: (of products with weight matrices, of block gradients). Attention's are bmm."""
    loss = model(**BATCH).loss
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    blocks = sum(count for op, count in counts.items() if str(op).startswith("smtune."))
    return products, blocks


def linear_sizes(base):
    return {name: module.weight.numel() for name, module in base.named_modules() if isinstance(module, nn.Linear)}


def whole_chain(base):
    """FLOPs of all dX products but those of the lowest q, k and v."""
    lowest = [name_of(0, projection) for projection in ("q_proj", "k_proj", "v_proj")]
    return 2 * TOKENS * sum(size for name, size in linear_sizes(base).items() if name not in lowest)


# The count ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_the_counted_cost_is_what_a_backward_does(kind, layer, projection):
    base = make_base(kind)
    whole = whole_chain(base)
    names = {name_of(layer, projection), name_of(2, "down_proj")}
    config = config_of(base, *names)
    products, blocks = backward_products(peft.get_peft_model(base, config))
    cost = config.plan["backward_cost"]
    assert products == pytest.approx(cost * whole, rel=1e-12)
    assert cost < 1 or layer == 0
    assert blocks == 2 * TOKENS * 16**2 * len(names)


# Where it ends --------------------------------------------------------------------------------------------------------


def wrapped(base, config, checkpointing=None, asked=True, first=False):
    """The PEFT model, with checkpointing enabled before or after the wrapping, on whichever of the two there is."""

    def enable(model):
        if checkpointing is not None:
            model.activation_checkpointing_enable(checkpointing)
        elif asked:
            model.enable_input_require_grads()

    if first:
        enable(base)
        return peft.get_peft_model(base, config)
    model = peft.get_peft_model(base, config)
    enable(model)
    return model


def gradients(model):
    model.zero_grad()
    model(**BATCH).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-8)


def saved_below(model, lowest):
    """Bytes that one forward saves for the backward before it comes to layer `lowest`."""
    base = model.get_base_model()
    reached, saved = [], []

    def pack(tensor):
        if not reached and not isinstance(tensor, nn.Parameter):
            saved.append(tensor.nbytes)
        return tensor

    hook = base.model.layers[lowest].register_forward_pre_hook(lambda *_: reached.append(True))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**BATCH).loss.backward()
    hook.remove()
    return sum(saved)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("first", [False, True], ids=["after wrapping", "before wrapping"])
@pytest.mark.parametrize(("layer", "projection"), [(0, "q_proj"), (1, "v_proj"), (2, "up_proj")])
def test_it_ends_there_under_checkpointing(checkpointing, first, layer, projection):
    names = name_of(layer, projection), name_of(2, "down_proj")
    expected = gradients(peft.get_peft_model(make_base(), config_of(make_base(), *names)))
    assert len(expected) == 2

    base = make_base()
    config = config_of(base, *names)
    sizes, whole = linear_sizes(base), whole_chain(base)
    model = wrapped(base, config, checkpointing, first=first)
    assert_same(gradients(model), expected)
    assert saved_below(model, layer) == 0
    products, _ = backward_products(model)
    chain = config.plan["backward_cost"] * whole
    recomputed = (
        2 * TOKENS * sum(size for name, size in sizes.items() if name != "lm_head" and int(name.split(".")[2]) >= layer)
    )
    if checkpointing is None:
        assert products == pytest.approx(chain)
    elif checkpointing["use_reentrant"]:  # each layer again, and dX of all its products
        assert products == 2 * recomputed + 2 * TOKENS * sizes["lm_head"]
    else:  # each layer again, at most: the recomputation stops once all that was saved is there
        assert chain < products <= chain + recomputed


@pytest.mark.parametrize("layer", [0, 2])
def test_non_reentrant_checkpointing_costs_what_it_does_unasked(layer):
    counts = []
    for asked in (True, False):
        base = make_base()
        model = peft.get_peft_model(base, config_of(base, name_of(layer, "q_proj")))
        model.activation_checkpointing_enable({"use_reentrant": False})
        if not asked:
            model.disable_input_require_grads()
        counts.append(backward_products(model))
    assert counts[0] == counts[1]


def test_it_follows_the_active_adapters():
    base = make_base()
    high, low = config_of(base, name_of(2, "q_proj")), config_of(base, name_of(1, "up_proj"))
    high_cost, low_cost = (config.plan["backward_cost"] for config in (high, low))
    whole = whole_chain(base)

    model = wrapped(base, high)
    assert backward_products(model)[0] == pytest.approx(high_cost * whole)
    model.add_adapter("low", low)
    assert backward_products(model)[0] == pytest.approx(high_cost * whole)
    model.set_adapter("low")
    assert backward_products(model)[0] == pytest.approx(low_cost * whole)
    model.base_model.set_adapter(["default", "low"])
    assert backward_products(model)[0] == pytest.approx(low_cost * whole)
    model.delete_adapter("low")
    assert backward_products(model)[0] == pytest.approx(high_cost * whole)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize(
    "also",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["input_layernorm"]},
        {"trainable_token_indices": [3, 4]},
    ],
    ids=str,
)
def test_whatever_else_is_trained_gets_its_gradient(checkpointing, also):
    def make():
        base = make_base()
        return base, config_of(base, name_of(2, "q_proj"), **also)

    expected = gradients(peft.get_peft_model(*make()))
    assert len(expected) > 1
    assert_same(gradients(wrapped(*make(), checkpointing)), expected)


def test_it_can_be_switched_off():
    base = make_base()
    config = config_of(base, name_of(2, "q_proj"))
    model = wrapped(base, config, {"use_reentrant": True})
    expected = gradients(model)
    model.activation_checkpointing_disable()
    model.disable_input_require_grads()
    assert not base.get_input_embeddings()(IDS).requires_grad
    assert_same(gradients(model), expected)
    assert not any(layer._forward_pre_hooks for layer in base.model.layers)


def test_embeddings_that_the_caller_passes_in_keep_their_gradient():
    base = make_base()
    model = wrapped(base, config_of(base, name_of(2, "q_proj")))
    embeddings = base.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=IDS).loss.backward()
    assert embeddings.grad.abs().sum() > 0


def test_a_layer_that_is_checkpointed_from_outside_still_gets_its_gradient():
    class Outside(LlamaDecoderLayer):
        def __call__(self, hidden_states, **kwargs):  # as transformers did before 5.23: hooks run inside
            return checkpoint(partial(super().__call__, **kwargs), hidden_states, use_reentrant=True)

    base = make_base()
    config = config_of(base, name_of(2, "q_proj"))
    expected = gradients(peft.get_peft_model(make_base(), config))
    model = wrapped(base, config)
    for layer in base.model.layers:
        layer.__class__ = Outside
    assert_same(gradients(model), expected)


class GradientCheckpointingLayer(LlamaDecoderLayer):
    """A layer as in transformers before 5.23."""

    def __call__(self, hidden_states, **kwargs):
        run = partial(super().__call__, **kwargs)
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(run, hidden_states)
        return run(hidden_states)

    def forward(self, hidden_states, **kwargs):
        return LlamaDecoderLayer.forward.__wrapped__(self, hidden_states, **kwargs)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=["none", "non-reentrant", "reentrant"])
def test_it_ends_there_in_older_transformers(checkpointing):
    base = make_base()
    config = config_of(base, name_of(2, "q_proj"))
    expected = gradients(peft.get_peft_model(make_base(), config))
    model = wrapped(base, config, checkpointing)
    for layer in base.model.layers:
        layer.__class__ = GradientCheckpointingLayer
    assert_same(gradients(model), expected)
    products, _ = backward_products(model)
    chain = config.plan["backward_cost"] * whole_chain(base)
    if checkpointing is None:
        assert saved_below(model, 2) == 0
        assert products == pytest.approx(chain)
    elif not checkpointing["use_reentrant"]:  # the lowest trained layer again, at most
        layer = sum(size for name, size in linear_sizes(base).items() if name.startswith("model.layers.2."))
        assert chain < products <= chain + 2 * TOKENS * layer
    scored = smtune.score_blocks(model.unload(), [BATCH], SMTConfig(block_size=16, warmup_steps=1))
    assert all(scores.sum() > 0 for scores in scored.values())


def test_checkpointing_is_as_it_was_after_each_forward():
    base = make_base()
    model = wrapped(base, config_of(base, name_of(2, "q_proj")), {"use_reentrant": True})
    functions = [layer._gradient_checkpointing_func for layer in base.model.layers]
    gradients(model)
    assert all(layer.gradient_checkpointing for layer in base.model.layers)
    assert [layer._gradient_checkpointing_func for layer in base.model.layers] == functions
