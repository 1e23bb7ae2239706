"""Values with intervals against a number: learning rates, budgets; or bars where there is no axis to speak of."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from smtune.evaluation.statistics import Estimate
from smtune.maps.style import COLOURS, INK, clean, new_figure, save, series_style, set_title

Points = Sequence[tuple[float, Estimate]]


def curves(
    series: Mapping[str, Points], path: str | os.PathLike, *, x: str, y: str, title: str, log: bool = False
) -> Figure:
    """A line with error bars for each series.

    Args:
        series: (x, value with its 95 % interval) by label; points need not be in order.
        path: of the file to write.
        x, y: what stands at the axes.
        log: a logarithmic x axis, with a tick at each x.
    """
    figure = new_figure(8.0, 4.8)
    axes = figure.subplots()
    for k, (label, points) in enumerate(series.items()):
        points = sorted(points, key=lambda point: point[0])
        values = [estimate.value for _, estimate in points]
        reach = [[e.value - e.low for _, e in points], [e.high - e.value for _, e in points]]
        colour, line = series_style(k)
        places = [place for place, _ in points]
        axes.errorbar(
            places, values, reach, fmt=f"o{line}", color=colour, label=label, markersize=4, elinewidth=0.8, capsize=2
        )
    if log:
        places = sorted({place for points in series.values() for place, _ in points})
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    clean(axes)
    set_title(axes, title)
    return save(figure, Path(path))


def bars(values: Mapping[str, float], path: str | os.PathLike, *, x: str, title: str) -> Figure:
    """A horizontal bar for each value, with the number beside it.

    Args:
        values: by label, from the top.
        path: of the file to write.
        x: what they are.
        title: above the figure.
    """
    figure = new_figure(7.5, 1.0 + 0.32 * max(1, len(values)))
    axes = figure.subplots()
    drawn = axes.barh(list(values), list(values.values()), color=COLOURS[2], height=0.65)
    axes.bar_label(drawn, [f"{value:.3g}" for value in values.values()], padding=4, fontsize=8, color=INK)
    axes.invert_yaxis()
    axes.set_xlabel(x)
    clean(axes)
    set_title(axes, title)
    return save(figure, Path(path))
