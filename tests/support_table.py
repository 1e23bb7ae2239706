"""docs/support.md: a cell for every claim "SMT works with X", each backed by a named test that compared with a twin.

A test backs a cell by `@pytest.mark.support(table, row=, column=, against=)`; `{name}` in these is filled from the
test's parameters. `pytest -m support --support` (`make support`) records the outcomes in docs/results/support.json and
writes the page from them; tests/unit/test_support_table.py fails when either is behind the tests.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "support.json"
PAGE = ROOT / "docs" / "support.md"

TABLES = ("PEFT", "Trainers", "Engines", "Compile and checkpointing", "Quantised bases", "Architectures", "Serving")

Cell = dict[str, str]
"""table, row, column, against, test (the node id); in the results also outcome, date and, if it was skipped, reason."""

COLLECTED = pytest.StashKey[list[Cell]]()
"""Every cell that the collected tests back, those that `-m` or `-k` leave out included."""


def cells_of(item: pytest.Item) -> list[Cell]:
    """The cells that a test backs.

    Raises:
        pytest.UsageError: a marker without table, row, column or against, or with a table that is not in `TABLES`.
    """
    parameters = _parameters(item)
    cells = []
    for marker in item.iter_markers("support"):
        if len(marker.args) != 1 or set(marker.kwargs) != {"row", "column", "against"} or marker.args[0] not in TABLES:
            raise pytest.UsageError(
                f"{item.nodeid}: expected @pytest.mark.support(table, row=, column=, against=) with a table of "
                f"{', '.join(TABLES)}. Got {marker.args} and {marker.kwargs}."
            )
        words = {name: str(text).format(**parameters) for name, text in marker.kwargs.items()}
        cells.append({"table": marker.args[0], **words, "test": item.nodeid})
    return cells


def _parameters(item: pytest.Item) -> dict[str, str]:
    """The test's parameters in words: their own where they are text, else their ids."""
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return {}
    ids = callspec._idlist if len(callspec._idlist) == len(callspec.params) else [callspec.id] * len(callspec.params)
    return {
        name: value if isinstance(value, str) else str(word)
        for (name, value), word in zip(callspec.params.items(), ids)
    }


class Recorder:
    """Writes the results and the page at the end of a run with `--support`; in the process that hears of all tests."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, ...], Cell] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, cell in report.user_properties:
            if name != "support" or (report.when != "call" and report.passed):
                continue
            known = self.cells.setdefault(
                _key(cell), cell | {"outcome": report.outcome, "date": time.strftime("%Y-%m-%d")}
            )
            if report.outcome != "passed":
                known["outcome"] = report.outcome
                if report.skipped and isinstance(report.longrepr, tuple):
                    known["reason"] = report.longrepr[2].removeprefix("Skipped: ")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        collected = session.config.stash.get(COLLECTED, None)
        kept = {_key(cell): cell for cell in read()}
        for key, cell in self.cells.items():
            # What this environment lacks may have been there before: the earlier result stands, with its date.
            if cell["outcome"] != "skipped" or key not in kept:
                kept[key] = cell
        if collected and is_whole(session.config):
            kept = {key: cell for key, cell in kept.items() if not is_gone(cell, collected)}
        cells = sorted(kept.values(), key=lambda cell: (_place(cell), cell["test"]))
        RESULTS.write_text(json.dumps(cells, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        PAGE.write_text(render(cells), encoding="utf-8")


def is_whole(config: pytest.Config) -> bool:
    """Whether all tests were collected, rather than those of some files."""
    return config.args_source == pytest.Config.ArgsSource.TESTPATHS


def is_gone(cell: Cell, collected: Sequence[Cell]) -> bool:
    """Whether no test backs the cell any more, though its file was collected, which may want a package, or is gone."""
    file = cell["test"].partition("::")[0]
    if any(each["test"].startswith(f"{file}::") for each in collected):
        return _key(cell) not in {_key(each) for each in collected}
    return not (ROOT / file).exists()


def read() -> list[Cell]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []


def _key(cell: Cell) -> tuple[str, ...]:
    return tuple(cell[name] for name in ("table", "row", "column", "test"))


def _place(cell: Cell) -> tuple[int, str, str]:
    return TABLES.index(cell["table"]), cell["row"].lower(), cell["column"].lower()


HEAD = """# What smtune works with

Every cell is backed by a test that *compared* SMT with a twin named below its table (losses, gradients or final
blocks, not merely "it ran"). The page is written from the tests' own outcomes by `make support`.

✓ passed · – not run on the machine that wrote this page, with the reason below · ✗ failed · blank: no test, so no claim
"""

SIGNS = {"passed": "✓", "skipped": "–", "failed": "✗"}


def render(cells: Sequence[Cell]) -> str:
    """The page."""
    parts = [HEAD]
    for table, group in groupby(sorted(cells, key=_place), key=lambda cell: cell["table"]):
        parts.append(_table(table, list(group)))
    return "\n".join(parts)


def _table(table: str, cells: Sequence[Cell]) -> str:
    columns = sorted({cell["column"] for cell in cells}, key=str.lower)
    lines = [f"## {table}\n", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, group in groupby(cells, key=lambda cell: cell["row"]):
        by_column: dict[str, list[Cell]] = {}
        for cell in group:
            by_column.setdefault(cell["column"], []).append(cell)
        lines.append(f"| {row} | " + " | ".join(_sign(by_column.get(column, [])) for column in columns) + " |")
    return "\n".join([*lines, "", *_grounds(cells), *_gaps(cells), ""])


def _sign(cells: Iterable[Cell]) -> str:
    """The worst of a cell's outcomes."""
    outcomes = {cell["outcome"] for cell in cells}
    return next((SIGNS[outcome] for outcome in ("failed", "skipped", "passed") if outcome in outcomes), "")


def _grounds(cells: Sequence[Cell]) -> list[str]:
    """A line for each test function and twin."""
    twins: dict[tuple[str, str], set[str]] = {}
    for cell in cells:
        twins.setdefault((cell["test"].partition("[")[0], cell["against"]), set()).add(cell["date"])
    return [
        f"- `{test}` compares with {against} (last run {max(dates)})"
        for (test, against), dates in sorted(twins.items())
    ]


def _gaps(cells: Sequence[Cell]) -> list[str]:
    return [
        f"- – {cell['row']}, {cell['column']}: {cell.get('reason', 'not run')}"
        for cell in cells
        if cell["outcome"] == "skipped"
    ]


def note_cells(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    """Find the cells of the collected tests, and have each test's reports carry its own."""
    cells: list[Any] = []
    for item in items:
        own = cells_of(item)
        item.user_properties.extend(("support", cell) for cell in own)
        cells.extend(own)
    config.stash[COLLECTED] = cells
