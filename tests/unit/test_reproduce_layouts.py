"""Pages from records made by hand: what a table says of intervals, verdicts, leaks, and of itself."""

from __future__ import annotations

import csv
import json
import re

import pytest

from smtune.errors import InputError
from smtune.reproduce import setting as setting_module
from smtune.reproduce.declared import Experiment, Row, load_experiment
from smtune.reproduce.layouts import collect, render, title_of
from smtune.reproduce.run import Request
from smtune.reproduce.setting import Setting, load_data
from smtune.reproduce.store import Store

N = 400


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """Cells that name neither weights nor data: nothing is loaded."""
    monkeypatch.setattr(Setting, "base", lambda self, model, family: {"model": model, "family": family})
    monkeypatch.setattr(Setting, "is_cut", property(lambda self: self.steps is not None))


def save(store, cell, right, tests=("comparison",), overlap=0, **metrics):
    """A record with `right` of N items right in each test."""
    items = [{"task": test, "index": k, "correct": k < right} for test in tests for k in range(N)]
    values = {
        "trained_parameters": 9216,
        "total_parameters": 1_000_000,
        "validation": {"correct": right, "items": N},
        "validation_loss": 1.0,
        "other_text_loss": 2.0,
        "tests": {test: {"correct": right, "items": N} for test in tests},
    }
    record = {
        "metrics": values | metrics,
        "measured": {},
        "overlap": {test: overlap * (test == "AddSub") for test in tests},
    }
    store.save(cell, record, items)


def experiment(*rows, **fields):
    return Experiment(name="made", title="Made up", layout="accuracy", rows={"embedded": list(rows)}, **fields)


def row(label, method="smt", **fields):
    return Row(label=label, method=method, learning_rates=[1e-3], **fields)


def page_of(made, request, store, tmp_path):
    written = render(collect(made, request, store), tmp_path / "pages")
    assert all(path.is_file() for path in written)
    return written[0].read_text(encoding="utf-8")


def line(page, label):
    (found,) = [each for each in page.splitlines() if f"| {label} |" in each]
    return found


def test_verdicts(tmp_path):
    made = experiment(row("SMT"), row("LoRA", "lora"), row("DoRA", "dora"), row("full", "full"), row("SIFT", "sift"))
    request, store = Request(Setting("mini"), seeds=[0]), Store(tmp_path)
    for arm, right in zip(request.arms(made), (200, 200, 300, 204, 100)):
        save(store, arm.sweep()[0], right)
    page = page_of(made, request, store, tmp_path)
    assert "| 50.0 (45.1 to 54.9) | – |" in line(page, "SMT")
    assert "+0.0 (−0.5 to +0.5), p = 1, *tie*" in line(page, "LoRA")
    assert re.search(r"\+25\.0 \(\+2\d.* to \+[23]\d.*\), p < 0\.001, \*better\*", line(page, "DoRA"))
    assert "*worse*" in line(page, "SIFT")
    assert "incomplete" not in page
    assert "not a result" not in page


@pytest.mark.parametrize("cut", ["a character", "half a line", "a line", "another's"])
def test_a_cell_that_is_not_whole_is_refused(cut, tmp_path):
    request, store = Request(Setting("mini"), seeds=[0]), Store(tmp_path)
    (arm, *_) = request.arms(experiment(row("SMT")))
    cell = arm.sweep()[0]
    save(store, cell, 200)
    text = store.path(cell.id).read_text(encoding="utf-8")
    cuts = {
        "a character": text[:-1],
        "half a line": text[:-20],
        "a line": text[: text.rindex("\n", 0, -1) + 1],
        "another's": text.replace(cell.id, "0" * 16),
    }
    store.path(cell.id).write_text(cuts[cut], encoding="utf-8")
    with pytest.raises(InputError, match=rf"whole of cell {cell.id} .*delete the file"):
        store.find(cell)


@pytest.mark.parametrize("rival", [0.0083, 0.0081])
def test_a_rival_is_held_against_smt_of_the_size_that_a_rank_allows(rival, tmp_path):
    rows = [("SMT", "smt", 0.0084), ("LoRA", "lora", rival), ("far", "lora", 0.0043)]
    made = experiment(*[row(label, method, budgets=[budget]) for label, method, budget in rows])
    request, store = Request(Setting("mini"), seeds=[0]), Store(tmp_path)
    for arm in request.arms(made):
        save(store, arm.sweep()[0], 200)
    page = page_of(made, request, store, tmp_path)
    assert "*tie*" in line(page, "LoRA")
    assert "tie" not in line(page, "far")


def test_a_difference_that_may_be_anything_is_undecided(tmp_path):
    made = experiment(row("SMT"), row("LoRA", "lora"))
    request, store = Request(Setting("mini"), seeds=[0, 1]), Store(tmp_path)
    smt, lora = request.arms(made)
    for arm, counts in ((smt, (200, 204)), (lora, (160, 250))):
        for seed, right in enumerate(counts):
            save(store, arm.cell(1e-3, seed), right)
    page = page_of(made, request, store, tmp_path)
    assert "*undecided*" in line(page, "LoRA")
    assert "| 2 of 5 | 2 of 2 |" in line(page, "LoRA")
    low, high = map(float, re.search(r"51\.2 \(([\d.]+) to ([\d.]+)\)", line(page, "LoRA")).groups())
    assert high - low > 50  # two seeds that differ by 22 points say little


def test_what_is_missing_stands_in_the_table(tmp_path):
    made = experiment(row("SMT"), row("LoRA", "lora"))
    request, store = Request(Setting("mini"), seeds=[0, 1, 2]), Store(tmp_path)
    save(store, request.arms(made)[0].cell(1e-3, 0), 200)
    page = page_of(made, request, store, tmp_path)
    assert "| **incomplete: 1 of 6 cells** |" in page
    assert "| 1 of 5 | 1 of 3 |" in line(page, "SMT")
    assert "| 0 of 5 | 0 of 3 |" in line(page, "LoRA")
    rows = list(csv.reader((tmp_path / "pages/made.csv").read_text(encoding="utf-8").splitlines()))
    assert rows[-1][:2] == ["smtune", "**incomplete: 1 of 6 cells**"]


def test_a_trial_is_no_result(tmp_path):
    made = experiment(row("SMT"))
    request, store = Request(Setting("mini", steps=2), seeds=[0]), Store(tmp_path)
    save(store, request.arms(made)[0].cell(1e-3, 0), 200)
    page = page_of(made, request, store, tmp_path)
    assert "A trial, not a result: 2 of 200 steps" in page
    assert "| **a trial, not a result** |" in page


def test_leaked_tests_are_marked_and_left_out_of_a_second_average(tmp_path):
    made = experiment(row("SMT"), families=["math"])
    request, store = Request(Setting("mini"), seeds=[0]), Store(tmp_path)
    cell = request.arms(made)[0].cell(1e-3, 0)
    save(store, cell, 200, tests=("AddSub", "SVAMP"), overlap=3)
    path = store.path(cell.id)  # all of AddSub right: it was seen
    lines = [json.loads(each) for each in path.read_text().splitlines()]
    lines = [each | {"correct": True} if each.get("task") == "AddSub" else each for each in lines]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    page = page_of(made, request, Store(tmp_path), tmp_path)
    assert "| AddSub † | SVAMP | AVG (95 %) | AVG, leak-free |" in page
    shown = line(page, "SMT")
    assert re.search(r"\| 100\.0 \| 50\.0 \| 75\.0 \(.*?\) \| 50\.0 \(45\.1 to 54\.9\) \|", shown)
    assert "† questions of AddSub are among the training rows too" in page
    assert "Test questions that are among the training rows, by normalised text: 3 of *math*." in page


@pytest.mark.parametrize("layout", ["accuracy", "scaling"])
def test_the_average_over_tests_counts_a_seed_once(tmp_path, layout):
    """Seeds at 50, 60 and 70 % on each of eight tests: Student's 4.303 · 10 / √3 and a little of the items."""
    tests = [f"test {k}" for k in range(8)]
    made = experiment(row("SMT")).model_copy(update={"layout": layout})
    request, store = Request(Setting("mini"), seeds=[0, 1, 2]), Store(tmp_path)
    (arm,) = request.arms(made)
    for seed, right in enumerate((200, 240, 280)):
        save(store, arm.cell(1e-3, seed), right, tests=tests)
    page = page_of(made, request, store, tmp_path)
    low, high = map(float, re.search(r"\| 60\.0 \(([\d.]+) to ([\d.]+)\) \|", line(page, "SMT")).groups())
    assert high - low == pytest.approx(2 * 4.303 * 10 / 3**0.5, abs=0.3)


def test_the_papers_numbers_stand_apart(tmp_path):
    made = experiment(row("SMT"), published=load_experiment("table2").published)
    request, store = Request(Setting("mini"), seeds=[0]), Store(tmp_path)
    save(store, request.arms(made)[0].cell(1e-3, 0), 200)
    ours, theirs = page_of(made, request, store, tmp_path).split("## The paper's own numbers")
    assert "81.4" in theirs
    assert "81.4" not in ours
    assert "not run here" in theirs


def test_memory_claims_are_judged(tmp_path):
    made = load_experiment("memory")
    request, store = Request(Setting("paper")), Store(tmp_path)
    assert {cell.config["recipe"]["batch_size"] for arm in request.arms(made) for cell in arm.sweep()} == {16}
    totals = {"Full fine-tuning": 100, "SMT": 25, "LoRA": 24}
    for arm in request.arms(made):
        values = dict.fromkeys(("base", "trained", "gradients", "optimizer", "originals", "activations"), 10**9)
        total = totals.get(arm.row.label, 30) * 10**9
        whole = 10 if arm.row.method == "full" else 1
        metrics = {**values, "total": total, "with_paper_dtypes": total - 6 * 10**9}
        metrics |= {"trained_parameters": whole, "total_parameters": 10}
        for cell in arm.sweep():
            store.save(cell, {"metrics": metrics, "measured": {}}, [])
    page = page_of(made, request, store, tmp_path)
    assert "| 67 % less than full, LLaMA-7B | fp32 | 75 % less | holds |" in page
    assert "| LLaMA-7B below 20 GB | fp32 | 25.0 GB | **does not hold** |" in page
    assert "| LLaMA-7B below 20 GB | bf16, as the paper | 19.0 GB | holds |" in page
    assert "1,000 MB more | **does not hold** |" in page


# Data of a folder -----------------------------------------------------------------------------------------------------


def test_data_of_a_folder(tmp_path, monkeypatch):
    """Rows take their task from their file; questions of a test among them are counted."""
    load_data.cache_clear()
    questions = [f"Ann has {k} eggs and gets {k + 1} more. How many eggs?" for k in range(40)]
    answers = [str(2 * k + 1) for k in range(40)]
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    rows = [
        {"instruction": q, "input": "", "output": f"The answer is {a}.", "answer": a}
        for q, a in zip(questions, answers)
    ]
    (tmp_path / "train/mawps.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    for task in ("SingleEq", "SVAMP", "MultiArith", "AddSub"):
        tested = [{**each, "output": "", "instruction": f"{task}: {each['instruction']}"} for each in rows[:10]]
        if task == "AddSub":
            tested[3] = {**rows[3], "instruction": rows[3]["instruction"].upper()}
        (tmp_path / f"test/{task}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in tested))
    monkeypatch.setattr(setting_module.mini, "is_held_out", lambda text: True)
    data = load_data(Setting("real", data=str(tmp_path)), "math")
    assert len(data.train) + len(data.validation) == 40
    assert len(data.validation) == 8  # a fifth, fewer than the tier asks for
    assert data.overlap == {"SingleEq": 0, "SVAMP": 0, "MultiArith": 0, "AddSub": 1}
    assert "1 of 40 test questions are among 40 training rows (AddSub 1)" in data.overlap_text()
    assert len({json.dumps(row) for row in data.train} & {json.dumps(row) for row in data.validation}) == 0

    for place in (
        *tmp_path.glob("train/*"),
        *tmp_path.glob("test/*"),
    ):  # in folders by task, as LLM-Adapters'
        moved = tmp_path / "dataset" / place.stem / f"{place.parent.name}.json"
        moved.parent.mkdir(parents=True, exist_ok=True)
        moved.write_text(json.dumps([json.loads(line) for line in place.read_text().splitlines()]))
        place.unlink()
    (tmp_path / "test").rmdir()
    load_data.cache_clear()
    assert load_data(Setting("real", data=str(tmp_path)), "math").identity == data.identity
    load_data.cache_clear()


def test_a_picture_says_how_many_cells_are_missing(tmp_path):
    made = experiment(row("SMT"), row("LoRA", method="lora"))
    request, store = Request(Setting("mini"), seeds=[0]), Store(tmp_path)
    arms = request.arms(made)
    save(store, arms[0].cell(arms[0].rates[0], 0), 200)
    expected = sum(arm.n_cells for arm in arms)
    assert title_of(collect(made, request, store)).endswith(f" (1 of {expected} cells)")
    for arm in arms:
        for cell in arm.sweep():
            save(store, cell, 200)
    assert not title_of(collect(made, request, store)).endswith("cells)")


def test_a_page_of_a_stand_in_says_so(tmp_path):
    made = experiment(row("SMT"))
    request, store = Request(Setting("smollm2"), seeds=[0]), Store(tmp_path)
    save(store, request.arms(made)[0].cell(1e-3, 0), 200)
    assert "Trained and tested on *comparison* in place of *choice*" in page_of(made, request, store, tmp_path)
    request = Request(Setting("mini"), seeds=[0])
    assert "in place of" not in page_of(made, request, store, tmp_path)


def test_a_pruned_page_names_the_rates_of_every_row(tmp_path):
    pruned = {"seeds": 1, "learning_rates": {"default": [3e-3], "full": [1e-5]}}
    made = experiment(row("SMT"), Row(label="LoRA", method="lora"), Row(label="full", method="full"), pruned=pruned)
    request, store = Request(Setting("mini")), Store(tmp_path)
    for arm in request.arms(made):
        save(store, arm.sweep()[0], 200)
    page = page_of(made, request, store, tmp_path)
    said = "**Pruned**, of the tier's 5 learning rates and 5 seeds: rates 0.003; of full 1e-05; 1 seed."
    assert page.index(said) < page.index("| model | method |")
    assert "Rates of their own: SMT 0.001." in page


def test_a_page_that_is_not_pruned_names_the_rates_of_its_rows_too(tmp_path):
    made = experiment(row("SMT"), Row(label="LoRA", method="lora"))
    request, store = Request(Setting("mini")), Store(tmp_path)
    save(store, request.arms(made)[0].sweep()[0], 200)
    page = page_of(made, request, store, tmp_path)
    assert "Pruned" not in page
    assert "Rates of their own: SMT 0.001." in page


def test_steps_of_a_rows_own_are_named(tmp_path):
    made = experiment(row("SMT", steps=178), row("LoRA", "lora"))
    request, store = Request(Setting("mini")), Store(tmp_path)
    save(store, request.arms(made)[0].sweep()[0], 200)
    assert "200 steps of 8 rows, but for the steps of SMT 178. Each arm" in page_of(made, request, store, tmp_path)


def test_steps_of_rows_of_other_models_are_not_named(tmp_path):
    made = experiment(row("SMT"), row("fewer", steps=178, models=["mini"]))
    request, store = Request(Setting("smollm2"), seeds=[0]), Store(tmp_path)
    save(store, request.arms(made)[0].sweep()[0], 200)
    assert "60 steps of 4 rows. Each arm" in page_of(made, request, store, tmp_path)


def test_seeds_are_counted_against_those_declared(tmp_path):
    made = experiment(row("SMT"), Row(label="untuned", method="base"))
    request, store = Request(Setting("mini"), seeds=[0]), Store(tmp_path)
    smt, untuned = request.arms(made)
    save(store, smt.cell(1e-3, 0), 200, finite=False)
    save(store, untuned.sweep()[0], 100)
    page = page_of(made, request, store, tmp_path)
    assert "| 1 of 5, 1 stopped at a loss that is not finite | 1 of 1 |" in line(page, "SMT")
    assert "| 1 of 1 | 1 of 1 |" in line(page, "untuned")


@pytest.mark.parametrize(("items", "judged_by", "values"), [(N, "accuracy", [0.5, 0.25]), (0, "loss", [0.7, 0.9])])
def test_a_sweep_shows_loss_where_held_out_rows_have_no_answers(tmp_path, monkeypatch, items, judged_by, values):
    drawn = []
    monkeypatch.setattr("smtune.reproduce.layouts.curves", lambda series, path, **words: drawn.append((series, words)))
    made = experiment(Row(label="SMT", method="smt", learning_rates=[1e-3, 1e-2]))
    request, store = Request(Setting("mini"), seeds=[0]), Store(tmp_path)
    for cell, right, loss in zip(request.arms(made)[0].sweep(), (200, 100), (0.7, 0.9)):
        save(store, cell, right, validation={"correct": right if items else 0, "items": items}, validation_loss=loss)
    render(collect(made, request, store), tmp_path / "pages")
    ((series, words),) = drawn
    assert words["y"] == f"{judged_by} on held-out training rows"
    ((_, points),) = series.items()
    assert [(rate, estimate.value) for rate, estimate in points] == list(zip((1e-3, 1e-2), values))
