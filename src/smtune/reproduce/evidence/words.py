"""Numbers, arms and cells in words: one way to write each."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from smtune.evaluation.statistics import Estimate
from smtune.reproduce.cells import UNBUDGETED, Record, budget_text
from smtune.reproduce.evidence.records import Found, Results
from smtune.reproduce.run import CELLS

BENCHMARKS = "`smtune bench`"
DASH = "–"


def points(estimate: Estimate) -> str:
    """A difference of accuracies with its interval, in points."""
    return _signed(Estimate(*(100 * value for value in (estimate.value, estimate.low, estimate.high))), 1)


def loss(estimate: Estimate | None) -> str:
    """A difference of losses with its interval."""
    return DASH if estimate is None else _signed(estimate, 3)


def _signed(estimate: Estimate, digits: int) -> str:
    value = f"{estimate.value:+.{digits}f}"
    if not math.isfinite(estimate.low):
        return _minus(f"{value} (one seed)")
    return _minus(f"{value} ({estimate.low:+.{digits}f} to {estimate.high:+.{digits}f})")


def share(estimate: Estimate) -> str:
    """A share with its interval, in percent."""
    if not math.isfinite(estimate.low):
        return f"{100 * estimate.value:.1f} %"
    low, high = (_minus(f"{100 * value:.1f}") for value in (estimate.low, estimate.high))
    return f"{100 * estimate.value:.1f} % ({low} to {high})"


def percent(value: float, digits: int = 3) -> str:
    return f"{100 * value:.{digits}g} %"


def p_value(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def name(found: Found, with_budget: bool = False) -> str:
    """An arm's label, and its budget where it has one."""
    has_one = with_budget and found.arm.row.method not in UNBUDGETED
    return f"{found.label} {budget_text(found.arm.budget)}" if has_one else found.label


def listed(texts: Sequence[str]) -> str:
    """Labels in a row; they hold commas themselves."""
    return "; ".join(texts)


def _minus(text: str) -> str:
    return text.replace("-", "−")


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
