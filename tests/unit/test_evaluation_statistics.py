"""Intervals and tests against published figures and simulation."""

import random

import pytest

from smtune.evaluation.statistics import Estimate, accuracy, mcnemar, mean, paired_difference


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
