"""Numbers about arms: differences, trends over budgets, shares of a gap, and what a design can tell apart.

Differences are those of the pages (`layouts.difference`). What is no difference of two arms has a bootstrap interval:
items are drawn anew, the same for all arms, and seeds anew in each arm, from a fixed seed of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance

import numpy as np
from numpy.typing import NDArray

from smtune.evaluation.statistics import Z_95, Estimate, Verdict, mean_over_seeds, smallest_difference, student, verdict
from smtune.reproduce.cells import Record
from smtune.reproduce.evidence.records import Found
from smtune.reproduce.layouts import compared_tests, difference, right

DRAWS = 2000
SEED = 20240525


@dataclass(frozen=True)
class Contrast:
    """One arm less another.

    Attributes:
        first, second: the arms.
        difference, p_value: of their accuracies, over items and seeds.
        loss: of their losses on held-out training rows, paired by seed; None without a seed in both.
    """

    first: Found
    second: Found
    difference: Estimate
    p_value: float
    loss: Estimate | None

    @property
    def verdict(self) -> Verdict:
        return verdict(self.difference, self.p_value)


def contrast(first: Found, second: Found) -> Contrast | None:
    """First less second; None where one has not been run."""
    if not (first.records and second.records):
        return None
    return Contrast(first, second, *difference(first.records, second.records), paired(first, second, "validation_loss"))


def paired(first: Found, second: Found, name: str) -> Estimate | None:
    """A metric of the first arm less that of the second, paired by seed; None without a seed in both.

    Of a single one the interval is endless.
    """
    ours, theirs = first.values(name), second.values(name)
    both = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return mean_over_seeds(both) if both else None


# Trends and shares ----------------------------------------------------------------------------------------------------


def accuracy(found: Found) -> float:
    """The mean over tests and seeds."""
    return fmean(accuracies_by_seed(found))


def accuracies_by_seed(found: Found) -> list[float]:
    """The mean over tests of each seed."""
    tests = compared_tests(found.records)
    return [fmean(fmean(right(record)[test]) for test in tests) for record in found.records]


def trend(arms: Sequence[Found], x: Sequence[float]) -> Estimate:
    """The slope of the least-squares line of accuracy against x, with its interval."""
    centred = np.asarray(x) - np.mean(x)
    weights = centred / np.square(centred).sum()
    return _interval(weights @ [accuracy(arm) for arm in arms], weights @ _redrawn(arms))


def trends_difference(arms: Sequence[Found], others: Sequence[Found], x: Sequence[float]) -> Estimate:
    """The slope of `arms` less that of `others`, at the same x."""
    centred = np.asarray(x) - np.mean(x)
    weights = np.concatenate([centred, -centred]) / np.square(centred).sum()
    both = [*arms, *others]
    return _interval(weights @ [accuracy(arm) for arm in both], weights @ _redrawn(both))


def share_of_gap(arm: Found, low: Found, high: Found) -> Estimate | None:
    """How much of the way from one arm's accuracy to a higher one's a third has come; None without a gap.

    There is a gap where the whole interval of the difference of the two lies above zero.
    """
    if difference(high.records, low.records)[0].low <= 0:
        return None
    value, bottom, top = (accuracy(each) for each in (arm, low, high))
    values, bottoms, tops = _redrawn([arm, low, high])
    wide = np.where(np.abs(tops - bottoms) < 1e-12, np.nan, tops - bottoms)
    return _interval((value - bottom) / (top - bottom), (values - bottoms) / wide)


def _redrawn(arms: Sequence[Found]) -> NDArray[np.float64]:
    """Accuracies, (arms, draws), of items and seeds drawn anew with replacement.

    The deviations of k drawn seeds from their mean are widened by √(k/(k−1)), since k of k vary less than k new ones,
    and from the normal quantile to Student's of all arms' degrees of freedom together.
    """
    draw = np.random.default_rng(SEED)
    runs = [[right(record) for record in arm.records] for arm in arms]
    tests = compared_tests(*[arm.records for arm in arms])
    by_arm = [np.zeros((len(arm), DRAWS)) for arm in runs]
    for test in tests:
        n = len(runs[0][0][test])
        counts = draw.multinomial(n, np.full(n, 1 / n), size=DRAWS).T / n
        for values, arm in zip(by_arm, runs):
            values += np.array([run[test] for run in arm], dtype=float) @ counts / len(tests)
    degrees = sum(len(values) - 1 for values in by_arm)
    wider = student(degrees) / Z_95 if degrees else 1.0
    redrawn = []
    for values in by_arm:
        k = len(values)
        centre = values.mean(0)
        picked = np.take_along_axis(values, draw.integers(k, size=(k, DRAWS)), axis=0).mean(0)
        redrawn.append(centre + (picked - centre) * wider * math.sqrt(k / (k - 1)) if k > 1 else centre)
    return np.array(redrawn)


def _interval(value: float, draws: NDArray[np.float64]) -> Estimate:
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


# What a design can tell -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """How far arms vary, and what could be told of them.

    Attributes:
        n_items, n_seeds: of the comparisons there are, as `of_even_tests`; the fewest seeds of their arms.
        item_deviation: standard deviation over items of a paired difference, each the mean over seeds; root mean
            square over the comparisons.
        seed_deviation: standard deviation over seeds of an arm's accuracy, pooled over the arms; None of one seed.
        records: what this rests on.
    """

    n_items: int
    n_seeds: int
    item_deviation: float
    seed_deviation: float | None
    records: list[Record]

    @property
    def smallest(self) -> float:
        """The smallest difference that these items and seeds tell from zero with 80 % power."""
        return self.smallest_at(self.n_items, self.n_seeds)

    def smallest_at(self, n_items: int, n_seeds: int) -> float:
        return smallest_difference(self.item_deviation, n_items, self.seed_deviation or 0.0, n_seeds)

    def seeds_for(self, target: float, n_items: int, most: int = 50) -> int | None:
        """The fewest seeds of each arm, at least two, that tell such a difference; None where `most` do not."""
        return next((k for k in range(2, most + 1) if self.smallest_at(n_items, k) <= target), None)


def of_even_tests(n_items: Sequence[int]) -> float:
    """How many items in tests of one size tell as much as these do: a mean over tests is not one over items."""
    return len(n_items) ** 2 / sum(1 / n for n in n_items)


def design(contrasts: Sequence[Contrast]) -> Design | None:
    """What comparisons with one arm say about their design; None without any.

    Those of a single seed are left out where there are others.
    """
    if not contrasts:
        return None
    contrasts = [one for one in contrasts if min(len(one.first.records), len(one.second.records)) > 1] or contrasts
    arms = list({id(each): each for one in contrasts for each in (one.first, one.second)}.values())
    first = contrasts[0].first.records
    n_items = round(of_even_tests([len(right(first[0])[test]) for test in compared_tests(first)]))
    squares = [_squared_error(one) * n_items for one in contrasts]
    varied = [accuracies_by_seed(arm) for arm in arms if len(arm.records) > 1]
    degrees = sum(len(values) - 1 for values in varied)
    pooled = sum(variance(values) * (len(values) - 1) for values in varied) / degrees if degrees else None
    return Design(
        n_items=n_items,
        n_seeds=min(len(arm.records) for arm in arms),
        item_deviation=math.sqrt(fmean(squares)),
        seed_deviation=None if pooled is None else math.sqrt(pooled),
        records=[record for arm in arms for record in arm.records],
    )


def _squared_error(one: Contrast) -> float:
    """The squared standard error over items of a difference, the mean over tests."""
    ours, theirs = ([right(record) for record in arm.records] for arm in (one.first, one.second))
    tests = compared_tests(one.first.records, one.second.records)
    errors = []
    for test in tests:
        both = zip(zip(*(run[test] for run in ours)), zip(*(run[test] for run in theirs)))
        differences = [fmean(a) - fmean(b) for a, b in both]
        errors.append(stdev(differences) ** 2 / len(differences))
    return sum(errors) / len(tests) ** 2
