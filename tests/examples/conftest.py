"""A tiny base model in a folder, and files of rows and of preferences."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a tiny Llama of random weights and a tokenizer of bytes. 0.84 % of it are 6 blocks of 32²."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=2048,
            vocab_size=258,
            eos_token_id=256,
            bos_token_id=None,
            pad_token_id=257,
        )
    )
    model.save_pretrained(folder)
    letters = ByteLevelBPETokenizer()
    letters.train_from_iterator([""], vocab_size=256, special_tokens=[])
    letters.add_special_tokens(["<end>", "<pad>"])
    PreTrainedTokenizerFast(tokenizer_object=letters._tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(
        folder
    )
    return str(folder)


def write_lines(path, records):
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    records = [{"prompt": f"{k} + {k % 7} =", "completion": f" {k + k % 7}"} for k in range(48)]
    return write_lines(tmp_path_factory.mktemp("data") / "rows.jsonl", records)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    records = [{"prompt": f"{k} + 2 =", "chosen": f" {k + 2}", "rejected": f" {k + 3}"} for k in range(24)]
    return write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", records)
