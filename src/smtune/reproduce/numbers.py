"""Numbers in words: one way to write each."""

from __future__ import annotations

import math

from smtune.evaluation.statistics import Estimate
from smtune.report.markdown import DASH, minus


def points(estimate: Estimate) -> str:
    """A difference of accuracies with its interval, in points."""
    return _signed(Estimate(*(100 * value for value in (estimate.value, estimate.low, estimate.high))), 1)


def loss(estimate: Estimate | None) -> str:
    """A difference of losses with its interval."""
    return DASH if estimate is None else _signed(estimate, 3)


def _signed(estimate: Estimate, digits: int) -> str:
    value, low, high = (
        f"{round(each, digits) + 0.0:+.{digits}f}" if math.isfinite(each) else ""  # + 0.0: no minus before a zero
        for each in (estimate.value, estimate.low, estimate.high)
    )
    return minus(f"{value} ({low} to {high})" if low else f"{value} (one seed)")


def share(estimate: Estimate) -> str:
    """A share with its interval, in percent."""
    if not math.isfinite(estimate.low):
        return minus(f"{100 * estimate.value:.1f} %")
    return minus(f"{100 * estimate.value:.1f} % ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})")


def percent(value: float, digits: int = 3) -> str:
    return f"{100 * value:.{digits}g} %"


def p_text(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"
