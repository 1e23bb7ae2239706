"""The runner: what a failing cell costs the others, where processes work, what is said of a cell and refused."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from smtune import cli
from smtune.data import prepare
from smtune.errors import InputError
from smtune.models import load_tokenizer
from smtune.reproduce import mini, run, work
from smtune.reproduce.cells import Cell, validated
from smtune.reproduce.declared import load_experiment, load_tier
from smtune.reproduce.run import KILLED, Request, Runner, check_cell, in_short
from smtune.reproduce.setting import Setting, load_data
from smtune.reproduce.store import Store


class Asked:
    """A request of cells made by hand, by what `do` makes of them; in place of a setting the folder where they meet."""

    max_cells = None

    def __init__(self, folder, *names):
        self.setting = folder
        self.cells = [Cell({"does": name}, name) for name in names]

    def arms(self, experiment):
        return [SimpleNamespace(n_cells=1) for _ in self.cells]

    def families(self, name):
        return []

    def wanted(self, arms, store):
        return self.cells


def do(cell, folder):
    """The work of a cell. One that fails does so while "slow" runs."""
    name = cell.label
    if name == "slow":
        (folder / "begun").touch()
        time.sleep(1.0)
    elif name in ("killed", "refused"):
        while not (folder / "begun").exists():
            time.sleep(0.01)
        if name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise InputError("no such data")
    return SimpleNamespace(record={"metrics": {"trained_parameters": 1}, "measured": {"seconds": 1.0}}, items=[])


def labels(folder):
    return {Store(folder).load(path.stem)["label"] for path in folder.glob("*.jsonl")}


@pytest.mark.nightly
def test_a_killed_process_costs_its_cell_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_in_worker", do)
    lines = []
    asked = Asked(tmp_path, "slow", "killed", "next", "last")
    assert not Runner(asked, tmp_path, jobs=2, threads=1, say=lines.append).run("table2")
    assert labels(tmp_path / "cells") == {"slow", "next", "last"}
    (failed,) = (tmp_path / "failed").iterdir()
    assert failed.stem == asked.cells[1].id
    assert f"killed failed: {KILLED}. It is tried again with the next call." in lines


def test_bad_input_stops_the_sweep_once_what_runs_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_in_worker", do)
    monkeypatch.setattr(run, "_pool", lambda jobs, threads: ThreadPoolExecutor(jobs))
    lines = []
    with pytest.raises(InputError, match="no such data"):
        Runner(Asked(tmp_path, "slow", "refused", "next"), tmp_path, jobs=2, say=lines.append).run("table2")
    assert labels(tmp_path / "cells") == {"slow"}
    assert "table2: next …" not in lines
    assert not (tmp_path / "failed").exists()


# GPUs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("visible", "expected"), [(None, "1"), ("4,7", "7"), ("", "")])
def test_the_gpu_of_the_second_process(visible, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    run._start_worker(1, None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_more_jobs_than_gpus_are_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    output = tmp_path / "results"
    assert cli.run(["reproduce", "table5", "--scale", "paper", "--jobs", "3", "--output", str(output)]) == 2
    assert "Expected --jobs of at most 2, the number of GPUs here. Got 3: give fewer" in capsys.readouterr().err
    assert not output.exists()
    Runner(Asked(tmp_path), output, jobs=2)


# What is said and refused ---------------------------------------------------------------------------------------------


def test_a_cell_of_another_tier_is_refused(tmp_path):
    cell = Cell({"tier": "smollm2", "model": "smollm2-135m", "family": "comparison", "kind": "train"}, "a cell")
    store = Store(tmp_path)
    store.save(cell, {}, [])
    with pytest.raises(InputError, match=f"the tier mini. Got {cell.id}, of smollm2: give --tier smollm2."):
        check_cell(cell.id, store, Setting("mini"))


def test_training_rows_that_are_too_long_are_counted_and_said(monkeypatch):
    setting, tier = Setting("mini", steps=1, items=2), load_tier("mini")
    rows, _ = prepare(load_data(setting, "math").train, load_tokenizer(str(mini.folder())))
    length = sorted(rows["length"])[len(rows) // 2]
    monkeypatch.setitem(vars(tier), "recipe", tier.recipe.model_copy(update={"max_length": length}))
    monkeypatch.setattr(work, "_rows", work._rows.__wrapped__)  # not those of another length
    arm = next(arm for arm in Request(setting).arms(load_experiment("study-plans")) if arm.family == "math")
    record = work.run_cell(arm.sweep()[0], setting).record
    n_dropped = sum(n > length for n in rows["length"])
    assert record["dropped_rows"] == n_dropped > 0
    assert f" trained, {n_dropped:,} training rows dropped as too long, " in in_short(record)
    assert "too long" not in in_short({**record, "dropped_rows": 0})


def test_where_no_held_out_row_fits_there_is_no_loss():
    tokenizer = load_tokenizer(str(mini.folder()))
    config = {"recipe": {"max_length": 8}, "evaluation": {"batch_size": 1}}
    row = {"instruction": "How many eggs has Ann?", "input": "", "output": "The answer is 4."}
    assert work._loss(None, tokenizer, [row], config) is None
    with pytest.raises(InputError):  # what is no row is no row that is too long
        work._loss(None, tokenizer, [{"instruction": "How many eggs has Ann?"}], config)


def test_without_held_out_losses_the_accuracy_decides():
    def record(correct, loss, finite=True):
        validation = {"correct": correct, "items": 9}
        return {"metrics": {"validation": validation, "validation_loss": loss, "finite": finite}}

    ranked = [record(5, None, finite=False), record(0, 2.0), record(4, None), record(5, None), record(5, 1.0)]
    assert sorted(ranked, key=validated) == ranked
