"""Sections of the page about the paper: its cost claims, and its Table 1 with our numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from smtune.report.benchmarks import claims, words
from smtune.report.benchmarks.markdown import verdict
from smtune.report.benchmarks.records import PARTS, Record, label, over
from smtune.report.markdown import DASH, prose, section, table

PAPER_TABLE_1 = {
    "full-cpuadam": (243.84, 1.0),
    "smt-1.26": (16.68, 14.6),
    "lora": (17.82, 13.6),
    "dora": (18.04, 13.5),
}
"""Seconds and speed-up by arm in the paper's Table 1: 4 A100 40 GB, batch 16, full fine-tuning offloaded."""


def claims_section(results: Record) -> str:
    """Every claim with what was measured and a verdict."""
    text = f"""Its cuts “to 0.5 %” are of full fine-tuning's cost; it gives no budget for them. Shown is SMT's cost over
    full fine-tuning's, in the suites of LLaMA-7B's layer shapes, or in all where there are none of these. *Cut to the
    trained share*: at most {claims.SLACK:g} times the trained share of the parameters, at 0.43 % and 0.84 %, in every
    suite. *Cut to 0.5 %* is judged at 0.43 %; at 0.84 % it cannot be. Of the activations the
    union of the used columns is kept, and blocks at random places touch most columns. Full fine-tuning is that of fp32
    weights, as all arms train: beside models in bf16 under autocast. The 14.6× and the 67 % are of GPUs, offloading
    and whole models, of which these two layers are none: such figures are shown and not judged."""
    heads = ("the paper", "measured", "SMT 0.43 %", "SMT 0.84 %", "trained share (0.84 %)", "cut to it", "cut to 0.5 %")
    shares = [
        (
            _quoted(row.claim.quote, row.claim.source),
            row.claim.measure,
            _over_suites(row.values, claims.SMALLEST),
            _over_suites(row.values, claims.USUAL),
            _over_suites(row.shares, claims.USUAL),
            verdict(row.to_share),
            verdict(row.to_claimed),
        )
        for row in claims.share_rows(results)
    ]
    others = [
        (_quoted(row.quote, row.source), row.where, row.measured, verdict(row.verdict))
        for row in claims.other_rows(results)
    ]
    return section(
        "## The paper's cost claims",
        prose(text),
        table(heads, shares),
        table(("the paper", "where", "measured", "verdict"), others),
    )


def _quoted(quote: str, source: str) -> str:
    return f"“{quote}” ({source})"


def _over_suites(values: Mapping[str, Mapping[str, float]], name: str) -> str:
    """The range of an arm's values over the suites."""
    found = [of[name] for of in values.values() if name in of]
    if not found:
        return DASH
    return " to ".join(dict.fromkeys(words.percent(value) for value in (min(found), max(found))))


def table1_section(results: Record) -> str:
    """The paper's Table 1, a table for every suite."""
    found = claims.table1_suites(results)
    text = f"""Means of {claims.TABLE1_ITERATIONS} iterations after a warm-up of one step; the paper's (§3.3) are of
    every 10 of 1,000, after 500. Each method is in a process of its own, so differences of some percent tell nothing.
    Times are over those of full fine-tuning that is *not* offloaded; the paper's was, to the CPU, where its optimizer
    is DeepSpeed's CPUAdam: the second row of full fine-tuning here."""
    tables = [section(f"### {suite}", _table1(arms)) for suite, arms in found.items()]
    return section("## The paper's Table 1, as ours", prose(text), *tables) if found else ""


def _table1(arms: Mapping[str, Record]) -> str:
    full = claims.table1_seconds(arms.get("full"))
    rows = []
    for name, record in arms.items():
        row = [label(record), words.percent(record.get("trained_fraction"))]
        seconds = claims.table1_seconds(record)
        if seconds is None:
            rows.append([*row, f"no result: {record.get('error') or 'no times'}"])
            continue
        row.append(words.ratio(over(seconds, full)))
        row += [words.ratio(over(float(np.mean(record[f"{part}_s"])), full)) for part in PARTS]
        speedup, theirs = over(full, seconds), PAPER_TABLE_1.get(name)
        row.append(f"{speedup:.2f}×" if speedup else DASH)
        rows.append([*row, f"{theirs[1]:g}× ({theirs[0]} s)" if theirs else DASH])
    return table(("method", "trained", "step / full's", *PARTS, "speed-up", "the paper's"), rows)
