"""Sections of the page that answer single questions: growth, cost-aware selection, scoring, writing, kernels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from smtune.report.benchmarks import sweeps, words
from smtune.report.benchmarks.markdown import Pictures, image, verdict
from smtune.report.benchmarks.records import (
    Record,
    get,
    of_kind,
    over,
    quality,
    ran,
    spread,
    step_ratios,
)
from smtune.report.benchmarks.targets import (
    HOLDS,
    MISSED,
    OPEN,
    SCORING,
    best_candidate,
    compare,
    how_apart,
    kernel_cases,
    rates_of_case,
    scoring_ratios,
)
from smtune.report.markdown import DASH, bullets, prose, section, table


def growth_section(results: Record, pictures: Pictures) -> str:
    """Fitted exponents of every sweep."""
    rows = []
    for series in sweeps.series(results):
        name = (series.axis.name, series.dtype)
        for measure in [*series.measures, "floor"]:
            target = series.axis.targets.get(measure)
            exponent = words.exponent(sweeps.fit(series, measure))
            shown = DASH if target is None else f"{target:g}"
            rows.append((*name, sweeps.MEASURES[measure], exponent, shown))
        flops = sweeps.flops_exponent(series)
        if flops is not None:
            rows.append((*name, "FLOPs above the floor, counted", f"{flops:.3f}", DASH))
    text = """Exponents of the power law nearest to the medians, by least squares in seconds, each point weighted by
    what is known of it, with 95 % bootstrap intervals: 1 is linear, 0 flat. The step above the floor is a small
    difference of two large times; where its median is not above zero, the point counts but has no place in the
    picture. It holds the writes of the blocks and the optimizer's step too, which do not grow with tokens. *Block
    operators* is the time in smtune's own operators, the block gradients, by torch's profiler on steps of their
    own. In the sweep of layers blocks stay in the top layers and layers without blocks are added below; each model
    has its own floor, which ends where the blocks end."""
    parts = [
        table(("against", "dtype", "time of", "exponent", "target"), rows),
        table(
            ("against", "dtype", "model", "tokens", "block size", "trained parameters", "pairs a point"),
            _settings(results),
        ),
        *(image(pictures, f"sweep {name}", f"Time against {axis.name}") for name, axis in sweeps.AXES.items()),
        _failed(results, "sweep", ("sweep", "value", "dtype")),
    ]
    return section("## How time grows", prose(text), *parts) if any(parts) else ""


def _settings(results: Record) -> list[list[str]]:
    """What each sweep was measured on; what it varies has several values."""
    rows = []
    for sweep, axis in sweeps.AXES.items():
        for dtype in dict.fromkeys(record.get("dtype", "") for record in of_kind(results, "sweep")):
            found = [r for r in of_kind(results, "sweep") if (r.get("sweep"), r.get("dtype")) == (sweep, dtype)]
            found = [record for record in found if step_ratios(record).size]
            values = [
                [record.get(key) for record in found] for key in ("model", "tokens", "block_size", "trained_params")
            ]
            values.append([len(step_ratios(record)) for record in found])
            cells = [", ".join(dict.fromkeys(str(value) for value in of if value is not None)) for of in values]
            rows += [[axis.name, dtype, *cells]] * bool(found)
    return rows


def _failed(results: Record, kind: str, keys: tuple[str, ...]) -> str:
    """The records of a kind that hold an error, named by what they have of these keys."""
    failed = [record for record in of_kind(results, kind) if record.get("error")]
    names = [", ".join(f"{key} {record[key]}" for key in keys if key in record) for record in failed]
    return bullets("Without a result:", [f"{name}: {record['error']}" for name, record in zip(names, failed)])


def cost_aware_section(results: Record, pictures: Pictures) -> str:
    """Score kept, and quality where there is some, against time."""
    found = of_kind(results, "cost_aware")
    measured = quality(results)
    rows = []
    for record in found:
        cost, lowest = record.get("max_backward_cost"), record.get("lowest_layer")
        row = [record.get("suite", ""), DASH if cost is None else f"{cost:g}"]
        if not ran(record):
            rows.append([*row, f"no result: {record['error']}"])
            continue
        row += [words.percent(record.get("backward_cost")), words.percent(record.get("score_kept"))]
        row += [DASH if lowest is None else str(lowest), words.with_quartiles(spread(step_ratios(record)))]
        of = measured.get(cost) if cost is not None else None
        if of is not None:
            row += [words.count(record.get("blocks")), words.count(of.blocks), words.percent(of.score_kept)]
            row += [words.ratio(of.held_out_loss), f"{of.right} of {of.of}" if of.of else DASH, str(of.runs)]
        rows.append(row)
    heads = ["suite", "max_backward_cost", "counted backward", "score kept", "lowest layer", "step / floor"]
    if measured:
        heads += ["blocks timed", "blocks trained", "their score kept", "held-out loss", "right", "runs"]
    text = """A plan that leaves the lowest layers whole has a backward that ends above them. *max_backward_cost* is the
    share of the whole chain of dX that a plan may cost; the floor here is that of the whole chain. The score kept
    is over that of the plan without such a limit."""
    picture = image(pictures, "cost-aware", "Score kept against time of a step")
    return section("## Cost-aware selection: below the floor", prose(text), table(heads, rows), picture) if rows else ""


def scoring_section(results: Record) -> str:
    """One batch of scoring against its own floor."""
    rows = []
    for record in of_kind(results, "scoring"):
        row = [record.get("suite", ""), record.get("criterion", ""), record.get("accumulator", "")]
        if not ran(record):
            rows.append([*row, f"no result: {record['error']}"])
            continue
        row += [words.with_quartiles(spread(values)) for values in scoring_ratios(record).values()]
        row.append(words.ratio(over(_flops(record, "score"), _flops(record, "dense"))))
        sizes = ("accumulator_bytes", "peak_rss_bytes")
        rows.append([*row, *(words.size(record.get(key)) for key in sizes)])
    text = f"""One warm-up batch, against the floor and against *dense*: the floor with the dense gradients of the
    targeted weights, by ordinary autograd. The target is at most {SCORING} of dense."""
    heads = ("suite", "criterion", "accumulator", "score / floor", "dense / floor", "score / dense")
    heads += ("FLOPs, score / dense", "accumulators", "peak of the process")
    return section("## Scoring", prose(text), table(heads, rows)) if rows else ""


def _flops(record: Record, key: str) -> float | None:
    """Counted FLOPs of a batch: a number, or numbers by part."""
    flops = get(record, "flops", key)
    return sum(flops.values()) if isinstance(flops, Mapping) else flops


def writing_section(results: Record) -> str:
    """Blocks written at use against after the step."""
    by_suite: dict[str, dict[str, Record]] = {}
    for record in of_kind(results, "write"):
        by_suite.setdefault(record.get("suite", ""), {})[record.get("when", "")] = record
    rows = []
    for suite, of in by_suite.items():
        at_use, after = of.get("at use"), of.get("after step")
        estimate, told = compare(at_use, after)
        shown = words.signed(estimate) if estimate else DASH
        faster = {HOLDS: "at use", MISSED: "after the step"}.get(told, verdict(told))
        faster += how_apart(at_use, after)
        rows.append([suite, _ratios(at_use), _ratios(after), shown, faster])
    text = """Resident blocks have to be written into W. At use is right under every wrapper, and writes in the forward
    and in the backward; after the step writes once."""
    heads = ("suite", "at use: step / floor", "after the step", "difference (95 %)", "which is faster")
    return section("## Writing the blocks: at use or after the step", prose(text), table(heads, rows)) if rows else ""


def _ratios(record: Record | None) -> str:
    if record and record.get("error"):
        return f"no result: {record['error']}"
    return words.with_quartiles(spread(step_ratios(record)))


def kernels_section(results: Record) -> str:
    """Candidates for the block gradient, a row for every shape."""
    cases = {case: rates_of_case(candidates) for case, candidates in kernel_cases(results).items()}
    candidates = list(dict.fromkeys(name for _, rates in cases.values() for name in rates))
    rows = []
    for case, (used, rates) in cases.items():
        if not rates:
            continue
        cells = [words.percent_with_quartiles(spread(rates.get(name, ()))) for name in candidates]
        cells = [f"**{cell}**" if name == used else cell for name, cell in zip(candidates, cells)]
        judged = DASH if used is None else _is_best(used, rates)
        rows.append([*(DASH if value is None else str(value) for value in case), *cells, judged])
    text = """Speed of a block gradient as a share of the dense product's: the time that dYᵀX takes, scaled by the
    share of blocks, over the candidate's; medians, in brackets the middle half. All take turns in another order each
    round, each after a dense product. Bold is what is used here. The fastest is named where the 95 % bootstrap interval
    of the difference tells the two apart, which is not corrected for the number of candidates."""
    heads = ("device", "dtype", "tokens", "features", "l", "blocks", *candidates, "the used is best")
    parts = [table(heads, rows), _failed(results, "kernel", ("candidate", "dtype", "block_size", "blocks"))]
    return section("## Kernel candidates", prose(text), *parts) if any(parts) else ""


def _is_best(used: str, rates: Mapping[str, np.ndarray]) -> str:
    if used not in rates:
        return f"no: {used} has no result"
    best, estimate = best_candidate(used, rates)
    if best == used:
        return "yes"
    if estimate is None or estimate.low <= 0:
        return f"{OPEN} from {best}"
    return f"no: {best}, by {100 * estimate.value:.0f} ({100 * estimate.low:.0f} to {100 * estimate.high:.0f}) points"
