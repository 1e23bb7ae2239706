"""A pytest plugin that aims PEFT's own tests at SMT. Loaded into a pytest of its own by test_peft_suite.py.

PEFT's tests are tables of methods. Their tables are replaced in place, before collection, by SMT in its two modes, and
every test that no table aims at SMT is left out. The outcomes go to the file that SMT_ON_PEFT_OUTCOMES names; with
SMT_ON_PEFT_FEW=1 only some rows of the two long tables are taken.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest
import torch

from smtune import SMTConfig

MODEL = os.environ["SMT_ON_PEFT_MODEL"]
"""Folder of a small Llama. PEFT's tests know models by name, so it must not have "llama" in its path."""


class _SmallBlocks(SMTConfig):
    """SMT as most tests make it: with targets alone. Blocks at random places, for there is no data to score by."""

    mode_of_tests = "auto"

    def __init__(self, **fields):
        defaults = {"block_size": 32, "budget": 20, "criterion": "random", "mode": self.mode_of_tests}
        super().__init__(**(defaults | fields))


class Resident(_SmallBlocks):
    mode_of_tests = "resident"


class Additive(_SmallBlocks):
    mode_of_tests = "additive"


MODES = [Resident, Additive]
FEW = os.environ.get("SMT_ON_PEFT_FEW") == "1"


def linear(*targets, budget=12, **fields):
    """Targets in PEFT's MLP, whose layers are 20×10 and 2×20."""
    return {"target_modules": list(targets), "block_size": 2, "budget": budget} | fields


def noisy(*targets, **fields):
    return linear(*targets, init_weights=False, **fields)


# name, model, keyword arguments of the configuration
CUSTOM = [
    ("one layer by regular expression", "MLP", linear() | {"target_modules": "lin0"}),
    ("first layer", "MLP", linear("lin0", budget=30)),
    ("last layer", "MLP", linear("lin1", budget=6)),
    ("every block", "MLP", linear("lin0", budget=50)),
    ("two layers", "MLP", linear("lin0", "lin1", budget=40)),
    ("modules to save", "MLP", linear("lin0", modules_to_save=["lin1"])),
    ("blocks of 1", "MLP", linear("lin0", "lin1", block_size=1, budget=100)),
    ("blocks of 10", "MLP", linear("lin0", block_size=10, budget=1)),
    (
        "embedding trained at some tokens",
        "EmbConv1D",
        linear("lin0", budget=4, trainable_token_indices={"emb": [0, 10]}),
    ),
]

if FEW:
    CUSTOM = [row for row in CUSTOM if row[0] in ("two layers", "modules to save")]

TWO_ACTIVE = [
    ("same layer, overlapping plans", "smt", noisy("lin0"), noisy("lin0", seed=1)),
    ("same layer, same plan", "smt", noisy("lin0", budget=50), noisy("lin0", budget=50)),
    ("different layers", "smt", noisy("lin0"), noisy("lin1", budget=6)),
    ("one layer shared", "smt", noisy("lin0", "lin1"), noisy("lin0", seed=1)),
    (
        "trained tokens",
        "lora+trainable_tokens",  # names the model only
        noisy("lin0", budget=4, trainable_token_indices={"emb": [0, 1, 2]}),
        noisy("lin0", budget=4, seed=1, trainable_token_indices={"emb": [3, 4, 5, 6]}),
    ),
]

DECODER = [
    {"task_type": "CAUSAL_LM", "target_modules": None, "block_size": 8, "budget": 40},
    {
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "down_proj"],
        "block_size": 8,
        "budget": 40,
        "trainable_token_indices": [0, 1, 3],
    },
]

if FEW:
    DECODER = DECODER[:1]

# Tests whose table stands at the test itself: pairs of configurations for `TestMixedAdapterBatches`.
MIXED = {
    "test_mixed_adapter_batches_different_target_layers": (noisy("lin0"), noisy("lin1", budget=6)),
    "test_mixed_adapter_batches_multiple_modules_to_save": (
        noisy("lin0", modules_to_save=["lin1"]),
        noisy("lin0", seed=1, modules_to_save=["lin1"]),
    ),
    "test_mixed_adapter_batches_partly_overlapping_target_layers": (
        noisy("lin0"),
        noisy("lin0", "lin1", seed=1),
    ),
}


def pytest_configure(config):
    custom = importlib.import_module("tests.test_custom_models")
    decoder = importlib.import_module("tests.test_decoder_models")
    utils = importlib.import_module("tests.testing_utils")

    custom.TEST_CASES[:] = [(name, model, mode, fields) for mode in MODES for name, model, fields in CUSTOM]
    custom.ALL_PEFT_CONFIG_CLASSES[:] = MODES
    custom.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
        (name, method, mode, one, two) for mode in MODES for name, method, one, two in TWO_ACTIVE
    ]
    custom.MIXED_ADAPTER_TEST_CASES[:] = [
        (mode.__name__, mode(**noisy("lin0")), mode(**noisy("lin0", seed=1))) for mode in MODES
    ]
    for name, (one, two) in MIXED.items():
        for mark in getattr(custom.TestMixedAdapterBatches, name).pytestmark:
            mark.args[1][:] = [(mode.__name__, mode(**one), mode(**two)) for mode in MODES]
    wrong_name = custom.TestMixedAdapterBatches.test_mixed_adapter_batches_lora_wrong_adapter_name_raises
    for mark in wrong_name.pytestmark:
        mark.args[1][:] = [(mode.__name__, mode(**noisy("lin0"))) for mode in MODES]
    decoder.PEFT_DECODER_MODELS_TO_TEST[:] = [MODEL]
    decoder.ALL_CONFIGS[:] = [(mode, fields) for mode in MODES for fields in DECODER]
    # As though the hub had been asked before, so that it is not asked.
    utils._HUB_MODEL_ACCESSES.update(dict.fromkeys(["MLP", "EmbConv1D", MODEL], 1))


@pytest.fixture(autouse=True)
def _mixed_batches_are_not_for_lora_alone(request, monkeypatch):
    """PEFT's tests of mixed batches name the methods that have them; SMT takes the place of LoRA there."""
    if "mixed_adapter_batches" in request.node.name and "config_cls" in request.node.callspec.params:
        for module in ("tests.testing_common", "tests.test_decoder_models"):
            monkeypatch.setattr(f"{module}.LoraConfig", request.node.callspec.params["config_cls"])


def is_aimed(item):
    values = getattr(item, "callspec", None) and item.callspec.params.values()
    return any(value in MODES or isinstance(value, SMTConfig) for value in values or ())


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if not is_aimed(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if is_aimed(item)]
    torch.set_num_threads(1)


OUTCOMES: dict[str, dict[str, str]] = {}


def pytest_runtest_logreport(report):
    """The last word on each test: a failure anywhere, else a skip anywhere, else its call."""
    worse = {"passed": 0, "skipped": 1, "failed": 2}
    known = OUTCOMES.get(report.nodeid)
    if known is not None and worse[known["outcome"]] >= worse[report.outcome]:
        return
    reason = ""
    if report.skipped:
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else report.wasxfail
    elif report.failed:
        reason = (
            str(report.longrepr.reprcrash.message) if hasattr(report.longrepr, "reprcrash") else str(report.longrepr)
        )
    OUTCOMES[report.nodeid] = {"outcome": report.outcome, "reason": reason}


def pytest_sessionfinish(session):
    path = Path(os.environ["SMT_ON_PEFT_OUTCOMES"])
    path.write_text(json.dumps(OUTCOMES, indent=1), encoding="utf-8")
