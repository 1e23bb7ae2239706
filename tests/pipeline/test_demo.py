"""The demo on the tiny model: every part of it runs; what it shows on the real one is for `make demo`."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from smtune.cli import demo
from smtune.data import read_rows
from smtune.training import load_config


@pytest.fixture
def small_demo(base, monkeypatch):
    for name, value in {"MODEL": str(base), "STEPS": 3, "TEST_ITEMS": 5, "BLOCK_SIZE": 16, "BUDGET": 0.05}.items():
        monkeypatch.setattr(demo, name, value)


def test_demo(small_demo, tmp_path):
    text = io.StringIO()
    demo.run_demo(tmp_path / "demo", compare=True, control=True, console=Console(file=text, width=100))
    shown = text.getvalue()
    summary = json.loads((tmp_path / "demo/summary.json").read_text())["arms"]
    assert list(summary) == ["before", "SMT", "LoRA of as many parameters", "SMT on shuffled answers"]
    for title, row in summary.items():
        assert title in shown
        assert row["items"] == 5
    demo.run_demo(tmp_path / "demo", console=Console(quiet=True))
    assert json.loads((tmp_path / "demo/summary.json").read_text())["arms"] == summary  # of all that was asked before
    for picture in ("blocks", "shares", "loss", "accuracy"):
        assert (tmp_path / f"demo/figures/{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "demo/smt/adapter/adapter_model.safetensors").is_file()
    assert "smtune merge" in shown
    again = shlex.split(next(line for line in shown.splitlines() if "lora-again" in line), comments=True)
    assert again[:2] == ["smtune", "train"]
    repeated = load_config(Path(again[2]), again[3:])
    assert repeated.lora == load_config(tmp_path / "demo/lora/config.yaml").lora.model_copy(update={"alpha": None})

    rows = [read_rows(tmp_path / f"demo/{name}.jsonl") for name in ("train", "shuffled-answers")]
    assert [row["instruction"] for row in rows[0]] == [row["instruction"] for row in rows[1]]
    outputs = [[row["output"] for row in each] for each in rows]
    assert outputs[0] != outputs[1]
    assert sorted(outputs[0]) == sorted(outputs[1])

    # a second call computes nothing again
    weights = (tmp_path / "demo/smt/adapter/adapter_model.safetensors").stat().st_mtime_ns
    demo.run_demo(tmp_path / "demo", console=Console(file=text))
    assert "holds an earlier demo" in text.getvalue()
    assert (tmp_path / "demo/smt/adapter/adapter_model.safetensors").stat().st_mtime_ns == weights


def test_the_demo_tests_on_questions_it_does_not_train_on():
    from smtune.data import arithmetic, count_overlap
    from smtune.evaluation import load_items, resolve_tasks

    (task,) = resolve_tasks(["arithmetic"])
    items = load_items(task, None, demo.TEST_ITEMS)
    assert len(items) == demo.TEST_ITEMS >= 200
    asked = [{"instruction": item.instruction} for item in items]
    assert count_overlap(arithmetic(8 * demo.STEPS), asked) == 0


def test_lora_has_as_many_parameters():
    """q 576x576, k and v 192x576, 30 layers, as in SmolLM2-135M."""
    of_lora = demo.LORA_RANK * 30 * (2 * 576 + 2 * (576 + 192))
    budget = demo.BUDGET * 134_515_008
    assert abs(of_lora - budget) / budget < 0.01
