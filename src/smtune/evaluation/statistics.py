"""Intervals and tests for accuracies, in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

Z_95 = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""

Runs = Sequence[Sequence[bool]]
"""Of each seed, which items are right."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval, as fractions."""

    value: float
    low: float
    high: float


def accuracy(correct: int, n: int) -> Estimate:
    """Share correct with Wilson's score interval, which holds near 0 and 1 and for small n.

    Source: Wilson 1927, JASA 22, 209.
    """
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"Expected 0 <= correct <= n with n > 0. Got correct={correct}, n={n}.")
    share, z2 = correct / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the formula gives exactly the share; rounding must not put it outside its own interval.
    return Estimate(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Unweighted mean of independent estimates ("Avg." over tasks), its interval from theirs.

    Source: the method of variance estimates recovery, Zou and Donner 2008, Stat. Med. 27, 1693.
    """
    k = len(estimates)
    value = sum(e.value for e in estimates) / k
    below = math.sqrt(sum((e.value - e.low) ** 2 for e in estimates)) / k
    above = math.sqrt(sum((e.high - e.value) ** 2 for e in estimates)) / k
    return Estimate(value, value - below, value + above)


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of run a minus that of run b over the same n items.

    Args:
        difference: with Newcombe's 95 % interval (method 10).
        only_a, only_b: items that only one of the two got right.
        p_value: exact two-sided McNemar test that both are equally good.
    """

    n: int
    difference: Estimate
    only_a: int
    only_b: int
    p_value: float


def paired_difference(a: Sequence[bool], b: Sequence[bool]) -> PairedDifference:
    """Compares two runs item by item.

    Args:
        a, b: whether item k was right in each run, same order.
    Source: Newcombe 1998, Stat. Med. 17, 2635 (method 10); McNemar 1947, in its exact binomial form.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"Expected two runs over the same items. Got {len(a)} and {len(b)} items.")
    n = len(a)
    both = sum(x and y for x, y in zip(a, b))
    only_a, only_b = sum(a) - both, sum(b) - both
    neither = n - both - only_a - only_b
    first, second = accuracy(both + only_a, n), accuracy(both + only_b, n)

    phi = _continuity_corrected_phi(both, only_a, only_b, neither)
    difference = first.value - second.value
    below = _square_and_add(first.value - first.low, second.high - second.value, phi)
    above = _square_and_add(first.high - first.value, second.value - second.low, phi)
    estimate = Estimate(difference, max(-1.0, difference - below), min(1.0, difference + above))
    return PairedDifference(n, estimate, only_a, only_b, mcnemar(only_a, only_b))


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value that the discordant items fall either way with equal chance."""
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def _square_and_add(x: float, y: float, phi: float) -> float:
    return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))


def _continuity_corrected_phi(both: int, only_a: int, only_b: int, neither: int) -> float:
    n = both + only_a + only_b + neither
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if margins == 0:
        return 0.0
    cross = both * neither - only_a * only_b
    if cross > 0:
        cross = max(cross - n / 2, 0)
    return cross / math.sqrt(margins)


# -- several seeds -----------------------------------------------------------------------------------------------

TIE = 0.02
"""Two methods are tied where the whole interval of their difference lies within this margin (2 points)."""

_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's quantiles of a two-sided 95 % interval for 1 to 9 degrees of freedom."""

SIGNIFICANT = 0.05
"""A p-value below this one is told."""

Verdict = Literal["better", "worse", "tie", "undecided"]


def accuracy_over_seeds(runs: Runs) -> Estimate:
    """Mean accuracy of runs that differ in their seed alone, over the same n items.

    The interval has two parts, added in quadrature: Wilson's for the items at the mean accuracy, and Student's for the
    mean over seeds. With one seed the second part is unknown, and the interval is of the items alone.

    Args:
        runs: of each seed, whether item k was right.
    """
    return accuracy_over_tests([runs])


def accuracy_over_tests(tests: Sequence[Runs]) -> Estimate:
    """`accuracy_over_seeds` of the unweighted mean over tests; a seed's model answers all of them.

    So the items' part is of independent tests, and the seeds' part of each seed's mean over them.

    Args:
        tests: the runs on each, seeds in the same order on all.
    """
    for runs in tests:
        _check_runs(runs)
    by_test = [accuracy(round(fmean(map(fmean, runs)) * len(runs[0])), len(runs[0])) for runs in tests]
    seeds = _of_seeds([fmean(map(fmean, runs)) for runs in zip(*tests)])
    value = fmean(fmean(map(fmean, runs)) for runs in tests)
    low = value - math.hypot(*[(items.value - items.low) / len(tests) for items in by_test], seeds)
    high = value + math.hypot(*[(items.high - items.value) / len(tests) for items in by_test], seeds)
    return Estimate(value, max(0.0, low), min(1.0, high))


@dataclass(frozen=True)
class SeedsDifference:
    """Mean accuracy of a less that of b, runs over the same n items.

    Args:
        difference: with a 95 % interval over items and seeds.
        p_value: two-sided, that both are equally good: exact McNemar for one seed, else Welch's.
    """

    n: int
    difference: Estimate
    p_value: float


def difference_over_seeds(a: Runs, b: Runs) -> SeedsDifference:
    """Compares two arms item by item, each the mean over its own seeds.

    The interval adds the paired standard error over items and Student's interval of each arm's mean over seeds in
    quadrature. One seed each: Newcombe's interval and McNemar's test, as `paired_difference`.
    """
    _check_runs([*a, *b])
    if len(a) == len(b) == 1:
        paired = paired_difference(a[0], b[0])
        return SeedsDifference(paired.n, paired.difference, paired.p_value)
    return _in_quadrature([(a, b)])


def _of_items(a: Runs, b: Runs) -> float:
    """Half of the interval over items of the paired difference of two arms, each the mean over its seeds."""
    differences = [fmean(right) - fmean(other) for right, other in zip(zip(*a), zip(*b))]
    return Z_95 * stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 1.0


def difference_over_tests(tests: Sequence[tuple[Runs, Runs]]) -> SeedsDifference:
    """`difference_over_seeds` of the unweighted mean over tests; a seed's model answers all of them.

    So the items' part is of independent tests, and the seeds' part of each run's mean over them.

    Args:
        tests: the runs of the two arms on each, seeds in the same order on all.
    """
    if len(tests) == 1:
        return difference_over_seeds(*tests[0])
    for a, b in tests:
        _check_runs([*a, *b])
    if all(len(a) == len(b) == 1 for a, b in tests):
        found = [paired_difference(a[0], b[0]) for a, b in tests]
        total = mean([each.difference for each in found])
        return SeedsDifference(sum(each.n for each in found), total, p_value_of(total))
    return _in_quadrature(tests)


def _in_quadrature(tests: Sequence[tuple[Runs, Runs]]) -> SeedsDifference:
    """The mean over tests; its interval has the items' parts of the tests and the seeds' parts of the two arms."""
    value = fmean(fmean(map(fmean, a)) - fmean(map(fmean, b)) for a, b in tests)
    parts = [(_of_items(a, b) / len(tests), math.inf) for a, b in tests]
    for arm in zip(*tests):
        means = [fmean(map(fmean, runs)) for runs in zip(*arm)]
        parts += [(_of_seeds(means), len(means) - 1)] if len(means) > 1 else []
    half = math.hypot(*[part for part, _ in parts])
    estimate = Estimate(value, max(-1.0, value - half), min(1.0, value + half))
    return SeedsDifference(sum(len(a[0]) for a, _ in tests), estimate, welch(value, parts))


def welch(value: float, parts: Sequence[tuple[float, float]]) -> float:
    """The two-sided p-value that a sum is zero, by its parts' variances and degrees of freedom.

    It may be below 0.05 where zero is within the interval, which adds the parts' halves and is a little wider.

    Args:
        parts: half of the 95 % interval of each, and its degrees of freedom; endless ones are the normal's.
    Source: Welch 1947, Biometrika 34, 28; Satterthwaite 1946, Biometrics Bull. 2, 110.
    """
    variances = [(half / (Z_95 if n == math.inf else student(int(n)))) ** 2 for half, n in parts]
    total = sum(variances)
    if not total:
        return float(value == 0)
    spread = sum(variance**2 / n for variance, (_, n) in zip(variances, parts))
    degrees = total**2 / spread if spread else math.inf
    t = abs(value) / math.sqrt(total)
    return math.erfc(t / math.sqrt(2)) if degrees > MANY else student_tails(t, math.floor(degrees))


def p_value_of(difference: Estimate) -> float:
    """The two-sided p-value that a difference is zero, by the normal distribution that its 95 % interval stands for."""
    value = difference.value
    half = value - difference.low if value > 0 else difference.high - value  # the side on which zero is
    return math.erfc(abs(value) / half * Z_95 / math.sqrt(2)) if half else float(value == 0)


def verdict(difference: Estimate, p_value: float = 0.0) -> Verdict:
    """What may be said: "tie" needs the whole interval within `TIE`; "better" and "worse" all of it beyond zero and,
    where there is a test, its p-value below `SIGNIFICANT`: an exact test asks for more than a score interval."""
    if difference.low >= -TIE and difference.high <= TIE:
        return "tie"
    if p_value >= SIGNIFICANT or difference.low <= 0 <= difference.high:
        return "undecided"
    return "better" if difference.low > 0 else "worse"


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several comparisons, adjusted so that one false finding among all has a chance of 5 % at 0.05.

    Source: Holm 1979, Scand. J. Stat. 6, 65.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of a value of each seed with Student's 95 % interval, which is endless for a single seed."""
    value, half = fmean(values), _of_seeds(values) if len(values) > 1 else math.inf
    return Estimate(value, value - half, value + half)


Z_80 = 0.8416212335729143
"""The normal quantile of a power of 80 %."""


def smallest_difference(item_deviation: float, n_items: int, seed_deviation: float = 0.0, n_seeds: int = 1) -> float:
    """The true difference of two arms that `difference_over_seeds` tells from zero in 80 % of all experiments.

    Half of its 95 % interval and `Z_80` standard errors, the items' and the two arms' seeds' parts added in quadrature.
    Of one seed an arm only the items' part is known.

    Args:
        item_deviation: standard deviation over items of the paired difference, each the mean over seeds.
        seed_deviation: standard deviation of an arm's accuracy over seeds.
    Source: Bloom 1995, Evaluation Review 19, 547 (minimum detectable effect), with Student's quantile for the seeds.
    """
    items = item_deviation / math.sqrt(n_items)
    seeds = math.sqrt(2) * seed_deviation / math.sqrt(n_seeds) if n_seeds > 1 else 0.0
    quantile = student(n_seeds - 1) if n_seeds > 1 else 0.0
    return math.hypot(Z_95 * items, quantile * seeds) + Z_80 * math.hypot(items, seeds)


def _check_runs(runs: Runs) -> None:
    if not runs or not runs[0] or len({len(run) for run in runs}) > 1:
        raise ValueError(f"Expected runs over the same items. Got {[len(run) for run in runs]} items.")


def _of_seeds(means: Sequence[float]) -> float:
    """Half of Student's 95 % interval for the mean over seeds; 0 for a single one, of which nothing is known."""
    k = len(means)
    if k < 2:
        return 0.0
    return student(k - 1) * stdev(means) / math.sqrt(k)


MANY = 1000
"""Degrees of freedom of which Student's distribution is taken for the normal."""


def student_tails(t: float, n: int) -> float:
    """How likely Student's |t| of n > 0 degrees of freedom is to be t or more.

    Source: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    sine, cosine_squared = t / math.sqrt(n + t * t), n / (n + t * t)
    term, total = 1.0, 0.0
    for k in range(n // 2):
        total += term
        term *= cosine_squared * ((2 * k + 1) / (2 * k + 2) if n % 2 == 0 else (2 * k + 2) / (2 * k + 3))
    if n % 2 == 0:
        return max(0.0, 1 - sine * total)
    return max(0.0, 1 - 2 / math.pi * (math.asin(sine) + sine * math.sqrt(cosine_squared) * total))


def student(n: int) -> float:
    """Student's quantile of a two-sided 95 % interval for n > 0 degrees of freedom, right to three decimals.

    Source: from 10 degrees of freedom on the normal quantile's expansion, Abramowitz and Stegun 1964, 26.7.5.
    """
    if n <= len(_T_95):
        return _T_95[n - 1]
    z = Z_95
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
