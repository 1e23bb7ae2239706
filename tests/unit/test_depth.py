"""What a backward costs, counted against sums by hand; where it ends is in tests/contract/test_backward_end.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from smtune.depth import backward_costs, backward_end, siblings
from smtune.tuner.targets import ATTENTION

Q, KV, OUT, GATE = 64 * 64, 32 * 64, 64 * 64, 128 * 64  # of `tiny_llama`: up and down are as large as gate
HEAD = 256 * 64
LAYER = Q + 2 * KV + OUT + 3 * GATE


def test_siblings_read_one_input():
    assert siblings("model.layers.0.self_attn.k_proj") >= {"q_proj", "k_proj", "v_proj"}
    assert siblings("model.layers.0.self_attn.q_a_proj") == siblings("model.layers.0.self_attn.kv_a_proj_with_mqa")
    assert siblings("model.layers.0.self_attn.kv_b_proj") == {"kv_b_proj"}
    assert siblings("encoder.layer.0.attention.self.value") >= {"query", "key", "value"}
    assert siblings("model.layers.0.mlp.up_proj") >= {"gate_proj", "up_proj"}
    assert siblings("model.layers.0.mlp.down_proj") == {"down_proj"}
    assert siblings("lm_head") == {"lm_head"}


def test_every_architecture_with_q_k_and_v_of_its_own_shares_their_input():
    for name, layouts in ATTENTION.items():
        by_kind = {kind: last for last, kind in layouts.items() if isinstance(kind, str)}
        if len(layouts) == 3 and by_kind.keys() == {"q", "k", "v"}:
            assert siblings(by_kind["q"]) >= set(layouts), name


def test_costs_of_transposed_layers_by_hand():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=48, vocab_size=64, n_positions=16)
    model = GPT2LMHeadModel(config)
    out, mlp, head = 32 * 32, 32 * 48, 64 * 32
    layer = 96 * 32 + out + 2 * mlp
    costs = backward_costs(model, ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"])
    above = [out + 2 * mlp + layer + head, out + 2 * mlp + head]
    assert [*costs.values()] == [1, above[1] / above[0]]


def test_costs_of_a_llama_by_hand(tiny_llama):
    above = {
        "model.layers.0.self_attn.k_proj": OUT + 3 * GATE + LAYER + HEAD,
        "model.layers.0.self_attn.o_proj": 3 * GATE + LAYER + HEAD,
        "model.layers.0.mlp.up_proj": GATE + LAYER + HEAD,
        "model.layers.0.mlp.down_proj": LAYER + HEAD,
        "model.layers.1.self_attn.q_proj": OUT + 3 * GATE + HEAD,
        "lm_head": 0,
    }
    whole = max(above.values())
    assert backward_costs(tiny_llama, above) == {name: size / whole for name, size in above.items()}


def test_the_whole_is_the_chain_of_the_lowest_target(tiny_llama):
    names = ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"]
    assert backward_costs(tiny_llama, names) == {names[0]: 1.0, names[1]: HEAD / (GATE + HEAD)}
    assert backward_costs(tiny_llama, ["lm_head"]) == {"lm_head": 0.0}


def test_siblings_cost_the_same_in_whatever_order_they_stand():
    sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    opt = OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=32, word_embed_proj_dim=32))  # registers k, v, q
    names = [f"model.decoder.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert backward_costs(opt, names) == dict.fromkeys(names, 1.0)


def test_what_is_nested_between_two_layers_stands_between_them():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(2, 3)
            self.inner = nn.Sequential(nn.Linear(3, 5))
            self.down = nn.Linear(5, 7)

    costs = backward_costs(nn.ModuleDict({"layers": nn.ModuleList([Nested()])}), ["layers.0.up", "layers.0.inner.0"])
    assert costs == {"layers.0.up": 1.0, "layers.0.inner.0": 35 / 50}
    nested = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"attn": Nested()})])})
    assert backward_costs(nested, ["layers.0.attn.up", "layers.0.attn.inner.0"])["layers.0.attn.inner.0"] == 35 / 50


def test_a_layer_of_another_kind_is_counted_by_its_features():
    class Packed(nn.Module):
        def __init__(self, in_features, out_features):
            super().__init__()
            self.in_features, self.out_features = in_features, out_features
            self.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)

    class Wrapped(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer, self.in_features, self.out_features = layer, layer.in_features, layer.out_features

    model = nn.Sequential(nn.Linear(2, 3), Packed(3, 5), Wrapped(nn.Linear(5, 7)))
    assert backward_costs(model, ["0", "1"]) == {"0": 1.0, "1": 35 / 50}


class Tower(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(n))


@pytest.mark.parametrize(
    ("model", "trained"),
    [
        (Tower(2), ["layers.1.weight"]),  # layers that do not checkpoint themselves: nothing is known of them
        (nn.ModuleDict({"a": Tower(2), "b": Tower(2)}), ["a.layers.0.weight", "b.layers.1.weight"]),
        (nn.Sequential(nn.Linear(2, 2)), ["0.weight"]),
        (Tower(1), []),
    ],
)
def test_the_backward_is_left_alone_where_layers_are_unknown(model, trained):
    with backward_end(model, trained) as stands:
        assert not stands
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_it_changes_is_put_back_when_the_forward_fails():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3)).requires_grad_(False)
    model.activation_checkpointing_enable({"use_reentrant": True})
    functions = [layer._gradient_checkpointing_func for layer in model.model.layers]
    model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)

    def forward():
        with backward_end(model, ["model.layers.2.mlp.up_proj"]) as stands:
            assert stands
            model(input_ids=torch.arange(4)[None])

    with pytest.raises(ZeroDivisionError):
        forward()
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == functions
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)
