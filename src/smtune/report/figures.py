"""Figures of a plan (paper, Figures 4 and 5), of training runs and of accuracies.

Every function writes one file, its format by the suffix of `path`, and returns the matplotlib figure for more. The
block map comes from `smtune.maps.picture`, the style from `smtune.maps.style`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from smtune.evaluation.statistics import Estimate
from smtune.maps import layout
from smtune.maps.picture import block_map, totals
from smtune.maps.style import COLOURS, GREY, INK, clean, new_figure, save, series_style, set_title
from smtune.selection import Plan

__all__ = ["accuracy_bars", "block_map", "loss_curve", "projection_shares"]

HELD_OUT: dict[str, Any] = {"markersize": 5, "markerfacecolor": "white", "zorder": 3}


def projection_shares(plan: Plan, path: str | os.PathLike) -> Figure:
    """How the trained parameters are spread over the projections (the paper's Figure 5)."""
    rows = layout.projections(plan)
    figure = new_figure(6.5, 0.8 + 0.36 * max(1, len(rows)))
    axes = figure.subplots()
    bars = axes.barh([row.name for row in rows], [row.share for row in rows], color=COLOURS[2], height=0.65)
    texts = [
        f"{row.share:.2%} · {row.blocks:,} blocks · {row.trained} of {row.trained + row.frozen} matrices"
        for row in rows
    ]
    axes.bar_label(bars, texts, padding=4, fontsize=8.5)
    axes.invert_yaxis()
    # The longest bar leaves room for its label.
    axes.set_xlim(0, 1.75 * max((row.share for row in rows), default=0) or 1)
    axes.xaxis.set_visible(False)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    set_title(axes, f"Trained parameters of {plan.model_name or 'the model'} by projection", totals(plan))
    return save(figure, path)


def loss_curve(
    metrics: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike
) -> Figure:
    """Loss against step.

    Args:
        metrics: of one run, or of several by label: rows as Trainer logs them. Rows with "step" and "loss" give the
            dots, with a centred mean over a fifteenth of them as the line; rows with "eval_loss" give diamonds.
            Other rows are passed over. Of rows of the same step, as a resumed run has, the last counts.
        path: of the file to write.
    """
    runs = metrics if isinstance(metrics, Mapping) else {"": metrics}
    figure = new_figure(7.0, 4.2)
    axes = figure.subplots()
    held_out = False
    for k, (label, rows) in enumerate(runs.items()):
        colour, line = series_style(k)
        steps, losses = _series(rows, "loss")
        axes.plot(steps, losses, ".", color=colour, alpha=0.25, markersize=4, markeredgewidth=0)
        axes.plot(steps, _smooth(losses), line, color=colour, linewidth=1.6, label=label or "training, smoothed")
        steps, losses = _series(rows, "eval_loss")
        if len(steps):
            held_out = True
            axes.plot(steps, losses, "D", color=colour, **HELD_OUT)
    if held_out:
        axes.plot([], [], "D", color=GREY, **HELD_OUT, label="held out")
    if held_out or len(runs) > 1:
        axes.legend(frameon=False, fontsize=9)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    clean(axes)
    return save(figure, path)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    values = {row["step"]: row[key] for row in rows if "step" in row and key in row}
    steps = sorted(step for step, value in values.items() if math.isfinite(value))
    return np.array(steps, dtype=int), np.array([values[step] for step in steps], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a fifteenth of the values; the window narrows at the ends, so nothing lags."""
    half = len(values) // 30
    return np.array([values[max(0, k - half) : k + half + 1].mean() for k in range(len(values))])


def accuracy_bars(
    arms: Mapping[str, Mapping[str, Estimate]], path: str | os.PathLike, *, title: str = "Accuracy"
) -> Figure:
    """Accuracies side by side, with their 95 % intervals.

    Args:
        arms: by label, such as {"before": …, "after": …}, the accuracy of each task, a fraction. An arm may lack a
            task; its place stays empty.
        path: of the file to write.
        title: above the figure.
    """
    tasks = list(dict.fromkeys(task for of_arm in arms.values() for task in of_arm))
    figure = new_figure(min(14.0, max(6.5, 1.0 + len(tasks) * max(0.9, 0.34 * len(arms)))), 4.2)
    axes = figure.subplots()
    bar = 0.8 / max(1, len(arms))
    narrow = (figure.get_figwidth() - 1) * bar < 0.3 * len(tasks)
    highest = 0.0
    for k, (label, of_arm) in enumerate(arms.items()):
        places = [place for place, task in enumerate(tasks) if task in of_arm]
        estimates = [of_arm[tasks[place]] for place in places]
        x = np.array(places) + (k - (len(arms) - 1) / 2) * bar
        values = np.array([estimate.value for estimate in estimates])
        reach = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
        axes.bar(x, values, bar * 0.92, color=COLOURS[k % len(COLOURS)], label=label)
        axes.errorbar(x, values, reach, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
        for at, estimate in zip(x, estimates):
            axes.annotate(
                f"{100 * estimate.value:.1f}",
                (at, estimate.high),
                xytext=(0, 3),
                textcoords="offset points",
                rotation=90 if narrow else 0,
                fontsize=8,
                ha="center",
                va="bottom",
            )
            highest = max(highest, estimate.high)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylim(0, max(0.1, 1.12 * highest))
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 1])
    axes.set_ylabel("accuracy, with 95% interval")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(axis="x", length=0)
    if len(arms) > 1:
        figure.legend(loc="outside lower center", ncols=min(4, len(arms)), frameon=False, fontsize=9)
    clean(axes)
    set_title(axes, title)
    return save(figure, path)
