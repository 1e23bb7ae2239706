"""The README's tables of step times and accuracies are those of the records and tables that its pages hold."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from smtune.report.benchmarks.records import median, step_ratios, suites, timed_together

ROOT = Path(__file__).parents[2]
SUITES = {
    "7B shapes, fp32": "layers7b-float32-1024",
    "7B shapes, bf16": "layers7b-bfloat16-1024",
    "SmolLM2-135M, bf16": "smollm2-bfloat16-512",
    "SmolLM2-135M, fp32": "smollm2-float32-512",
}
ARMS = {
    "control": "control",
    "SMT 0.84 %": "smt-0.84",
    "SMT 4.91 %": "smt-4.91",
    "LoRA": "lora",
    "LoRA 4.91 %": "lora-4.91",
    "LoRA, autocast": "lora-autocast",
    "LoRA, all linear": "lora-all",
    "DoRA": "dora",
    "DoRA, autocast": "dora-autocast",
    "SHiRA": "shira",
    "Super-tuning": "supertuning",
    "dense v_proj": "dense-v",
    "the paper's listing": "appendix-a",
    "full": "full",
}


def tables(head="SMT 0.84 %"):
    """(page linked before it, rows) of each table with a column of that head; a row is its cells by head."""
    page, found = "", []
    for block in re.split(r"\n\s*\n", (ROOT / "README.md").read_text(encoding="utf-8")):
        lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        if block.strip().startswith("|") and head in lines[0]:
            found.append((page, [dict(zip(lines[0], line)) for line in lines[2:]]))
        linked = re.findall(r"\]\(docs/(benchmarks\w*)\.md\)", block)
        page = linked[-1] if linked else page
    return found


@pytest.mark.parametrize(("page", "rows"), tables(), ids=[page for page, _ in tables()])
def test_step_times_are_those_of_the_records(page, rows):
    path = ROOT / "docs" / "results" / f"{page.replace('benchmarks', 'bench')}.json"
    of = {suite.name: suite for suite in suites(json.loads(path.read_text(encoding="utf-8")))}
    assert len(rows) == len(SUITES)
    for row in rows:
        suite = of[SUITES[row.pop("")]]
        for head, cell in row.items():
            arm = suite.arms.get(ARMS[head])
            value = median(step_ratios(arm)) if timed_together(arm) else None
            decimals = len(cell.partition(".")[2])
            assert cell == ("–" if value is None else f"{value:.{decimals}f}"), (page, suite.name, head)


def test_there_are_such_tables():
    assert [page for page, _ in tables()] == ["benchmarks", "benchmarks_xeon"]


ACCURACIES = (
    (("mini/study-methods", "math"), ("mini/study-methods", "choice")),
    (("mini/study-unseen", "unseen-math"), ("mini/study-unseen", "unseen-choice")),
    (("smollm2/study-short", None), ("smollm2/table2", None)),
)
"""By table and row of the README: which table of `smtune reproduce`, and which of its tasks."""
METHODS = {
    "untuned": ("untuned",),
    "SMT, best blocks": ("SMT",),
    "random blocks": ("control: random blocks",),
    "SMT, sampled": ("SMT, sampled",),
    "the same, all linear layers": ("SMT, sampled, all linear layers, blocks of 32²",),
    "the same, all linear layers, half blocks": ("SMT, sampled, all linear layers, blocks of 4²",),
    "LoRA": ("LoRA on q, k, v", "LoRA"),
    "LoRA on q, k, v": ("LoRA on q, k, v",),
    "LoRA, all linear": ("LoRA on all linear layers",),
    "SHiRA": ("SHiRA",),
    "full": ("Full fine-tuning",),
}


def test_accuracies_are_those_of_the_tables():
    found = tables("SMT, sampled")
    assert [len(rows) for _, rows in found] == [len(rows) for rows in ACCURACIES]
    for (_, rows), sources in zip(found, ACCURACIES):
        for row, (source, task) in zip(rows, sources):
            path = ROOT / "docs" / "results" / "reproduce" / f"{source}.csv"
            with path.open(encoding="utf-8", newline="") as file:
                ours = [line for line in csv.DictReader(file) if line["source"] == "smtune"]
            known = {line["method"]: line["AVG (95 %)"].split()[0] for line in ours if task in (None, line.get("task"))}
            for head, cell in row.items():
                if head == "right, %":
                    continue
                value = next((known[label] for label in METHODS[head] if label in known), None)
                decimals = len(cell.partition(".")[2])
                assert cell == ("–" if value is None else f"{float(value):.{decimals}f}"), (source, task, head)
