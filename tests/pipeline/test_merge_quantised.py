"""`smtune merge --dequantize`: an adapter of a quantised checkpoint becomes a plain one."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

import smtune
from needs import needs
from smtune.cli import run
from smtune.models import load_merged, load_model

pytestmark = needs("bitsandbytes", "pip install -e '.[quant]'")

IDS = torch.arange(32).view(2, 16)


def logits(model):
    with torch.no_grad():
        return model.train()(input_ids=IDS).logits.float()


def test_merge_of_a_quantised_checkpoint(base, tmp_path, capfd):
    folder, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    LlamaForCausalLM.from_pretrained(base, quantization_config=nf4, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    config = smtune.SMTConfig(block_size=16, budget=12, criterion="random", init_weights=False)
    model = smtune.get_smt_model(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    model.save_pretrained(adapter)
    expected = logits(model)

    assert run(["merge", str(adapter), str(merged), "--dequantize"]) == 0
    plain = LlamaForCausalLM.from_pretrained(merged)
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)

    assert run(["merge", str(adapter), str(tmp_path / "anew")]) == 2
    assert "is quantised: add --dequantize" in capfd.readouterr().err
    assert not (tmp_path / "anew").exists()


def test_evaluation_does_not_quantise_what_was_trained(base, tmp_path):
    folder, adapter = tmp_path / "base", tmp_path / "adapter"
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    LlamaForCausalLM.from_pretrained(base, quantization_config=nf4, dtype=torch.float32).save_pretrained(folder)
    config = smtune.SMTConfig(block_size=16, budget=12, criterion="random", init_weights=False)
    smtune.get_smt_model(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), config).save_pretrained(adapter)
    expected, found = logits(load_model(str(adapter))), logits(load_merged(str(adapter)))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_plain_base_has_nothing_to_dequantise(base, tmp_path, capfd):
    config = smtune.SMTConfig(block_size=16, budget=12, criterion="random", init_weights=False)
    smtune.get_smt_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    assert run(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--dequantize"]) == 2
    assert "Expected a quantised model" in capfd.readouterr().err
