"""`smtune evaluate`: its beams, and lm-evaluation-harness as its backend, on a whole model and on an SMT adapter."""

from __future__ import annotations

import json

import peft
import pytest
import torch

import smtune
from needs import needs
from smtune import cli
from smtune.evaluation import harness, load_run
from smtune.models import load_model

needs_lm_eval = needs("lm_eval", "pip install -e '.[lm-eval]'")


def results(folder):
    """(header, {key: (prediction, correct, completion)}) of a folder of results."""
    run, items = load_run(folder)
    return run, {item.key: (item.prediction, item.correct, item.completion) for item in items}


def evaluate(*arguments, code=0):
    assert cli.run(["evaluate", *map(str, arguments)]) == code


@pytest.fixture
def adapter(base, tmp_path, monkeypatch):
    """Blocks beside the tiny base that change what it says; the working directory is fresh."""
    monkeypatch.chdir(tmp_path)
    targets = ["q_proj", "k_proj", "v_proj"]
    config = smtune.SMTConfig(target_modules=targets, block_size=16, budget=8, criterion="random")
    model = load_model(str(base))
    model = peft.get_peft_model(model, config.with_plan(smtune.make_plan(model, None, config)))
    for name, parameter in model.named_parameters():
        if "smt_blocks" in name:
            parameter.data.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_beams(adapter, tmp_path):
    arguments = (adapter, "--tasks", "arithmetic", "--limit", "4")
    evaluate(*arguments)
    evaluate(*arguments, "--beams", "2")
    greedy, greedy_items = results(adapter / "evaluation/generate-float32")
    searched, searched_items = results(adapter / "evaluation/generate-beams2-float32")
    assert "beams" not in greedy
    assert searched == {**greedy, "beams": 2}
    assert searched_items.keys() == greedy_items.keys()
    assert searched_items != greedy_items
    assert json.loads((adapter / "evaluation/generate-beams2-float32/summary.json").read_text())["run"]["beams"] == 2


@needs_lm_eval
def test_lm_eval_as_the_backend(base, adapter):
    arguments = ("--tasks", "winogrande,openbookqa,comparison", "--limit", "6", "--protocol", "likelihood")
    evaluate(adapter, *arguments)
    evaluate(adapter, *arguments, "--backend", "lm-eval")
    ours, our_items = results(adapter / "evaluation/likelihood-float32")
    theirs, their_items = results(adapter / "evaluation/likelihood-lm-eval-float32")
    assert theirs == {**ours, "backend": f"lm_eval {harness.version()}"}
    assert their_items == our_items
    # The adapter is in what is scored.
    evaluate(base, *arguments, "--backend", "lm-eval", "--output", "of-base")
    of_adapter, of_base = (
        [value for item in load_run(folder)[1] for value in (item.log_probs or {}).values()]
        for folder in (adapter / "evaluation/likelihood-lm-eval-float32", "of-base")
    )
    assert of_adapter != pytest.approx(of_base, rel=1e-2)


def test_lm_eval_does_not_generate(base, tmp_path, capsys):
    output = tmp_path / "results"
    evaluate(base, "--tasks", "comparison", "--backend", "lm-eval", "--output", output, code=2)
    assert not output.exists()


def test_without_lm_eval_nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(harness.util, "find_spec", lambda name: None)
    monkeypatch.setattr("smtune.models.load_merged", lambda *_: pytest.fail("the model was loaded"))
    evaluate("x", "--tasks", "comparison", "--protocol", "likelihood", "--backend", "lm-eval", code=2)
