"""`smtune reproduce`: every table and figure, from an empty cache, on a cut of two cells; stop, resume, check again.

What a cut gives is never a result: the pages must say so.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from smtune import cli
from smtune.reproduce import declared, dry, mini
from smtune.reproduce import setting as setting_module
from smtune.reproduce.declared import STUDY_PARTS, expand, experiment_names, load_experiment, load_tier
from smtune.reproduce.layouts import collect
from smtune.reproduce.run import Request, Runner
from smtune.reproduce.setting import Setting, load_data, weights
from smtune.reproduce.store import Store

CUT = ["--cells", "2", "--steps", "2", "--items", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """An empty cache of smtune, with the model of two pretraining steps."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMTUNE_CACHE", str(folder))
        assert cli.run(["reproduce", "pretrain-mini", "--steps", "2"]) == 0
        load_data.cache_clear()
        weights.cache_clear()
        yield folder


@pytest.fixture(scope="module")
def output(cache, tmp_path_factory):
    """Results of two cells of everything."""
    folder = tmp_path_factory.mktemp("results")
    assert cli.run(["reproduce", *CUT, "--output", str(folder)]) == 0
    return folder


def test_list_names_every_table_and_figure(cache, tmp_path, capsys):
    assert cli.run(["reproduce", "--list", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    names = [*(f"table{k}" for k in range(1, 7)), "figure3", "figure4", "figure5", "memory"]
    assert experiment_names() == [*names, *STUDY_PARTS] == expand([*names, "study"])
    for name in experiment_names():
        assert re.search(rf"\b{name}\b", shown)


@pytest.mark.parametrize("name", experiment_names())
def test_a_cut_of_everything_runs_from_an_empty_cache(output, name):
    page = (output / "trial" / f"{name}.md").read_text(encoding="utf-8")
    rows = list(csv.reader((output / "trial" / f"{name}.csv").read_text(encoding="utf-8").splitlines()))
    experiment = load_experiment(name)
    assert "A trial, not a result" in page
    assert "| **a trial, not a result** |" in page  # in the table itself
    assert any("**a trial, not a result**" in cell for row in rows for cell in row)
    assert not (output / f"{name}.md").exists()
    assert (output / "trial" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (output / "trial" / picture).is_file()
    assert {row[0] for row in rows if row} >= {"smtune"}
    if experiment.published is not None:
        ours, theirs = page.split("## The paper's own numbers")
        for row in experiment.published.rows:
            line = "| " + " | ".join(map(str, row)) + " |"
            assert line in theirs
            assert line not in ours
        assert sum(bool(row) and row[0] == "paper" for row in rows) == len(experiment.published.rows)


def test_an_incomplete_table_says_what_is_missing(output):
    page = (output / "trial" / "study-methods.md").read_text(encoding="utf-8")
    expected = sum(arm.n_cells for arm in Request(Setting("mini")).arms(load_experiment("study-methods")))
    assert expected > 100
    there = int(re.search(r"\*\*incomplete: (\d+) of " + str(expected) + " cells", page)[1])
    assert 2 <= there < 10


def test_records_are_complete(output):
    cells = sorted((output / "cells").glob("*.jsonl"))
    records = [Store(output / "cells").load(path.stem) for path in cells]
    assert {record["config"]["kind"] for record in records} == {"train", "time", "select", "memory"}
    for record in records:
        assert {"cell", "config", "environment", "metrics", "measured"} <= set(record)
        assert record["environment"]["packages"]["torch"]
        assert "commit" in record["environment"]
        first = 5 if record["config"].get("family", "").startswith("unseen-") else 0
        assert record["config"]["seed"] == record["environment"]["seed"] == first
        if record["config"]["kind"] != "memory":  # counted without any
            assert record["config"]["weights"] == weights(Setting("mini"), "mini")
        if record["config"]["kind"] == "train":
            assert record["overlap"] in ({"comparison": 0}, {"arithmetic": 0})
            n_tasks = 2 if "then" in record["config"] else 1
            answered = sum(test["items"] for test in record["metrics"]["tests"].values())
            assert len(record["items"]) == answered == 3 * n_tasks
            assert all({"task", "index", "answer", "prediction", "correct"} <= set(item) for item in record["items"])
        if record["config"]["kind"] == "select":
            assert record["plan"]["n_blocks"] == record["metrics"]["blocks"] > 0


def test_nothing_is_run_twice_and_a_killed_sweep_goes_on(output, capsys):
    times = {path: path.stat().st_mtime_ns for path in (output / "cells").iterdir()}
    lost = next(path for path in times if json.loads(path.read_text().splitlines()[0])["config"]["kind"] == "train")
    lost.unlink()  # what a kill leaves: whole files, and none of the cell that was running
    (output / "cells" / ".half-written").write_text('{"cell": ')
    assert cli.run(["reproduce", "--resume", "--output", str(output), "--threads", "1"]) == 0
    after = {path: path.stat().st_mtime_ns for path in (output / "cells").glob("*.jsonl")}
    assert {path for path in times if path not in after or after[path] != times[path]} == {lost}
    assert capsys.readouterr().err.count(" right, ") == 1  # one line of progress


def test_a_cell_run_again_gives_the_same_bits(output, capsys):
    cells = [Store(output / "cells").load(path.stem) for path in sorted((output / "cells").glob("*.jsonl"))]
    chosen = next(record for record in cells if record["config"].get("method") == "lora" and record["items"])
    call = ["reproduce", "--check", chosen["cell"], *CUT, "--output", str(output)]
    assert cli.run(call) == 0
    assert "bit for bit" in capsys.readouterr().err

    path = output / "cells" / f"{chosen['cell']}.jsonl"
    text = path.read_text(encoding="utf-8")
    loss = json.dumps(chosen["metrics"]["train_loss"])
    path.write_text(text.replace(loss, json.dumps(chosen["metrics"]["train_loss"] + 1e-6)), encoding="utf-8")
    try:
        assert cli.run(call) == 1
        assert "train_loss" in capsys.readouterr().err
    finally:
        path.write_text(text, encoding="utf-8")
    assert (
        cli.run(["reproduce", "--check", chosen["cell"], "--steps", "3", "--items", "3", "--output", str(output)]) == 2
    )
    assert "recipe" in capsys.readouterr().err
    assert cli.run(["reproduce", "--check", "0123", *CUT, "--output", str(output)]) == 2


def test_a_failing_cell_is_told_and_tried_again(cache, tmp_path, monkeypatch):
    from smtune.reproduce import work

    request = Request(Setting("mini", steps=2, items=3))
    lines = []
    with monkeypatch.context() as patch:
        patch.setitem(work.KINDS, "select", lambda *_: 1 / 0)
        assert not Runner(request, tmp_path, threads=1, say=lines.append).run("figure4")
    assert sum("ZeroDivisionError" in line for line in lines) == 2
    assert len(list((tmp_path / "failed").iterdir())) == 2
    assert Runner(request, tmp_path, threads=1, say=lines.append).run("figure4")
    assert not list((tmp_path / "failed").iterdir())
    assert len(list((tmp_path / "cells").iterdir())) == 2


def test_the_other_seeds_run_at_the_best_rate_of_the_first(cache, tmp_path):
    """Two rates and two seeds: three cells, of which the last follows from the first two."""
    row = declared.Row(label="LoRA", method="lora", learning_rates=[1e-3, 1e-2])
    experiment = declared.Experiment(name="small", title="small", layout="accuracy", rows={"embedded": [row]})
    request = Request(Setting("mini", steps=2, items=3), seeds=[3, 4])
    (arm,) = request.arms(experiment)
    assert arm.n_cells == 3
    store = Store(tmp_path)
    first, second = request.wanted([arm], store)
    assert [cell.config["seed"] for cell in (first, second)] == [3, 3]

    def metrics(correct, loss):
        return {"metrics": {"validation": {"correct": correct, "items": 9}, "validation_loss": loss}}

    store.save(first, metrics(5, 1.0), [])
    assert len(request.wanted([arm], store)) == 2
    store.save(second, metrics(5, 0.5), [])  # as accurate, of smaller loss
    third = request.wanted([arm], store)[2]
    assert (third.config["learning_rate"], third.config["seed"]) == (1e-2, 4)
    assert len(collect(experiment, request, store).found[0]) == 1  # one seed so far, and the table counts it
    store.save(third, metrics(1, 2.0), [])
    result = collect(experiment, request, Store(tmp_path))
    assert result.counts == [3]
    assert [record["config"]["seed"] for record in result.found[0]] == [3, 4]


def test_experiments_share_cells(cache):
    request = Request(Setting("mini"))
    ids = [
        {cell.id for arm in request.arms(load_experiment(name)) for cell in arm.sweep()}
        for name in ("table2", "table3")
    ]
    shared = ids[0] & ids[1]
    assert len(shared) == 5 * 4  # LoRA, DoRA, SMT and SMT (larger), at each learning rate


def test_what_a_cell_is_named_by(cache):
    (base, *_) = Request(Setting("mini")).arms(load_experiment("table6"))
    cell = base.sweep()[0]
    for changed in (Setting("mini", steps=5), Setting("mini", items=7)):
        (other, *_) = Request(changed).arms(load_experiment("table6"))
        assert other.sweep()[0].id != cell.id
    assert base.cell(1.0, 0).id != base.cell(1.0, 1).id != base.cell(2.0, 1).id


# The paper's scale ----------------------------------------------------------------------------------------------------


@pytest.fixture
def shallow(monkeypatch):
    """The paper's four models cut to two layers: counting all of them takes minutes (nightly)."""
    values = yaml.safe_load((declared.HERE / "tiers" / "paper.yaml").read_text(encoding="utf-8"))
    for model in values["models"].values():
        model["architecture"] = model["architecture"] | {"num_hidden_layers": 2}
        model.pop("parameters")
    tier = declared.Tier.model_validate({"name": "paper", **values})
    monkeypatch.setattr("smtune.reproduce.setting.load_tier", lambda name: tier)


@pytest.mark.parametrize("name", experiment_names())
def test_the_paper_scale_resolves(shallow, name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert cli.run(["reproduce", name, "--scale", "paper", "--dry-run", "--jobs", "4"]) == 0
    shown = capsys.readouterr().out
    assert f"{name}: " in shown
    for row in load_experiment(name).rows_at("paper"):
        assert row.label in shown


@pytest.mark.nightly
def test_the_paper_scale_resolves_in_full(capsys, monkeypatch):
    dry._count.cache_clear()  # of the shallow ones
    monkeypatch.setenv("COLUMNS", "250")
    assert cli.run(["reproduce", "table2", "table5", "memory", "--scale", "paper", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "890 blocks" in shown
    assert "58.3 M" in shown  # 890 · 256²
    dry._count.cache_clear()


def test_the_paper_tier_is_the_paper():
    tier = load_tier("paper")
    assert list(tier.models) == ["llama-7b", "llama-13b", "llama2-7b", "llama3-8b"]
    assert (tier.block_size, tier.dtype, tier.recipe.epochs, tier.recipe.batch_size) == (256, "bfloat16", 3, 16)
    assert tier.recipe.scoring_batches == 100
    assert tier.learning_rates["smt"] == [9.65e-6, 1e-4]
    budgets = {
        (model, budget)
        for name in ("table2", "table3", "table5")
        for row in load_experiment(name).rows_at("paper")
        for model in row.models or tier.models
        for budget in row.budgets
        if row.method == "smt"
    }
    for budget in (0.0043, 0.0084, 0.0126, 0.025, 0.0373, 0.0491):
        assert ("llama-7b", budget) in budgets
    assert {("llama-13b", 0.0068), ("llama3-8b", 0.0071), ("llama3-8b", 0.0301), ("llama-7b", 890)} <= budgets


@pytest.mark.parametrize("name", ["table5", "table2"])
def test_the_paper_scale_names_the_data_it_needs(name, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(setting_module, "read_rows", lambda source: pytest.fail("fetched rows first"))
    assert cli.run(["reproduce", name, "--scale", "paper", "--output", str(tmp_path)]) == 2
    assert "Expected --data with a folder that holds the tests" in capsys.readouterr().err


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel2"], 'Did you mean "table2"?'),
        (["--scale", "papers"], 'Did you mean "paper"?'),
        (["--tier", "paper"], "mini, smollm2, real"),
        (["--seeds", "one"], "whole numbers"),
        (["--data", "nowhere"], "folder"),
        (["--resume", "--output", "nowhere"], "leave out --resume"),
        (["--resume", "--seeds", "0,1", "--steps", "5"], "Got --steps, --seeds beside it"),
        (["evidence", "--output", "nowhere"], "nowhere has none"),
        (["table5", "--tier", "smollm2", "--data", "."], "--tier real"),
        (["table5", "--tier", "real", "--data", ".", "--dry-run"], "train/mawps.jsonl"),
        (["table5", "--tier", "real"], "holds the tests (test or dataset) and train/mawps.jsonl. Got none"),
    ],
)
def test_what_is_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["reproduce", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # nothing half-begun


@pytest.mark.parametrize("given", [["--tier", "smollm2"], ["--scale", "paper"]])
def test_resume_takes_no_other_tier(given, capsys, tmp_path):
    setting = {"tier": "mini", "data": None, "steps": None, "items": None}
    asked = {"experiments": ["memory"], "setting": setting, "seeds": None, "max_cells": None}
    (tmp_path / "request.json").write_text(json.dumps(asked))
    call = ["reproduce", "--resume", "--output", str(tmp_path)]
    assert cli.run([*call, *given]) == 2
    assert f", mini. Got {' '.join(given)}: leave it out" in capsys.readouterr().err
    assert cli.run([*call, "--tier", "mini", "--scale", "embedded", "--list"]) == 0


def test_the_model_of_the_tier_is_what_it_says(cache):
    folder = mini.folder()
    source = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    assert source["steps"] == 2
    assert mini.is_cut()
    assert (folder / "model.safetensors").stat().st_size < 8e6
    held_out = [text for text in map(mini.text_of, load_data(Setting("mini"), "math").train) if mini.is_held_out(text)]
    assert held_out  # of the task's own rows nothing is held out; they are never read in pretraining
    texts = mini.documents()
    read = {next(texts) for _ in range(3000)}
    asked = [row["instruction"] for family in ("math", "choice") for row in load_data(Setting("mini"), family).train]
    assert not any(question in text for text in read for question in asked[::20])
    other = {row["text"] for family in ("math", "choice") for row in load_data(Setting("mini"), family).other_text}
    assert other
    assert not other & read


def test_the_packaged_model_is_of_this_recipe():
    source = json.loads((mini.PACKAGED / "source.json").read_text(encoding="utf-8"))
    assert {name: source[name] for name in mini.RECIPE} == mini.RECIPE
    packaged = (mini.PACKAGED / "model.safetensors").read_bytes()
    assert hashlib.sha256(packaged).hexdigest() == source["sha256"]
    assert len(packaged) < 8e6


def test_a_model_of_another_recipe_is_not_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SMTUNE_CACHE", str(tmp_path))
    assert not mini.is_cut()
    monkeypatch.setitem(mini.RECIPE, "texts", mini.TEXTS + 1)
    assert not mini.is_made()
    weights.cache_clear()
    assert cli.run(["reproduce", "table2", *CUT, "--output", str(tmp_path / "none")]) == 2
    assert "smtune reproduce pretrain-mini" in capsys.readouterr().err


@pytest.mark.nightly
def test_two_jobs_give_the_same_cells_as_one(output, tmp_path):
    assert cli.run(["reproduce", "table6", *CUT, "--jobs", "2", "--output", str(tmp_path)]) == 0
    found = sorted((tmp_path / "cells").glob("*.jsonl"))
    assert len(found) == 2
    for path in found:
        one, two = Store(output / "cells").load(path.stem), Store(tmp_path / "cells").load(path.stem)
        assert (one["metrics"], one["plan"], one["items"]) == (two["metrics"], two["plan"], two["items"])


SWEEP = """
import os, signal, sys, time
from smtune.reproduce.run import _pool

def work(folder):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    time.sleep(600)

if __name__ == "__main__":
    with _pool(2, 1) as pool:
        for _ in range(2):
            pool.submit(work, sys.argv[1])
        while len(os.listdir(sys.argv[1])) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.nightly
def test_a_killed_sweep_leaves_no_workers(tmp_path):
    (tmp_path / "sweep.py").write_text(SWEEP)
    (tmp_path / "workers").mkdir()
    subprocess.run([sys.executable, tmp_path / "sweep.py", tmp_path / "workers"], timeout=300)
    workers = {int(path.name) for path in (tmp_path / "workers").iterdir()}
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while workers and time.monotonic() < deadline:
        time.sleep(0.2)
        workers = {pid for pid in workers if is_running(pid)}
    assert not workers


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
