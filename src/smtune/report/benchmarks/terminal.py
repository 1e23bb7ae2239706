"""The page's main tables in short, for the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from smtune.report.benchmarks import words
from smtune.report.benchmarks.records import (
    Record,
    Suite,
    all_flops,
    beyond_floor,
    floor_flops,
    get,
    label,
    over,
    ran,
    spread,
    step_ratios,
    suites,
)
from smtune.report.benchmarks.targets import ABSENT, HOLDS, MISSED, targets

COLOURS = {HOLDS: "green", MISSED: "bold red"}


def terminal_tables(results: Record) -> list[Table]:
    """A table for every suite, and one of the targets.

    Args:
        results: of `smtune bench`, as its JSON has them.
    """
    return [*(_suite(suite) for suite in suites(results)), _targets(results)]


def _suite(suite: Suite) -> Table:
    table = Table(title=f"{suite.name}: {suite.setting()}", title_justify="left")
    table.add_column("arm")
    for heading in ("share", "step / floor (25–75 %)", "FLOPs", "saved", "optimizer", "peak"):
        table.add_column(heading, justify="right")
    for name, arm in suite.arms.items():
        share = words.percent(over(arm.get("trained_params"), arm.get("total_params")))
        if not ran(arm):
            table.add_row(Text(label(arm)), share, Text(str(arm.get("error")), style="red"))
            continue
        found = spread(step_ratios(arm))
        ratios = "1" if name == "floor" else words.with_quartiles(found) + (" wide" if found and found.wide else "")
        table.add_row(
            Text(label(arm)),
            share,
            ratios,
            words.ratio(over(all_flops(arm), floor_flops(arm, suite.floor))),
            words.signed_size(beyond_floor(suite, name, "saved_bytes")),
            words.size(get(arm, "state_bytes", "optimizer")),
            words.signed_size(beyond_floor(suite, name, "peak_tensor_bytes")),
        )
    table.caption = "FLOPs, saved and peak (counted): over or beyond the floor's"
    return table


def _targets(results: Record) -> Table:
    rows = targets(results)
    measured = [row for row in rows if row.verdict != ABSENT]
    table = Table(title="Targets", title_justify="left", caption=f"{len(rows) - len(measured)} targets not measured")
    for heading in ("from", "target", "where", "measured"):
        table.add_column(heading)
    table.add_column("verdict", no_wrap=True)
    for row in measured:
        cells = map(Text, (row.group, row.what, row.where, row.measured))
        table.add_row(*cells, Text(row.verdict, COLOURS.get(row.verdict, "")))
    return table
