"""Arms and cells in words: one way to write each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from smtune.report.markdown import DASH
from smtune.reproduce.cells import UNBUDGETED, Record, budget_text
from smtune.reproduce.evidence.records import Found, Results
from smtune.reproduce.run import CELLS

BENCHMARKS = "`smtune bench`"


def name(found: Found, with_budget: bool = False) -> str:
    """An arm's label, and its budget where it has one."""
    has_one = with_budget and found.arm.row.method not in UNBUDGETED
    return f"{found.label} {budget_text(found.arm.budget)}" if has_one else found.label


def listed(texts: Sequence[str]) -> str:
    """Labels in a row; they hold commas themselves."""
    return "; ".join(texts)


class Links:
    """Links to cells from a page.

    Args:
        page: where they stand.
        bench: the results of `smtune bench`.
    """

    def __init__(self, page: Path, bench: Path) -> None:
        self.folder = page.parent
        self.bench = f"[{bench.name}]({self.to(bench)})"

    def to(self, path: Path) -> str:
        return Path(os.path.relpath(path, self.folder)).as_posix()

    def cells(self, results: Results, records: Iterable[Record]) -> str:
        """The cells in the order given, each once; a dash for none."""
        ids = dict.fromkeys(record["cell"] for record in records)
        place = self.to(results.folder / CELLS)
        return " ".join(f"[{each[:6]}]({place}/{each}.jsonl)" for each in ids) or DASH
