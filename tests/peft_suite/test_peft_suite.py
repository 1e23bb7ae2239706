"""PEFT's own test suite, aimed at SMT by the plugin smt_on_peft.py and run in a pytest of its own.

The tests are those of the installed PEFT version: its source distribution is fetched from the package index, once for a
version, into pytest's cache. Nothing of it is kept in this repository. Without network or one of the packages that
PEFT's tests need this is skipped, unless SMTUNE_REQUIRE_PEFT_SUITE=1, as in CI.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

REQUIRED = os.environ.get("SMTUNE_REQUIRE_PEFT_SUITE") == "1"
VERSION = peft.__version__


@dataclass(frozen=True)
class Exempt:
    """Tests of PEFT that SMT does not pass, and why.

    Attributes:
        test: name of the test function.
        message: regular expression of the reason that PEFT gives for the skip, or of the failure.
        why: in our words.
        outcome: "skipped" by PEFT's test itself, or "failed" because our contract is another.
        where: regular expression of the parameters, in the test's id, for which it is so; for these it must be.
        since, until: the first PEFT version that has it, and the first that has it no more.
    """

    test: str
    message: str
    why: str
    outcome: str = "skipped"
    where: str = ""
    since: str = "0.20"
    until: str = "999"


NO_BIAS = "SMT has no option to train biases"
NO_PROMPTS = "a test of prompt learning"
TOKENS = "PEFT leaves trained tokens out of this test"
FP32 = "blocks are fp32 whatever the base's dtype is: a 16-bit block loses most of a small step"
IN_THE_WEIGHT = "resident blocks stand in W in memory; what is saved is the base (tests/contract/test_adapter.py)"

EXEMPT = [
    Exempt("test_active_adapter", "Multiple active adapters with modules_to_save", TOKENS),
    Exempt("test_adding_multiple_adapters_with_bias_raises", "does not support the 'bias' argument", NO_BIAS),
    Exempt("test_disable_adapter_with_bias_warns", "only for LoraConfig or BOFTConfig", NO_BIAS),
    Exempt(
        "test_save_load_roundtrip_fsdp_wrapped_learnable_bias", "to support training the bias", NO_BIAS, since="0.21"
    ),
    Exempt("test_adapter_dtype_autocast", "assert False", FP32, "failed", where=r"\[\w+-False-dtype[01]-"),
    Exempt("test_add_adapter_no_autocast_adapter_dtype", "Assertion", FP32, "failed", since="0.21"),
    Exempt("test_only_params_are_updated", "assert False", IN_THE_WEIGHT, "failed", where="-Resident-"),
    Exempt("test_generate_with_mixed_adapter_batches", "Trainable token indices is not supported", TOKENS),
    Exempt("test_merge_layers_multi", "two adapters with trainable tokens is tested elsewhere", TOKENS),
    Exempt("test_prepare_for_training_parametrized", "Trainable tokens is incompatible", TOKENS),
    Exempt("test_prompt_tuning_text_prepare_for_training", "does not apply", NO_PROMPTS),
    Exempt("test_prompt_tuning_sample_vocab_prepare_for_training", "does not apply", NO_PROMPTS),
    Exempt("test_set_requires_grad_prompt_learning_raises", "only for prompt learning", NO_PROMPTS),
    Exempt("test_training_prompt_learning_tasks", "not applicable", NO_PROMPTS),
    Exempt(
        "test_multiple_active_adapters_with_overlapping_modules_to_save_raises",
        r"0layers\.\.lin0",
        "PEFT's test misspells its target, and there is no plan without one",
        "failed",
        until="0.21",
    ),
    Exempt("test_weighted_combination_of_adapters", "not applicable", "smtune.add_weighted_adapter is tested here"),
]

PASSED = {"0.20.0": {"few": 290, "all": 923}, "0.21.2": {"few": 336, "all": 1053}}
"""By PEFT version, how many of its tests pass; fewer is a failure. Another version is held to the newest recorded."""


def unavailable(reason: str):
    if REQUIRED:
        pytest.fail(f"{reason}, but SMTUNE_REQUIRE_PEFT_SUITE=1.")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def source(request) -> Path:
    """The unpacked source distribution of the installed PEFT, or as much of it as its tests need."""
    for package in ("diffusers", "parameterized"):
        if importlib.util.find_spec(package) is None:
            unavailable(f"PEFT's tests need {package}: pip install {package}")
    cache = Path(request.config.cache.mkdir(f"peft-{VERSION}"))
    folder = cache / f"peft-{VERSION}"
    if not (folder / "COMPLETE").exists():
        options = ["--no-deps", "--no-binary", "peft", "--no-build-isolation", "--retries", "1", "--dest", cache]
        fetch = [sys.executable, "-m", "pip", "download", f"peft=={VERSION}", *options]
        result = subprocess.run(fetch, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if result.returncode != 0:
            unavailable(f"the sources of peft {VERSION} cannot be fetched: {result.stderr.strip().splitlines()[-1]}")
        with tarfile.open(next(cache.glob("*.tar.gz"))) as archive:
            members = [member for member in archive if member.name.startswith(f"{folder.name}/tests/")]
            # Python 3.11 before 3.11.4, which Debian 12 has, knows no filters.
            safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(cache, members=members, **safely)
        (folder / "tests" / "__init__.py").touch()  # in PEFT's repository they are a package
        (folder / "COMPLETE").touch()
    return folder


def run(source: Path, tmp_path: Path, rows: str) -> dict[str, dict[str, str]]:
    """The outcome, with its reason, of every test of PEFT's that is aimed at SMT, by its id."""
    model = tmp_path / "tiny"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 128}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(model)
    outcomes = tmp_path / "outcomes.json"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "SMT_ON_PEFT_MODEL": str(model),
        "SMT_ON_PEFT_OUTCOMES": str(outcomes),
        "SMT_ON_PEFT_FEW": "1" if rows == "few" else "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    ini = tmp_path / "pytest.ini"
    ini.write_text("[pytest]\n")  # ours makes errors of warnings
    options = ["-q", "-p", "smt_on_peft", "-p", "no:cacheprovider", "-c", ini, "--rootdir", source, "--tb", "short"]
    command = [sys.executable, "-m", "pytest", *options, "tests/test_custom_models.py", "tests/test_decoder_models.py"]
    result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert outcomes.exists(), result.stdout + result.stderr
    found = json.loads(outcomes.read_text())
    assert found, result.stdout
    print(result.stdout[-20_000:])  # shown when this test fails
    return found


def function_of(test: str) -> str:
    return test.partition("[")[0].rpartition("::")[2]


def is_exempt(test: str, entry: Exempt, outcome: dict[str, str]) -> bool:
    return (
        is_meant(test, entry)
        and entry.outcome == outcome["outcome"]
        and re.search(entry.message, outcome["reason"]) is not None
    )


def is_meant(test: str, entry: Exempt) -> bool:
    return entry.test == function_of(test) and re.search(entry.where, test) is not None


def as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


@pytest.mark.parametrize("rows", ["few", pytest.param("all", marks=pytest.mark.nightly)])
def test_peft_tests_pass(source, tmp_path, rows):
    outcomes = run(source, tmp_path, rows)
    known = [entry for entry in EXEMPT if as_numbers(entry.since) <= as_numbers(VERSION) < as_numbers(entry.until)]
    unknown = {
        test: outcome
        for test, outcome in outcomes.items()
        if outcome["outcome"] != "passed" and not any(is_exempt(test, entry, outcome) for entry in known)
    }
    assert not unknown, json.dumps(unknown, indent=1)
    # A failure that stands in the table must be one wherever it is said to be.
    stale = [
        entry
        for entry in known
        for meant in [[test for test in outcomes if is_meant(test, entry)]]
        if (
            (rows == "all" or entry.why != TOKENS) and not any(is_exempt(test, entry, outcomes[test]) for test in meant)
        )
        or (entry.outcome == "failed" and not all(is_exempt(test, entry, outcomes[test]) for test in meant))
    ]
    assert not stale, f"Exempt tests that need not be any more: {stale}"
    counts = Counter(outcome["outcome"] for outcome in outcomes.values())
    recorded = PASSED.get(VERSION) or PASSED[max(PASSED, key=as_numbers)]
    assert counts["passed"] >= recorded[rows], f"{counts} of peft {VERSION}"
