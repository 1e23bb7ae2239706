"""A base model for tests that read one from a folder: made in a second, too small to know anything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def write_tiny_base(folder: Path, intermediate_size: int = 128) -> Path:
    """Write a Llama of random weights (2 layers, hidden 64) and a tokenizer of bytes, and return the folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=intermediate_size,
        vocab_size=258,
        eos_token_id=256,
        bos_token_id=None,
        pad_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = ByteLevelBPETokenizer()
    letters.train_from_iterator([""], vocab_size=256, special_tokens=[])
    letters.add_special_tokens(["<end>", "<pad>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters._tokenizer, eos_token="<end>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and none to pad with; token 0 ends a text."""
    letters = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={letter: k for k, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def byte_llama(vocab_size: int) -> LlamaForCausalLM:
    """For that tokenizer: weights so large that neither options nor tokens come close to a tie."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def write_lines(path: Path, records: Iterable[Mapping[str, str]]) -> Path:
    """Write JSON Lines, and return the path."""
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def sums(n: int) -> list[dict[str, str]]:
    """Rows of prompts and completions."""
    return [{"prompt": f"{k} + {k % 7} =", "completion": f" {k + k % 7}"} for k in range(n)]
