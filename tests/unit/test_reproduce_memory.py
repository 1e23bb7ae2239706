"""The memory counted without weights is what a real model of the same shape is measured to hold and keep."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from smtune.bench.measure import count_saved, state_bytes
from smtune.reproduce import arms, memory
from smtune.reproduce.declared import load_tier

ARCHITECTURE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
ROWS, TOKENS = 2, 24


METHODS = ["smt", "lora", "lora-all", "rslora", "dora", "dense-v", "dense-qkv"]


@pytest.mark.parametrize(
    ("method", "dtype"),
    list(itertools.product([*METHODS, "full"], ["float32", "bfloat16"])),
)
def test_counted_is_measured(method, dtype):
    config = {
        "method": method,
        "budget": 0.05,
        "block_size": 16,
        "dtype": dtype,
        "model": "small",
        "seed": 0,
        "recipe": {"scoring_batches": 1},
    }
    counted = memory.count(LlamaConfig(**ARCHITECTURE), config, ROWS, TOKENS)

    torch.manual_seed(0)
    held = torch.float32 if arms.starts_in_fp32(method) else getattr(torch, dtype)
    model = memory.prepared(LlamaForCausalLM(LlamaConfig(**ARCHITECTURE)).to(held))
    if dtype == "float32" and method == "smt":
        for parameter in model.parameters():  # as published weights: 16 bits hold them, but not narrower copies here
            parameter.data.add_(1e-4 * torch.randn_like(parameter))
    plan = arms.count_plan(model, config) if method == "smt" else None
    arm = arms.build(model, config, None, plan)
    ids = torch.randint(96, (ROWS, TOKENS))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # a batch with padding, so that the mask is there
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    with torch.autocast("cpu", torch.bfloat16, enabled=arms.is_under_autocast(config)):
        saved = count_saved(arm, batch)
        loss = arm.model(**batch).loss
    loss.backward()
    arm.optimizer.step()
    state = state_bytes(arm)

    assert counted.trained_parameters == sum(parameter.numel() for parameter in arm.trained)
    assert counted.total_parameters == sum(
        p.numel() for p in LlamaForCausalLM(LlamaConfig(**ARCHITECTURE)).parameters()
    )
    assert counted.trained == state["trained"]
    assert counted.gradients == state["gradients"]
    # Adam also counts its steps, a number for each tensor
    assert 0 <= state["optimizer"] - counted.optimizer <= 4 * len(arm.trained)
    assert counted.originals == state["originals"]
    assert counted.activations == pytest.approx(saved, rel=0.02)
    if method != "smt":  # fp32, which the paper has in the base's dtype
        arm.model.to(getattr(torch, dtype))
    assert counted.activations_in_paper_dtypes == pytest.approx(count_saved(arm, batch), rel=0.02)


def test_the_smt_arm_keeps_less_than_lora_of_as_many_parameters():
    config = {"budget": 0.02, "block_size": 16, "dtype": "float32", "model": "small", "seed": 0}
    config["recipe"] = {"scoring_batches": 1}
    smt, lora = (
        memory.count(LlamaConfig(**ARCHITECTURE), {**config, "method": method}, ROWS, TOKENS)
        for method in ("smt", "lora")
    )
    assert smt.activations < lora.activations


@pytest.mark.parametrize("model", ["llama-7b", "llama-13b", "llama3-8b"])
def test_the_architectures_have_the_published_number_of_parameters(model):
    declared = load_tier("paper").models[model]
    with torch.device("meta"):
        built = LlamaForCausalLM(LlamaConfig(**(declared.architecture | {"num_hidden_layers": 1})))
        layer = sum(parameter.numel() for parameter in built.model.layers[0].parameters())
    total = sum(parameter.numel() for parameter in built.parameters())
    assert total + (declared.architecture["num_hidden_layers"] - 1) * layer == declared.parameters


def test_the_papers_890_blocks_are_its_086_percent():
    assert 890 * 256**2 / load_tier("paper").models["llama-7b"].parameters == pytest.approx(0.00866, abs=1e-5)
