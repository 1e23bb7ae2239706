"""The models that are measured: Llamas of random weights, made in seconds, and the embedded SmolLM2-135M.

`llama-7b-layers` has the layers of LLaMA-7B, two of them, with a vocabulary of 2,000, which is the head's share of two
of 32 layers: its cost per layer, and the ratio of its parts, are those of the whole model. `llama-<hidden>x<layers>`
are smaller ones for sweeps. What a step costs does not depend on the weights' values, so random ones do; they are exact
in bf16, as published models' are in 16 bits, which is what SMT's copy of the base's blocks then needs.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smtune.errors import InputError, did_you_mean
from smtune.models import DTYPES, load_model

QKV = ("q_proj", "k_proj", "v_proj")
LLAMA_7B_PARAMS = 6_738_415_616
LLAMA_7B_BLOCKS = 3 * (4096 // 256) ** 2
"""Blocks of 256² of the q, k and v weights of one layer of LLaMA-7B: 768."""

VOCABULARY = 2000
PATTERN = re.compile(r"llama-(\d+)x(\d+)")


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        name: "llama-7b-layers", "smollm2-135m" or "llama-<hidden>x<layers>".
        block_size: l, unless a sweep sets another.
        batch: rows of a batch.
        llama: hidden size, MLP size, layers and head dimension; None for SmolLM2.
    """

    name: str
    block_size: int
    batch: int
    llama: tuple[int, int, int, int] | None

    @property
    def params(self) -> int:
        """All parameters."""
        if self.llama is None:
            return 134_515_008
        hidden, intermediate, layers, _ = self.llama
        return layers * (4 * hidden**2 + 3 * hidden * intermediate) + 2 * VOCABULARY * hidden

    def activation_values(self, tokens: int) -> int:
        """Roughly how many values a forward keeps for the backward."""
        hidden, intermediate, layers, _ = self.llama or (576, 1536, 30, 64)
        vocabulary = VOCABULARY if self.llama else 49_152
        return tokens * (layers * (12 * hidden + 4 * intermediate) + 4 * vocabulary)

    def load(self, dtype: str, device: str = "cpu") -> nn.Module:
        """The model with everything frozen, in train mode, without a cache of keys and values."""
        model: Any = load_model(self.name, dtype, device) if self.llama is None else _llama(*self.llama, dtype, device)
        model.set_attn_implementation("sdpa")
        model.config.use_cache = False
        return model.requires_grad_(False).train()

    def inputs(self, model: Any, tokens: int) -> dict[str, Tensor]:
        """A batch of random tokens with labels, `tokens` of them in all."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (self.batch, tokens // self.batch), generator=generator)
        ids = ids.to(next(model.parameters()).device)
        return {"input_ids": ids, "labels": ids.clone()}


def find_subject(name: str) -> Subject:
    """The model of a name. Raises InputError for another."""
    if name == "llama-7b-layers":
        return Subject(name, block_size=256, batch=1, llama=(4096, 11008, 2, 128))
    if name == "smollm2-135m":
        # At 192, its largest, a layer has 15 blocks of q, k, v: too few to tell the paper's budgets apart.
        return Subject(name, block_size=64, batch=4, llama=None)
    match = PATTERN.fullmatch(name)
    if match is None or int(match[1]) % 64 or not int(match[1]) * int(match[2]):
        known = ("llama-7b-layers", "smollm2-135m", "llama-1024x4")
        raise InputError(
            f"Expected a model to measure: {', '.join(known)} or another llama-<hidden>x<layers> with a hidden size "
            f"that 64 divides. Got {name!r}.{did_you_mean(name, known)}"
        )
    hidden, layers = int(match[1]), int(match[2])
    shape = (hidden, round(2.75 * hidden / 64) * 64, layers, 64)
    return Subject(name, block_size=min(256, hidden // 4), batch=1, llama=shape)


def same_weights(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters are its own, and lie where the model's do."""
    shared = {id(each): nn.Parameter(each.data, each.requires_grad) for each in model.parameters()}
    return copy.deepcopy(model, shared)


def _llama(hidden: int, intermediate: int, layers: int, head_dim: int, dtype: str, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // head_dim,
        num_key_value_heads=hidden // head_dim,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):  # its own initialisation of shapes this large takes minutes
        model: Any = LlamaForCausalLM(config)
    model.to(dtype=DTYPES[dtype]).to_empty(device=device)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            parameter.data.normal_(std=0.02, generator=generator)
            parameter.data.copy_(parameter.data.bfloat16())
    return model


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, layer) of the decoder's layers, bottom first."""
    name, layers = next(item for item in model.named_modules() if item[0].endswith("layers"))
    return [(f"{name}.{number}", layer) for number, layer in enumerate(layers.children())]


def attention_inputs(model: nn.Module, kinds: tuple[str, ...] = QKV) -> list[dict[str, nn.Linear]]:
    """By decoder layer, bottom first: its q, k and v projections by their name in the model."""
    return [
        {
            f"{prefix}.{name}": module
            for name, module in layer.named_modules()
            if name.rpartition(".")[2] in kinds and isinstance(module, nn.Linear)
        }
        for prefix, layer in decoder_layers(model)
    ]
