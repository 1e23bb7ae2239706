"""How time grows: series of the "sweep" records, and the power laws that weighted least squares fits to them.

An exponent of 1 is linear growth, of 0 none. Its interval comes from drawing the pairs of every point again. A fit on
logarithms would have no place for a small difference of two noisy times, which may be below zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smtune.report.benchmarks.records import (
    FLOOR,
    MIN_PAIRS,
    Record,
    all_flops,
    floor_flops,
    minus,
    of_kind,
    pairs,
    ran,
    resampled_medians,
    step,
    timed_together,
)

MIN_POINTS = 3
"""Fewer points fit no exponent."""
EXPONENTS = np.arange(-150, 151) / 50
"""Those that are tried. An interval that reaches an end of them has no bound there."""
SURE = 0.01
"""No median counts as better known than to this share of it, or one point would decide alone."""
TOLERANCE = 0.15
"""An exponent within this of its target counts as it."""


@dataclass(frozen=True)
class Axis:
    """What a sweep varies.

    Attributes:
        name: of the axis, with its unit.
        x: its value, from a record.
        measures: what is fitted; of `MEASURES`.
        targets: exponent by measure, where one is asked for.
    """

    name: str
    x: Callable[[Record], float | None]
    measures: tuple[str, ...]
    targets: dict[str, float]


ALL = ("step", "extra", "blocks")
AXES = {
    "tokens": Axis("tokens of a step", lambda r: r.get("tokens"), ALL, {"step": 1, "extra": 1, "blocks": 1}),
    "budget": Axis("trained parameters", lambda r: r.get("trained_params"), ALL, {"extra": 1, "blocks": 1}),
    "block_size": Axis("block size (rows)", lambda r: r.get("value"), ALL, {}),
    "depth": Axis(
        "layers the backward goes through",
        lambda r: r["layers"] - r["value"] if {"layers", "value"} <= r.keys() else None,
        ("backward", "step"),
        {},
    ),
    "layers": Axis("layers of the model", lambda r: r.get("layers"), ALL, {"extra": 0, "blocks": 0}),
}
"""The axes by the record's "sweep". That of depth counts layers from the lowest with blocks to the top."""

MEASURES = {
    "step": "step",
    "extra": "step above the floor",
    "blocks": "block operators",
    "backward": "backward",
    "floor": "floor's step",
}
"""What is timed: `blocks` by torch's profiler, within a step; the others by the clock, in pairs."""


@dataclass(frozen=True)
class Point:
    """One record of a sweep: where it stands, and seconds by measure, one for each pair."""

    x: float
    seconds: dict[str, np.ndarray]
    extra_flops: float | None

    def median(self, measure: str) -> float:
        """Seconds; not a number where this was not measured."""
        return float(np.median(self.seconds[measure])) if self.seconds[measure].size else math.nan


@dataclass(frozen=True)
class Series:
    """The points of one sweep of one arm in one dtype, by ascending x; whether all were timed with their floor."""

    sweep: str
    dtype: str
    arm: str
    points: list[Point]
    together: bool = True

    @property
    def axis(self) -> Axis:
        return AXES[self.sweep]

    @property
    def measures(self) -> list[str]:
        """Those of the axis that some point has."""
        return [name for name in self.axis.measures if any(point.seconds[name].size for point in self.points)]


@dataclass(frozen=True)
class Fit:
    """y = scale · x^exponent, with the exponent's 95 % interval.

    Attributes:
        low, high: infinite where the data do not bound it, or some point has fewer than `MIN_PAIRS` values.
    """

    exponent: float
    low: float
    high: float
    scale: float


def series(results: Record) -> list[Series]:
    """All series that have a point, in the order of the axes; arms with errors have none."""
    found: dict[tuple[str, str, str], list[Record]] = {}
    for record in of_kind(results, "sweep"):
        if record.get("sweep") in AXES and record.get("arm") != FLOOR and ran(record) and pairs(record):
            found.setdefault((record["sweep"], record.get("dtype", ""), record.get("arm", "")), []).append(record)
    ordered = sorted(found.items(), key=lambda item: list(AXES).index(item[0][0]))
    return [
        Series(sweep, dtype, arm, _points(sweep, group), all(map(timed_together, group)))
        for (sweep, dtype, arm), group in ordered
    ]


def _points(sweep: str, group: list[Record]) -> list[Point]:
    points: dict[float, Point] = {}
    for record in group:
        x = AXES[sweep].x(record)
        if x and x > 0:
            points[x] = Point(x, _seconds(record), minus(all_flops(record), floor_flops(record)))
    return [points[x] for x in sorted(points)]


def _seconds(record: Record) -> dict[str, np.ndarray]:
    found = pairs(record)
    arm, floor = (np.array([step(pair[of]) for pair in found]) for of in ("arm", "floor"))
    return {
        "step": arm,
        "floor": floor,
        "extra": arm - floor,
        "blocks": np.array(record.get("block_ops_s") or ()),
        "backward": np.array([pair["arm"].get("backward") or 0.0 for pair in found]),
    }


def fit(series: Series, measure: str) -> Fit | None:
    """The power law nearest to a measure's medians; None of fewer than `MIN_POINTS`, or if no positive one is near.

    Least squares in seconds, every point weighted by the inverse variance of its median, as the bootstrap has it.
    """
    seconds = [point.seconds[measure] for point in series.points]
    if len(seconds) < MIN_POINTS or not all(values.size for values in seconds):
        return None
    x = np.array([point.x for point in series.points])
    medians = np.array([np.median(values) for values in seconds])
    draws = np.array([resampled_medians(values, seed) for seed, values in enumerate(seconds)]).T
    deviations = np.maximum(draws.std(axis=0), SURE * np.maximum(np.abs(medians), 1e-9))
    (exponent,), (scale,) = _power_laws(x, medians[None], deviations)
    if math.isnan(exponent):
        return None
    exponents, _ = _power_laws(x, draws, deviations)
    low, high = _bounds(exponents) if min(map(len, seconds)) >= MIN_PAIRS else (-math.inf, math.inf)
    return Fit(float(exponent), low, high, float(scale))


def _power_laws(x: np.ndarray, seconds: np.ndarray, deviations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(exponents, scales) by row of `seconds`, (rows, points); not a number where no positive scale fits.

    The best scale of every exponent is known in closed form, so only exponents are tried: those of `EXPONENTS`, and
    the top of the parabola through the best and its neighbours.
    """
    unit = np.exp(np.log(x).mean())
    powers = (x / unit)[:, None] ** EXPONENTS / deviations[:, None]
    norms = (powers**2).sum(axis=0)
    along = np.maximum(seconds / deviations @ powers, 0)  # the best scales, times the norms
    gains = along**2 / norms  # by how much the sum of squares falls
    rows, best = np.arange(len(seconds)), gains.argmax(axis=1)
    inner = best.clip(1, len(EXPONENTS) - 2)
    before, at, after = (gains[rows, inner + step] for step in (-1, 0, 1))
    curvature = before - 2 * at + after
    is_top = (inner == best) & (curvature < 0)
    shift = np.where(is_top, (before - after) / np.where(is_top, 2 * curvature, 1), 0)
    exponents = np.where(along[rows, best] > 0, EXPONENTS[best] + shift * (EXPONENTS[1] - EXPONENTS[0]), math.nan)
    return exponents, along[rows, best] / norms[best] / unit**exponents


def _bounds(exponents: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the draws; infinite where that reaches an end of those tried, or draws fit no exponent."""
    if np.isnan(exponents).mean() > 0.025:
        return -math.inf, math.inf
    low, high = np.nanquantile(exponents, (0.025, 0.975))
    return float(low) if low > EXPONENTS[0] else -math.inf, float(high) if high < EXPONENTS[-1] else math.inf


def flops_exponent(series: Series) -> float | None:
    """The exponent of the counted FLOPs above the floor, where every point has them."""
    points = [point for point in series.points if point.extra_flops and point.extra_flops > 0]
    if len(points) < max(MIN_POINTS, len(series.points)):
        return None
    logs = np.log([[point.x, point.extra_flops or 0.0] for point in points])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
