"""Values and differences with their intervals, one below the other; and one value against another with both."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smtune.evaluation.statistics import TIE, Estimate, Verdict
from smtune.maps.style import COLOURS, FAINT, GREY, INK, clean, new_figure, save, set_title

OF_VERDICT = {"better": COLOURS[2], "worse": COLOURS[1], "tie": COLOURS[0], "undecided": GREY}


def forest(
    differences: Mapping[str, tuple[Estimate, Verdict]],
    path: str | os.PathLike,
    *,
    x: str,
    title: str,
    subtitle: str = "",
) -> Figure:
    """A forest plot: a dot with its 95 % interval for each difference, over the band of a tie.

    Args:
        differences: by label, from the top; differences of accuracies, as fractions, with what may be said of them.
        path: of the file to write.
        x: what they are.
        title, subtitle: above the figure.
    """
    figure = new_figure(8.0, 1.4 + 0.27 * max(1, len(differences)))
    axes = figure.subplots()
    axes.axvspan(-100 * TIE, 100 * TIE, color=FAINT, alpha=0.6, linewidth=0)
    axes.axvline(0, color=INK, linewidth=0.8)
    for place, (estimate, word) in enumerate(differences.values()):
        value = 100 * estimate.value
        reach = [[value - 100 * estimate.low], [100 * estimate.high - value]]
        colour = OF_VERDICT[word]
        axes.errorbar([value], [place], xerr=reach, fmt="o", color=colour, markersize=5, elinewidth=1.4, capsize=2.5)
    axes.set_xlabel(x)
    for word, colour in OF_VERDICT.items():
        axes.plot([], [], "o", color=colour, markersize=5, label=word)
    figure.legend(loc="outside lower center", ncols=len(OF_VERDICT), frameon=False, fontsize=8)
    _label_rows(axes, list(differences))
    set_title(axes, title, subtitle)
    return save(figure, Path(path))


def dots(panels: Mapping[str, Mapping[str, Estimate]], path: str | os.PathLike, *, x: str, title: str) -> Figure:
    """A dot with its 95 % interval for each value, in panels above one another that share their axis.

    Args:
        panels: values by label, from the top, as fractions; by the panel's title, which may be "".
        path: of the file to write.
        x: what they are.
        title: above the figure.
    """
    n_rows = [max(1, len(values)) for values in panels.values()]
    figure = new_figure(8.0, 1.1 + 0.27 * sum(n_rows) + 0.35 * len(panels))
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=n_rows)[:, 0]
    for axes, (heading, values) in zip(all_axes, panels.items()):
        for place, estimate in enumerate(values.values()):
            value = 100 * estimate.value
            reach = [[value - 100 * estimate.low], [100 * estimate.high - value]]
            axes.errorbar([value], [place], xerr=reach, fmt="o", color=COLOURS[0], markersize=5, capsize=2.5)
            axes.annotate(f"{value:.1f}", (value, place), (0, 5), textcoords="offset points", ha="center", fontsize=7)
        _label_rows(axes, list(values), room=0.7)  # for the number above the first dot
        axes.set_title(heading, loc="left", fontsize=9, color=GREY)
    all_axes[-1].set_xlabel(x)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return save(figure, Path(path))


def _label_rows(axes: Axes, labels: Sequence[str], room: float = 0.6) -> None:
    """Rows at 0, 1, … from the top, with as much room above the first."""
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_ylim(len(labels) - 0.4, -room)
    axes.tick_params(axis="y", length=0)
    clean(axes)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=FAINT, linewidth=0.6)


def scatter(
    points: Mapping[str, tuple[Estimate, Estimate]],
    path: str | os.PathLike,
    *,
    x: str,
    y: str,
    title: str,
    subtitle: str = "",
) -> Figure:
    """A dot with both intervals for each label, which stands in the legend; endless intervals are left out.

    Args:
        points: by label, what is on the x and what on the y axis.
        path: of the file to write.
        x, y: what stands at the axes.
        title, subtitle: above the figure.
    """
    figure = new_figure(8.5, 5.0)
    axes = figure.subplots()
    marks = "osD^v"
    for k, (label, (across, up)) in enumerate(points.items()):
        axes.errorbar(
            [across.value],
            [up.value],
            xerr=_reach(across),
            yerr=_reach(up),
            fmt=marks[k // len(COLOURS) % len(marks)],
            color=COLOURS[k % len(COLOURS)],
            label=label,
            markersize=6,
            elinewidth=0.8,
            capsize=2,
        )
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    clean(axes)
    set_title(axes, title, subtitle)
    return save(figure, Path(path))


def _reach(estimate: Estimate) -> list[list[float]] | None:
    if not math.isfinite(estimate.low):
        return None
    return [[estimate.value - estimate.low], [estimate.high - estimate.value]]
