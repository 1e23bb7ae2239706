"""Figures of a plan (paper, Figures 4 and 5), of training runs and of accuracies.

Every function writes one file, its format by the suffix of `path`, and returns the matplotlib figure for more. No
pyplot: nothing global is read or set, so they run without a display and in any thread. Colours are told apart by
the colour-blind: Okabe and Ito's, and shades of one hue. Imports matplotlib, numpy, `smtune.selection` and
`smtune.evaluation.statistics`.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from smtune.evaluation.statistics import Estimate
from smtune.report import layout
from smtune.selection import Plan

DPI = 150
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, the most legible on white first."""
LINES = ("-", "--", ":", "-.")
"""More runs than colours go through the colours again with the next of these."""
INK, GREY, FAINT = "#222222", "#666666", "#DDDDDD"
# Starts at a tint that is clearly not white: white is a frozen matrix.
SHADES = LinearSegmentedColormap.from_list("trained", ["#CBE8DC", "#4FB393", "#00734F", "#00382A"]).with_extremes(
    under="white", bad=FAINT
)

HELD_OUT: dict[str, Any] = {"markersize": 5, "markerfacecolor": "white", "zorder": 3}

LAYERS_PER_BAND = 40
"""More layers than this are drawn in several bands, so that cells keep room for their counts."""


def block_map(plan: Plan, path: str | os.PathLike) -> Figure:
    """Where the trained blocks are: layers × projections (the paper's Figure 4).

    A cell's number is how many blocks of its matrix are trained, its colour their share of the matrix. White is
    frozen, grey was not targeted.
    """
    cells = layout.cells(plan)
    lanes = list(dict.fromkeys(projection for projection, _ in cells))
    layers = layout.layers(cells)
    n_bands = max(1, math.ceil(len(layers) / LAYERS_PER_BAND))
    width = math.ceil(len(layers) / n_bands)
    highest = max((cell.trained / cell.blocks for cell in cells.values()), default=0)
    norm = Normalize(1e-9, highest or 1)

    figure = _figure(max(6.5, 1.8 + 0.27 * width), 1.3 + n_bands * (0.3 + 0.3 * len(lanes)))
    rows = figure.subplots(n_bands, 1, squeeze=False)[:, 0]
    for k, axes in enumerate(rows):
        _draw_cells(axes, cells, lanes, layers[k * width : (k + 1) * width], norm)
        axes.set_xlim(0, max(width, 1))  # the last band may be shorter; its cells keep their width
    n_trained = sum(bool(module.rows) for module in plan.modules.values())
    _title(
        rows[0],
        f"Trained blocks of {plan.model_name or 'the model'}",
        f"{n_trained} of {len(plan.modules)} matrices · {_totals(plan)}",
    )

    bar = figure.colorbar(ScalarMappable(norm, SHADES), ax=list(rows), fraction=0.02, pad=0.01)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if highest > 0.05 else 1))
    bar.ax.tick_params(labelsize=8, length=2)
    bar.set_label("share of the matrix", fontsize=8)
    keys = [Patch(facecolor="white", edgecolor=GREY, label="frozen")]
    if len(cells) < len(lanes) * len(layers):
        keys.append(Patch(facecolor=FAINT, edgecolor=GREY, label="not targeted"))
    rows[-1].set_xlabel("layer", fontsize=9)
    # On the line of the axis label.
    place = {"loc": "upper right", "bbox_to_anchor": (1, 0), "borderaxespad": 1.8}
    rows[-1].legend(handles=keys, ncols=2, frameon=False, fontsize=8, **place)
    return _save(figure, path)


def _draw_cells(
    axes: Axes,
    cells: Mapping[tuple[str, str], layout.Cell],
    lanes: Sequence[str],
    layers: Sequence[str],
    norm: Normalize,
) -> None:
    shares = np.ma.masked_all((len(lanes), len(layers)))
    for (y, lane), (x, layer) in itertools.product(enumerate(lanes), enumerate(layers)):
        cell = cells.get((lane, layer))
        if cell is None:
            continue
        shares[y, x] = share = cell.trained / cell.blocks
        if cell.trained:
            luminance = np.dot(SHADES(norm(share))[:3], (0.299, 0.587, 0.114))
            axes.text(
                x + 0.5,
                y + 0.5,
                str(cell.trained),
                size=7 if cell.trained < 1000 else 5,  # three digits fit at 7 points, five at 5
                color="white" if luminance < 0.5 else INK,
                ha="center",
                va="center",
            )
    if shares.size:
        axes.pcolormesh(shares, norm=norm, cmap=SHADES, edgecolors="#BBBBBB", linewidth=0.4, clip_on=False)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(lanes)) + 0.5, lanes)
    axes.set_xticks(np.arange(len(layers)) + 0.5, layers, fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def projection_shares(plan: Plan, path: str | os.PathLike) -> Figure:
    """How the trained parameters are spread over the projections (the paper's Figure 5)."""
    rows = layout.projections(plan)
    figure = _figure(6.5, 0.8 + 0.36 * max(1, len(rows)))
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
    _title(axes, f"Trained parameters of {plan.model_name or 'the model'} by projection", _totals(plan))
    return _save(figure, path)


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
    figure = _figure(7.0, 4.2)
    axes = figure.subplots()
    held_out = False
    for k, (label, rows) in enumerate(runs.items()):
        colour, line = COLOURS[k % len(COLOURS)], LINES[k // len(COLOURS) % len(LINES)]
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
    _clean(axes)
    return _save(figure, path)


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
    figure = _figure(min(14.0, max(6.5, 1.0 + len(tasks) * max(0.9, 0.34 * len(arms)))), 4.2)
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
    _clean(axes)
    _title(axes, title)
    return _save(figure, path)


# -- what all figures share --------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _title(axes: Axes, title: str, subtitle: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=20 if subtitle else 8)
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(subtitle, (0, 1), xytext=(0, 6), fontsize=9, color=GREY, **place)


def _totals(plan: Plan) -> str:
    size = plan.block_size
    return (
        f"{plan.n_blocks:,} blocks of {size}×{size} · {layout.in_short(plan.n_params)} parameters · "
        f"{plan.fraction:.2%} of the model"
    )


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: str | os.PathLike) -> Figure:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return figure
