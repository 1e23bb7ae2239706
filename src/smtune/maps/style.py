"""The style that all figures share.

No pyplot: nothing global is read or set, so it runs without a display and in any thread. Colours are told apart by the
colour-blind: Okabe and Ito's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 150
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, the most legible on white first."""
LINES = ("-", "--", ":", "-.")
INK, GREY, FAINT = "#222222", "#666666", "#DDDDDD"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def series_style(k: int) -> tuple[str, str]:
    """Colour and line of the k-th series: past the last colour they come again with another line."""
    return COLOURS[k % len(COLOURS)], LINES[k // len(COLOURS) % len(LINES)]


def set_title(axes: Axes, title: str, subtitle: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=20 if subtitle else 8)
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(subtitle, (0, 1), xytext=(0, 6), fontsize=9, color=GREY, **place)


def clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def save(figure: Figure, path: str | os.PathLike) -> Figure:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return figure
