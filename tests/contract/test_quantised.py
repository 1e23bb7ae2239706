"""Blocks beside a quantised weight: chosen automatically, trained, saved, merged and taken out again."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import smtune
from smtune import SMTConfig
from smtune.tuner import SMTLinear

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:.*inputs will be cast")

IDS = torch.arange(4 * 16).view(4, 16) % 128
BATCHES = [{"input_ids": IDS, "labels": IDS}] * 2
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
INT8 = BitsAndBytesConfig(load_in_8bit=True)
CONFIG = SMTConfig(block_size=32, budget=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128, pad_token_id=0)).to(torch.bfloat16)
    path = tmp_path_factory.mktemp("base")
    model.save_pretrained(path)
    return path


def load(folder, quantisation=None):
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=quantisation, dtype=torch.bfloat16)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("quantisation", [NF4, INT8], ids=["nf4", "int8"])
def test_a_quantised_base(folder, quantisation, tmp_path):
    dense, quantised = load(folder), load(folder, quantisation)
    dense_scores, scores = (smtune.score_blocks(model, BATCHES, CONFIG) for model in (dense, quantised))
    both = torch.stack([torch.cat([s[name].flatten() for name in dense_scores]) for s in (dense_scores, scores)])
    assert torch.corrcoef(both)[0, 1] > 0.99

    model = smtune.get_smt_model(quantised, CONFIG, BATCHES)
    assert model.peft_config["default"].get_plan().total_params == dense.num_parameters()
    layers = [module for module in model.modules() if isinstance(module, SMTLinear)]
    assert layers
    assert not any(layer.resident for layer in layers)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(model(**BATCHES[0]).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1

    tuned = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(load(folder, quantisation), tmp_path)), tuned)

    with model.disable_adapter():
        # On CPUs bitsandbytes repacks 4-bit weights, with another rounding, in a forward without gradients.
        torch.testing.assert_close(logits(model), logits(load(folder, quantisation)), rtol=0.05, atol=0.05)
        change = (logits(model) - tuned).abs().max()
    model.merge_adapter()
    # Quantising anew rounds: measured 0.5 of the change for nf4, 0.01 for int8.
    assert (logits(model) - tuned).abs().max() < 0.75 * change
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), tuned, rtol=0, atol=0.02 if quantisation is NF4 else 0)
