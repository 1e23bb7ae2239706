"""Intervals and tests against published figures and simulation."""

import math
import random
from statistics import fmean, stdev

import pytest

from smtune.evaluation.statistics import (
    Estimate,
    accuracy,
    accuracy_over_seeds,
    accuracy_over_tests,
    difference_over_seeds,
    difference_over_tests,
    mcnemar,
    mean,
    mean_over_seeds,
    p_value_of,
    paired_difference,
    student,
    student_tails,
    verdict,
)


def test_a_seed_answers_all_tests():
    """On copies of one test the seeds' part must not shrink, as it would if each test had seeds of its own."""
    draw = random.Random(3)
    a = [[draw.random() < p for _ in range(400)] for p in (0.3, 0.5, 0.7)]
    b = [[draw.random() < p for _ in range(400)] for p in (0.2, 0.4, 0.5)]
    one = difference_over_tests([(a, b)])
    assert one == difference_over_seeds(a, b)
    four = difference_over_tests([(a, b)] * 4)
    assert four.n == 1600
    assert four.difference.value == pytest.approx(one.difference.value)
    seeds = math.hypot(*[4.302652729749464 * stdev(map(fmean, runs)) / math.sqrt(3) for runs in (a, b)])
    items = math.sqrt((one.difference.high - one.difference.value) ** 2 - seeds**2)
    half = four.difference.high - four.difference.value
    assert half == pytest.approx(math.hypot(items / 2, seeds), rel=1e-3)  # our quantile is closed


def paired(both, only_a, only_b, neither):
    a = [True] * both + [True] * only_a + [False] * only_b + [False] * neither
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return a, b


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),  # Newcombe 1998, Stat. Med. 17, 857, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_published_figures(correct, n, low, high):
    estimate = accuracy(correct, n)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)
    assert estimate.value == correct / n


def test_wilson_is_symmetric_and_holds_its_value():
    for n in (1, 7, 100):
        for correct in range(n + 1):
            one, other = accuracy(correct, n), accuracy(n - correct, n)
            assert 0 <= one.low <= one.value <= one.high <= 1
            assert one.low == pytest.approx(1 - other.high)


@pytest.mark.parametrize(("correct", "n"), [(1, 0), (-1, 3), (4, 3)])
def test_accuracy_refuses_impossible_counts(correct, n):
    with pytest.raises(ValueError, match="Expected 0 <= correct"):
        accuracy(correct, n)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        # Newcombe 1998, Stat. Med. 17, 2635, method 10.
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((20, 12, 2, 16), 0.0562, 0.3292),
        # Bentur et al. 2009 in Fagerland et al. 2017, table 8.
        ((1, 1, 7, 12), -0.507, -0.026),
    ],
)
def test_newcombe_matches_published_figures(counts, low, high):
    result = paired_difference(*paired(*counts))
    assert (result.difference.low, result.difference.high) == pytest.approx((low, high), abs=5e-4)
    assert (result.only_a, result.only_b, result.n) == (counts[1], counts[2], sum(counts))


def test_paired_difference_changes_sign_with_the_order():
    a, b = paired(20, 12, 2, 16)
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert one.difference.low == pytest.approx(-other.difference.high)
    assert one.p_value == other.p_value


def test_paired_difference_of_equal_runs_is_zero():
    result = paired_difference([True, False] * 50, [True, False] * 50)
    assert result.difference.value == 0
    assert result.difference.low < 0 < result.difference.high
    assert result.p_value == 1


def test_paired_interval_covers_the_truth_about_95_times_in_100():
    rng = random.Random(0)
    hits = 0
    for _ in range(400):
        a, b = [], []
        for _ in range(60):
            hard = rng.random()  # shared by both runs, so they correlate
            a.append(hard < 0.7)
            b.append(hard < 0.5 if rng.random() < 0.7 else rng.random() < 0.5)
        difference = paired_difference(a, b).difference
        hits += difference.low <= 0.2 <= difference.high
    assert 0.92 <= hits / 400 <= 0.99


@pytest.mark.parametrize(
    ("only_a", "only_b", "p_value"), [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (1, 7, 0.0703125), (10, 0, 2 / 1024)]
)
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b, p_value):
    assert mcnemar(only_a, only_b) == p_value


def test_mean_of_one_is_itself_and_of_many_is_narrower():
    one = accuracy(30, 100)
    single, many = mean([one]), mean([one] * 4)
    assert (single.low, single.high) == pytest.approx((one.low, one.high))
    assert many.high - many.low == pytest.approx((one.high - one.low) / 2)
    assert mean([Estimate(0.2, 0.1, 0.3), Estimate(0.4, 0.4, 0.4)]).value == pytest.approx(0.3)


@pytest.mark.parametrize(("a", "b"), [([], []), ([True], [True, False])])
def test_paired_difference_needs_the_same_items(a, b):
    with pytest.raises(ValueError, match="same items"):
        paired_difference(a, b)


# Several seeds --------------------------------------------------------------------------------------------------------


def test_one_seed_is_wilson_and_newcombe():
    a, b = [True] * 30 + [False] * 20, [True] * 20 + [False] * 30
    assert accuracy_over_seeds([a]) == accuracy(30, 50)
    several, single = difference_over_seeds([a], [b]), paired_difference(a, b)
    assert (several.difference, several.p_value) == (single.difference, single.p_value)


def test_seeds_that_differ_widen_the_interval():
    same = accuracy_over_seeds([[True, False] * 50] * 3)
    apart = accuracy_over_seeds([[True] * k + [False] * (100 - k) for k in (30, 50, 70)])
    assert same.value == apart.value == 0.5
    assert same == accuracy(50, 100)
    # Student's quantile for two degrees of freedom, 4.303, times 0.2 / √3, and Wilson's half in quadrature
    half = math.hypot(0.5 - accuracy(50, 100).low, 4.303 * 0.2 / math.sqrt(3))
    assert apart.low == pytest.approx(max(0.0, 0.5 - half))


def test_seeds_count_once_over_several_tests():
    """Seeds at 0.5, 0.6 and 0.7 on each of eight tests: more tests tell no more of the seeds."""
    runs = [[True] * k + [False] * (100 - k) for k in (50, 60, 70)]
    one, eight = accuracy_over_tests([runs]), accuracy_over_tests([runs] * 8)
    assert one == accuracy_over_seeds(runs)
    assert eight.value == pytest.approx(0.6)
    items, seeds = accuracy(60, 100), 4.303 * 0.1 / math.sqrt(3)
    assert eight.low == pytest.approx(0.6 - math.hypot((0.6 - items.low) / math.sqrt(8), seeds))
    assert eight.high == pytest.approx(0.6 + math.hypot((items.high - 0.6) / math.sqrt(8), seeds))


def test_of_seeds_that_differ_on_each_test_their_means_count():
    good, bad = [True] * 70 + [False] * 30, [True] * 50 + [False] * 50
    even = accuracy_over_tests([[good, bad], [bad, good]])  # both seeds have 0.6 of the two tests
    assert even.value == pytest.approx(0.6)
    assert even.high - even.low == pytest.approx((accuracy(60, 100).high - accuracy(60, 100).low) / math.sqrt(2))


def test_of_one_seed_the_mean_over_tests_is_that_of_independent_intervals():
    tests = [[True] * 30 + [False] * 70, [True] * 10]
    one, other = accuracy_over_tests([[run] for run in tests]), mean([accuracy(30, 100), accuracy(10, 10)])
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high))


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.706), (9, 2.262), (10, 2.228), (12, 2.179), (20, 2.086), (30, 2.042), (40, 2.021), (120, 1.980)],
)
def test_students_quantile(degrees, quantile):
    values = [float(k % 2) for k in range(degrees + 1)]
    estimate = mean_over_seeds(values)
    half = estimate.high - estimate.value
    assert half * math.sqrt(len(values)) / stdev(values) == pytest.approx(quantile, abs=5e-4)


@pytest.mark.parametrize("spread", [0.1, 0.02])
def test_the_interval_of_a_difference_covers_the_truth(spread):
    """Two arms of three seeds on 200 items, accuracies 0.6 and 0.5: 95 % intervals hold 0.1 about that often."""
    draw = random.Random(0)
    covered = small = 0
    for _ in range(200):
        levels = [draw.random() for _ in range(200)]  # how hard an item is, the same for both arms
        runs = [[[level < p + spread * draw.gauss(0, 1) for level in levels] for _ in range(3)] for p in (0.6, 0.5)]
        estimate = difference_over_seeds(*runs).difference
        covered += estimate.low <= 0.1 <= estimate.high
        equal = [[[level < 0.5 + spread * draw.gauss(0, 1) for level in levels] for _ in range(3)] for _ in "ab"]
        small += difference_over_seeds(*equal).p_value < 0.01
    assert 180 <= covered < 200
    assert small <= 8  # 2 are expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.01, 0.02, "tie"),
        (0.005, 0.015, "tie"),
        (0.01, 0.05, "better"),
        (-0.05, -0.01, "worse"),
        (-0.01, 0.05, "undecided"),
    ],
)
def test_verdict(low, high, expected):
    difference = Estimate((low + high) / 2, low, high)
    assert verdict(difference) == verdict(difference, 0.049) == expected
    # A test that does not tell them apart leaves it open, whatever the interval; a tie needs no test.
    assert verdict(difference, 0.05) == (expected if expected == "tie" else "undecided")


@pytest.mark.parametrize(("value", "half", "p"), [(0.0, 0.1, 1.0), (0.1, 0.1, 0.05), (-0.2, 0.1, 8.86e-5)])
def test_p_value_of_an_interval(value, half, p):
    assert p_value_of(Estimate(value, value - half, value + half)) == pytest.approx(p, rel=0.01)


@pytest.mark.parametrize(
    ("t", "degrees", "p"),
    [(2.5, 1, 0.2422379), (6.0, 2, 0.02667147), (6.0, 3, 0.009272715), (0.5, 4, 0.6433300), (6.0, 21, 5.91049e-06)],
)
def test_students_tails(t, degrees, p):
    assert student_tails(t, degrees) == pytest.approx(p, rel=1e-6)
    assert student_tails(student(degrees), degrees) == pytest.approx(0.05, rel=1e-3)


def test_welchs_p_value():
    """Of so many items that they add nothing: scipy's t of the seeds' means, at 4 of its 4.34 degrees of freedom."""
    n = 1_000_000

    def runs(*means):
        return [[True] * round(mean * n) + [False] * (n - round(mean * n)) for mean in means]

    found = difference_over_seeds(runs(0.30, 0.42, 0.36, 0.33, 0.45), runs(0.20, 0.21, 0.22))
    assert found.p_value == pytest.approx(0.0046864, rel=5e-3)
    assert found.difference.low > 0
    assert difference_over_seeds(runs(0.2, 0.2), runs(0.1, 0.1)).p_value < 1e-6  # seeds that do not vary: the items'
    assert difference_over_seeds([[True] * 50] * 2, [[True] * 50] * 2).p_value == 1
