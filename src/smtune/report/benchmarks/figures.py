"""Figures of a benchmark: step times, memory, growth, and what cost-aware selection trades.

Each writes one PNG and returns the matplotlib figure; the style is that of `smtune.maps.style`. Times are
multiples of the floor's step but in the sweeps, which need seconds for their exponents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from smtune.evaluation.statistics import Estimate, accuracy
from smtune.maps.style import COLOURS, FAINT, GREY, INK, clean, new_figure, save, series_style, set_title
from smtune.report.benchmarks import sweeps, words
from smtune.report.benchmarks.records import (
    PARTS,
    Quality,
    Record,
    Suite,
    beyond_floor,
    get,
    label,
    part_ratios,
    ran,
    spread,
    step_ratios,
)
from smtune.report.benchmarks.targets import STEP_TARGETS, STEP_TOKENS

CLOSE = 1.16
"""Up to here the right-hand panel of the step times reaches, where the arms close to the floor are told apart."""
STATE = {
    "base": ("base weights", FAINT),
    "trained": ("trained", COLOURS[0]),
    "originals": ("originals or index", COLOURS[5]),
    "gradients": ("gradients", COLOURS[1]),
    "optimizer": ("optimizer", COLOURS[4]),
}
REST = ("activations, temporaries", COLOURS[2])
"""Saved columns stand for these in the panel above the floor."""


def step_times(suite: Suite, path: Path) -> Figure | None:
    """Every arm's step: its parts on the left, and the range close to the floor on the right. None without pairs."""
    arms = {name: arm for name, arm in suite.others.items() if step_ratios(arm).size}
    if not arms:
        return None
    figure = new_figure(10.5, 1.3 + 0.33 * len(arms))
    parts_axes, close_axes = figure.subplots(1, 2, width_ratios=(1, 1.15), sharey=True)
    _draw_parts(parts_axes, arms)
    _draw_close(close_axes, arms, suite.is_7b(STEP_TOKENS))
    set_title(parts_axes, "Time of a step over the floor's", suite.setting())
    set_title(close_axes, "Close to the floor", "median and middle half of the pairs")
    return save(figure, path)


def _draw_parts(axes: Axes, arms: Mapping[str, Record]) -> None:
    start = np.zeros(len(arms))
    for part, colour in zip(PARTS, (COLOURS[5], COLOURS[0], COLOURS[4])):
        widths = np.array(
            [np.median(ratios) if (ratios := part_ratios(arm, part)).size else 0 for arm in arms.values()]
        )
        axes.barh(range(len(arms)), widths, left=start, height=0.7, color=colour, label=part)
        start += widths
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(range(len(arms)), [label(arm) for arm in arms.values()], fontsize=8.5)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.02 * max(1.0, start.max()))
    axes.set_xlabel("time / floor's step")
    clean(axes)
    _grid_along_x(axes)
    axes.figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False, fontsize=8.5
    )


def _draw_close(axes: Axes, arms: Mapping[str, Record], has_targets: bool) -> None:
    lowest = 0.98
    for y, (name, arm) in enumerate(arms.items()):
        found = spread(step_ratios(arm))
        assert found is not None
        colour = COLOURS[0] if name.startswith("smt") else COLOURS[1]
        lowest = min(lowest, found.low)
        if found.median > CLOSE:
            axes.annotate(
                f"{found.median:.2f}",
                (1, y),
                xycoords=("axes fraction", "data"),
                fontsize=8,
                color=GREY,
                ha="right",
                va="center",
            )
            continue
        axes.plot([found.low, min(found.high, CLOSE)], [y, y], color=colour, linewidth=2.2, alpha=0.6)
        axes.plot(found.median, y, "o", color=colour, markersize=5)
        if has_targets and name in STEP_TARGETS:
            axes.plot(STEP_TARGETS[name], y, "|", color=COLOURS[2], markersize=15, markeredgewidth=2.2)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xlim(lowest - 0.005, CLOSE)
    axes.set_xlabel("step / floor's step")
    axes.tick_params(axis="y", length=0)
    clean(axes)
    _grid_along_x(axes)
    keys = [
        axes.plot([], [], "o-", color=COLOURS[0], markersize=5, label="SMT")[0],
        axes.plot([], [], "o-", color=COLOURS[1], markersize=5, label="others; beyond the panel as a number")[0],
    ]
    if has_targets:
        keys += axes.plot([], [], "|", color=COLOURS[2], markersize=12, markeredgewidth=2.2, label="at most (target)")
    axes.figure.legend(handles=keys, loc="outside lower right", ncols=3, frameon=False, fontsize=8.5)


def memory(suite: Suite, path: Path) -> Figure | None:
    """Counted peak of every arm by what it is made of; on the right, what SMT and LoRA have above the floor.

    None where nothing was counted.
    """
    arms = {name: arm for name, arm in suite.arms.items() if ran(arm) and arm.get("peak_tensor_bytes")}
    if not arms:
        return None
    figure = new_figure(10.5, 1.6 + 0.33 * len(arms))
    whole_axes, above_axes = figure.subplots(1, 2, width_ratios=(1, 1), sharey=True)
    _draw_whole(whole_axes, list(arms.values()))
    _draw_above(above_axes, suite, arms)
    whole_axes.set_yticks(range(len(arms)), [label(arm) for arm in arms.values()], fontsize=8.5)
    whole_axes.invert_yaxis()
    for axes in (whole_axes, above_axes):
        axes.tick_params(axis="y", length=0)
        axes.margins(y=0.02)
        clean(axes)
        _grid_along_x(axes)
    set_title(whole_axes, "Memory at the peak of a step", suite.setting())
    set_title(above_axes, "Above the floor", "bars: what the parts add up to; they are not all alive at once")
    figure.legend(
        *whole_axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8.5
    )
    return save(figure, path)


def _draw_whole(axes: Axes, arms: Sequence[Record]) -> None:
    y = range(len(arms))
    start = np.zeros(len(arms))
    for key, (name, colour) in STATE.items():
        start += _bars(axes, start, [_state(arm, key) for arm in arms], colour, name, 2**30)
    peaks = np.array([arm["peak_tensor_bytes"] for arm in arms]) / 2**30
    _bars(axes, start, np.maximum(peaks - start, 0) * 2**30, REST[1], REST[0], 2**30)
    process = [(arm["peak_rss_bytes"] / 2**30, place) for place, arm in zip(y, arms) if arm.get("peak_rss_bytes")]
    if process:
        axes.plot(*zip(*process), "D", color=INK, markersize=4, markerfacecolor="white", label="peak of the process")
    axes.plot([], [], "|", color=INK, markersize=12, markeredgewidth=1.8, label="counted peak less the floor's")
    axes.set_xlabel("memory (GiB)")


def _draw_above(axes: Axes, suite: Suite, arms: Mapping[str, Record]) -> None:
    """Only SMT and LoRA: the others' bars would make these too short to read."""
    close = {name: y for y, name in enumerate(arms) if name.startswith(("smt", "lora"))}
    places = list(close.values())
    start = np.zeros(len(close))
    for key, (_, colour) in STATE.items():
        if key != "base":
            start += _bars(axes, start, [_state(arms[name], key) for name in close], colour, "", 2**20, places)
    saved = [max(0, beyond_floor(suite, name, "saved_bytes") or 0) for name in close]
    _bars(axes, start, saved, REST[1], "", 2**20, places)
    for name, y in close.items():
        gap = beyond_floor(suite, name, "peak_tensor_bytes")
        if gap is not None:
            axes.plot(gap / 2**20, y, "|", color=INK, markersize=15, markeredgewidth=1.8)
    axes.set_xlim(left=0)
    axes.set_xlabel("memory (MiB), SMT and LoRA only")


def _state(arm: Record, key: str) -> float:
    """Bytes of one kind of state; an index is drawn with the originals."""
    return (get(arm, "state_bytes", key) or 0) + ((get(arm, "state_bytes", "index") or 0) if key == "originals" else 0)


def _bars(
    axes: Axes,
    start: np.ndarray,
    n_bytes: Sequence[float] | np.ndarray,
    colour: str,
    name: str,
    unit: int,
    places: Sequence[int] | None = None,
) -> np.ndarray:
    """One more part of stacked bars; returns its widths."""
    widths = np.array(n_bytes, dtype=float) / unit
    axes.barh(places or range(len(widths)), widths, left=start, height=0.7, color=colour, label=name)
    return widths


def sweep(found: Sequence[sweeps.Series], path: Path) -> Figure | None:
    """All series of one sweep, a panel for each measure, log-log with the fitted lines. None without series."""
    measures = [name for name in found[0].axis.measures if any(name in s.measures for s in found)] if found else []
    if not measures:
        return None
    figure = new_figure(0.8 + 3.6 * len(measures), 3.5 + 0.2 * len(found))
    ticks = sorted({point.x for series in found for point in series.points})
    for axes, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for k, series in enumerate(found):
            _draw_series(axes, series, measure, *series_style(k))
        axes.set_xticks(ticks)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelsize=8)
        _plain_seconds(axes)
        axes.set_xlabel(found[0].axis.name)
        axes.set_ylabel(f"{sweeps.MEASURES[measure]} (s)")
        clean(axes)
        axes.grid(axis="y", which="both", color=FAINT, linewidth=0.6)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8, borderaxespad=0.2)
    return save(figure, path)


def _plain_seconds(axes: Axes) -> None:
    """At 1, 2 and 5 of every decade a number without powers, and room for a factor of four at least."""
    low, high = axes.get_ylim()
    if high < 4 * low:
        middle = (low * high) ** 0.5
        axes.set_ylim(middle / 2, middle * 2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.10f}".rstrip("0").rstrip(".")))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="y", labelsize=8)


def _draw_series(axes: Axes, series: sweeps.Series, measure: str, colour: str, line: str) -> None:
    points = [point for point in series.points if point.median(measure) > 0]
    fitted = sweeps.fit(series, measure)
    name = f"{series.dtype}: exponent {words.hundredths(fitted.exponent)}" if fitted else f"{series.dtype}: no fit"
    x = np.array([point.x for point in points])
    low, middle, high = (
        np.array([np.quantile(point.seconds[measure], q) for point in points]) for q in (0.25, 0.5, 0.75)
    )
    # A quartile at or below zero has no place on a logarithmic axis: the bar then ends close above it.
    reach = (middle - np.maximum(low, middle / 100), high - middle)
    axes.errorbar(x, middle, reach, fmt="o", color=colour, markersize=4.5, capsize=2, linewidth=1, label=name)
    if fitted:
        ends = np.array([x.min(), x.max()])
        axes.plot(ends, fitted.scale * ends**fitted.exponent, line, color=colour, linewidth=1.2)


def cost_aware(found: Sequence[Record], measured: Mapping[float, Quality], path: Path) -> Figure | None:
    """Score kept against time of a step; with quality, accuracy and held-out loss beside it. None without records."""
    points = [r for r in found if ran(r) and step_ratios(r).size and r.get("score_kept") is not None]
    if not points:
        return None
    quality = {r["max_backward_cost"]: measured.get(r["max_backward_cost"]) for r in points}
    panels: list[tuple[str, Callable[[Record], float | Estimate | None], bool]] = [
        ("score kept", lambda record: record["score_kept"], True),
        ("accuracy, with 95 % interval", lambda record: _accuracy(quality[record["max_backward_cost"]]), True),
        (
            "held-out loss (nats per token)",
            lambda record: getattr(quality[record["max_backward_cost"]], "held_out_loss", None),
            False,
        ),
    ]
    panels = [panel for panel in panels if any(panel[1](record) is not None for record in points)]
    suites = dict.fromkeys(record.get("suite", "") for record in points)
    colours = {suite: COLOURS[k % len(COLOURS)] for k, suite in enumerate(suites)}
    figure = new_figure(1 + 4.0 * len(panels), 3.9)
    for axes, (name, value, is_share) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for record in points:
            _draw_trade(axes, record, value(record), colours[record.get("suite", "")])
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_xlabel("step / floor's step")
        axes.set_ylabel(name)
        axes.margins(0.12, 0.15)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if is_share:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        clean(axes)
    set_title(figure.axes[0], "Cost-aware selection", "numbers: max_backward_cost; line: the floor")
    if len(suites) > 1:
        keys = [figure.axes[0].plot([], [], "o", color=colour, label=suite)[0] for suite, colour in colours.items()]
        figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return save(figure, path)


def _accuracy(quality: Quality | None) -> Estimate | None:
    return accuracy(quality.right, quality.of) if quality is not None and quality.of else None


def _draw_trade(axes: Axes, record: Record, value: float | Estimate | None, colour: str) -> None:
    """A point with its quartiles of time and, where it is an estimate, its interval."""
    time = spread(step_ratios(record))
    if value is None or time is None:
        return
    y = value.value if isinstance(value, Estimate) else value
    axes.plot([time.low, time.high], [y, y], color=colour, linewidth=1.4, alpha=0.6)
    if isinstance(value, Estimate):
        axes.plot([time.median] * 2, [value.low, value.high], color=colour, linewidth=1.4, alpha=0.6)
    axes.plot(time.median, y, "o", color=colour, markersize=5.5)
    text = f"{record['max_backward_cost']:g}"
    axes.annotate(text, (time.median, y), xytext=(5, 5), textcoords="offset points", fontsize=8.5)


def _grid_along_x(axes: Axes) -> None:
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.tick_params(axis="x", labelsize=8.5)


def _short(x: float) -> str:
    """An axis number of at most four characters."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if x >= size:
            size = 1e3 if unit == "k" else size
            return f"{x / size:.{1 if x / size < 10 else 0}f}{unit}"
    return f"{x:g}"
