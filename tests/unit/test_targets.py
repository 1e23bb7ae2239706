"""Default targets by architecture, and which of q, k and v the rows of a fused projection are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

import smtune
from smtune.errors import InputError
from smtune.tuner.targets import ATTENTION, NO_ATTENTION, find_targets, row_kinds

NEOX = SimpleNamespace(model_type="gpt_neox", num_attention_heads=2, hidden_size=16)
PHI3 = SimpleNamespace(model_type="phi3", num_attention_heads=4, num_key_value_heads=2, hidden_size=16)
GPT2 = SimpleNamespace(model_type="gpt2", num_attention_heads=2, hidden_size=16)

QWEN3_NEXT = SimpleNamespace(model_type="qwen3_next", num_attention_heads=2, hidden_size=16)


class Model(nn.Module):
    def __init__(self, model_type, **layers):
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type, num_attention_heads=2, hidden_size=16)
        self.attention = nn.ModuleDict(layers)


@pytest.mark.parametrize(
    ("config", "name", "rows", "size", "kinds"),
    [
        (NEOX, "query_key_value", 48, 8, "q k v q k v"),
        (NEOX, "query_key_value", 48, 16, "mixed mixed mixed"),  # a block holds q and k, v and q, k and v
        (NEOX, "query_key_value", 48, 4, "q q k k v v q q k k v v"),
        (PHI3, "qkv_proj", 32, 4, "q q q q k k v v"),
        (PHI3, "qkv_proj", 32, 16, "q mixed"),
        (GPT2, "c_attn", 48, 16, "q k v"),
        (GPT2, "c_attn", 32, 16, "k v"),  # cross-attention
        (GPT2, "q_attn", 16, 16, "q"),
        (QWEN3_NEXT, "q_proj", 32, 8, "q gate q gate"),
        (QWEN3_NEXT, "q_proj", 32, 16, "mixed mixed"),
        (QWEN3_NEXT, "k_proj", 16, 16, "k"),
        (PHI3, "gate_up_proj", 64, 16, ""),
        (PHI3, "qkv_proj", 36, 4, ""),  # more rows than the configuration accounts for
        (None, "q_proj", 16, 8, "q q"),
        (None, "query_key_value", 48, 16, ""),
    ],
)
def test_kinds_of_rows(config, name, rows, size, kinds):
    assert row_kinds(config, f"layers.0.{name}", rows, size) == tuple(kinds.split())


def test_targets_of_a_fused_convolution():
    model = Model("gpt2", c_attn=Conv1D(48, 16), c_proj=Conv1D(16, 16))
    targets = find_targets(model, smtune.SMTConfig(block_size=8))
    (name, target), *others = targets.items()
    assert not others
    assert name == "attention.c_attn"
    assert target.grid == smtune.BlockGrid(48, 16, 8)
    assert target.kinds == ("q", "q", "k", "k", "v", "v")
    assert target.weight().shape == (48, 16)
    assert (target.weight() == model.attention["c_attn"].weight.T).all()


def test_an_unknown_architecture_is_told_what_to_pass():
    model = Model("unheard_of", query=nn.Linear(16, 16), mystery=nn.Linear(16, 16), conv=Conv1D(16, 16))
    with pytest.raises(InputError) as error:
        find_targets(model, smtune.SMTConfig())
    message = str(error.value)
    assert "no default for model type 'unheard_of'" in message
    assert "query, mystery, conv" in message
    assert "target_modules=['query']" in message


@pytest.mark.parametrize("model_type", NO_ATTENTION)
def test_an_architecture_without_attention_is_refused_with_the_reason(model_type):
    model = Model(model_type, in_proj=nn.Linear(16, 16))
    with pytest.raises(InputError, match=r"Expected a model with attention.*state-space mixer.*: in_proj"):
        find_targets(model, smtune.SMTConfig())


def test_no_architecture_is_both_targeted_and_refused():
    assert not ATTENTION.keys() & NO_ATTENTION.keys()
