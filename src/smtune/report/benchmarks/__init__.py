"""The report of `smtune bench`: a Markdown page with figures, and tables for the terminal, from its JSON alone.

`records` reads the JSON, `sweeps` fits how time grows, `targets` and `claims` hold what was promised, by us and by the
paper, against what was measured; `page`, `figures` and `terminal` show it, with numbers written by `words`. No verdict
is written by hand.
"""

from __future__ import annotations

import re
from pathlib import Path

from smtune.files import write_text
from smtune.report.benchmarks import figures, sweeps
from smtune.report.benchmarks.page import page as markdown
from smtune.report.benchmarks.records import Record, of_kind, quality, suites
from smtune.report.benchmarks.terminal import terminal_tables

__all__ = ["terminal_tables", "write_report"]


def write_report(results: Record, page: Path) -> list[Path]:
    """Write the page and its figures.

    Args:
        results: of `smtune bench`, as its JSON has them; any kind of record may be missing.
        page: of the Markdown file; its figures go into a folder of its name beside it.
    Returns:
        The files written, the page first.
    """
    drawn = _draw(results, page.with_suffix(""))
    write_text(page, markdown(results, {name: f"{page.stem}/{path.name}" for name, path in drawn.items()}))
    return [page, *drawn.values()]


def _draw(results: Record, folder: Path) -> dict[str, Path]:
    """All figures that the records have data for: files by the name under which the page looks for them."""
    series = sweeps.series(results)
    calls = {
        **{f"step {suite.name}": (figures.step_times, suite) for suite in suites(results)},
        **{f"memory {suite.name}": (figures.memory, suite) for suite in suites(results)},
        **{f"sweep {name}": (figures.sweep, [each for each in series if each.sweep == name]) for name in sweeps.AXES},
        "cost-aware": (figures.cost_aware, of_kind(results, "cost_aware"), quality(results)),
    }
    paths = {name: folder / (re.sub(r"[^\w.-]+", "-", name) + ".png") for name in calls}
    return {name: paths[name] for name, (draw, *given) in calls.items() if draw(*given, paths[name]) is not None}
