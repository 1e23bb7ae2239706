"""Numbers in words: one way to write a ratio, a size, an interval. What is missing is a dash."""

from __future__ import annotations

import math
from collections.abc import Mapping

from smtune.evaluation.statistics import Estimate
from smtune.report.benchmarks.records import Spread
from smtune.report.benchmarks.sweeps import Fit
from smtune.report.markdown import DASH, minus

UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def arm(name: str) -> str:
    """ "SMT 0.84 %" for "smt-0.84"; the share is that of LLaMA-7B."""
    method, _, share = name.partition("-")
    return f"{method.upper()} {share} %"


def ratio(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def interval(estimate: Estimate) -> str:
    return f"{estimate.low:.3f} to {estimate.high:.3f}"


def with_quartiles(spread: Spread | None) -> str:
    """Median, and the middle half in brackets."""
    return DASH if spread is None else f"{spread.median:.3f} ({spread.low:.3f}–{spread.high:.3f})"


def signed(estimate: Estimate) -> str:
    """A difference with its interval."""
    return minus(f"{estimate.value:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})")


def percent(value: float | None, decimals: int | None = None) -> str:
    """A share; without `decimals` about three digits."""
    if value is None:
        return DASH
    if decimals is None:
        decimals = 1 if abs(value) >= 0.1 else 2
    return minus(f"{100 * value:.{decimals}f} %")


def percent_with_quartiles(spread: Spread | None) -> str:
    """A median share, and the middle half in brackets, in whole percent."""
    if spread is None:
        return DASH
    return f"{100 * spread.median:.0f} % ({100 * spread.low:.0f}–{100 * spread.high:.0f})"


def size(n_bytes: float | None) -> str:
    """Bytes in the largest binary unit that gives a number of 1 or more."""
    if n_bytes is None:
        return DASH
    for unit, name in UNITS:
        if abs(n_bytes) >= unit:
            return f"{n_bytes / unit:,.{2 if abs(n_bytes) < 10 * unit else 1}f} {name}"
    return f"{n_bytes:,.0f} B"


def signed_size(n_bytes: float | None) -> str:
    return DASH if n_bytes is None else minus(f"{'+' if n_bytes > 0 else ''}{size(n_bytes)}")


def milliseconds(seconds: float | None) -> str:
    return DASH if seconds is None else f"{1000 * seconds:,.{1 if seconds < 0.1 else 0}f} ms"


def count(number: float | None) -> str:
    return DASH if number is None else minus(f"{number:,.0f}")


def exponent(fit: Fit | None) -> str:
    """An exponent with its interval."""
    if fit is None:
        return "no fit"
    has_low, has_high = math.isfinite(fit.low), math.isfinite(fit.high)
    if has_low and has_high:
        bounds = f"{hundredths(fit.low)} to {hundredths(fit.high)}"
    elif has_low or has_high:
        bounds = f"at least {hundredths(fit.low)}" if has_low else f"at most {hundredths(fit.high)}"
    else:
        bounds = "no bounds"
    return f"{hundredths(fit.exponent)} ({bounds})"


def run(of: Mapping[str, str | None] | None) -> str:
    """Day and commit, "2026-11-30, 6e19255"."""
    commit = (of or {}).get("commit") or ""
    short = commit[:7] + commit[40:]  # with "+changes"
    return ", ".join(filter(None, ((of or {}).get("date"), short))) or DASH


def hundredths(value: float) -> str:
    """Two decimals, and no minus before a zero."""
    return minus(f"{round(value, 2) + 0.0:.2f}")
