"""The picture of a plan (paper, Figure 4)."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from smtune.maps import layout
from smtune.maps.style import FAINT, GREY, INK, new_figure, save, set_title
from smtune.selection import Plan

# Starts at a tint that is clearly not white: white is a frozen matrix.
SHADES = LinearSegmentedColormap.from_list("trained", ["#CBE8DC", "#4FB393", "#00734F", "#00382A"]).with_extremes(
    under="white", bad=FAINT
)

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

    figure = new_figure(max(6.5, 1.8 + 0.27 * width), 1.3 + n_bands * (0.3 + 0.3 * len(lanes)))
    rows = figure.subplots(n_bands, 1, squeeze=False)[:, 0]
    for k, axes in enumerate(rows):
        _draw_cells(axes, cells, lanes, layers[k * width : (k + 1) * width], norm)
        axes.set_xlim(0, max(width, 1))  # the last band may be shorter; its cells keep their width
    n_trained = sum(bool(module.rows) for module in plan.modules.values())
    set_title(
        rows[0],
        f"Trained blocks of {plan.model_name or 'the model'}",
        f"{n_trained} of {len(plan.modules)} matrices · {totals(plan)}",
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
    return save(figure, path)


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


def totals(plan: Plan) -> str:
    size = plan.block_size
    return (
        f"{plan.n_blocks:,} blocks of {size}×{size} · {layout.in_short(plan.n_params)} parameters · "
        f"{plan.fraction:.2%} of the model"
    )
