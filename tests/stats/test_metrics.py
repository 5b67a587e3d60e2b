"""ACR, certified accuracy, rounding, and paired comparisons, against counts made by hand and scipy's own tests."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
from scipy import stats

from rscli.errors import InputError
from rscli.stats import metrics, paired
from support import SHARED

RADIUS = np.array([0.0, 0.0, 0.25, 0.5, 1.0, 0.75])
CORRECT = np.array([0, 1, 1, 1, 1, 0])  # abstained; right at radius 0; three right; one wrong
LOGS = SHARED / "logs"


def test_acr_counts_wrong_and_abstained_images_as_zero():
    assert metrics.acr(RADIUS, CORRECT) == pytest.approx(1.75 / 6)
    assert metrics.acr([2.0], [False]) == 0.0


def test_certified_accuracy_at_each_radius():
    found = metrics.certified_accuracy(RADIUS, CORRECT, [0.0, 0.1, 0.25, 0.2500001, 0.5, 1.0, 1.1])
    np.testing.assert_allclose(found, np.array([4, 3, 3, 2, 2, 1, 0]) / 6)
    assert float(metrics.certified_accuracy(RADIUS, CORRECT, 0.5)) == pytest.approx(2 / 6)


def test_certified_accuracy_equals_the_definition_on_random_columns():
    rng = np.random.default_rng(3)
    radius, correct = rng.integers(0, 20, 500) / 10, rng.random(500) < 0.6
    radii = np.linspace(0, 2.2, 45)
    expected = [sum(c and r >= wanted for r, c in zip(radius, correct, strict=True)) / 500 for wanted in radii]
    np.testing.assert_array_equal(metrics.certified_accuracy(radius, correct, radii), expected)


@pytest.mark.skipif(not LOGS.exists(), reason="the published logs are not here")
def test_published_figures_from_the_published_log():
    log = np.genfromtxt(LOGS / "cifar10-resnet20-gaussian-0.5.tsv", names=True, usecols=(3, 4))
    assert metrics.acr(log["radius"], log["correct"]) == pytest.approx(0.5242, abs=5e-4)


@pytest.mark.parametrize(
    ("radius", "correct"),
    [([], []), ([0.1], [1, 0]), ([-0.1], [1]), ([float("nan")], [1]), ([float("inf")], [1]), ([[0.1]], [[1]])],
    ids=["empty", "lengths", "negative", "nan", "infinite", "two-dimensional"],
)
def test_invalid_columns_are_refused(radius, correct):
    with pytest.raises(InputError):
        metrics.acr(radius, correct)
    with pytest.raises(InputError):
        metrics.certified_accuracy(radius, correct, [0.5])


@pytest.mark.parametrize(
    ("radius", "digits", "expected"),
    [
        ("1.2361", 2, 1.23),
        (1.2361, 2, 1.23),
        (1.2399999, 2, 1.23),
        (0.29, 2, 0.29),
        (0.57, 2, 0.57),
        (1.1, 1, 1.1),
        (2.675, 2, 2.67),
        (0.1 + 0.2, 1, 0.3),
        (1e-7, 3, 0.0),
        (3.8114, 0, 3.0),
        (np.float64(0.29), 2, 0.29),
        (0, 3, 0.0),
        (123456789.987654321, 4, 123456789.9876),
    ],
)
def test_radii_are_rounded_down(radius, digits, expected):
    assert metrics.round_down(radius, digits) == expected


def test_rounding_never_raises_a_radius_and_never_loses_a_digit():
    for value in np.random.default_rng(4).random(2000) * 4:
        cut = Decimal(repr(metrics.round_down(value, 3)))
        assert 0 <= Decimal(repr(float(value))) - cut < Decimal("0.001")


@pytest.mark.parametrize("hundredths", range(0, 400, 7))
def test_rounding_keeps_what_is_already_short(hundredths):
    assert metrics.round_down(hundredths / 100, 2) == hundredths / 100


@pytest.mark.parametrize(
    ("radius", "digits"), [(-0.1, 2), (float("nan"), 2), (float("inf"), 2), ("far", 2), ("nan", 2), ("sNaN", 2), (1.0, -1)]
)
def test_what_is_no_radius_is_not_rounded(radius, digits):
    with pytest.raises(InputError):
        metrics.round_down(radius, digits)


def test_interval_of_a_table():
    low, high = metrics.certified_interval(5000, 10_000)
    assert (0.5 - low, high - 0.5) == pytest.approx((0.0098, 0.0098), abs=2e-4)  # +-1.0 points at m = 10,000


@pytest.mark.parametrize("rho", [0.5, 0.05, 0.001])
@pytest.mark.parametrize("alpha", [0.001, 0.3])
@pytest.mark.parametrize("m", [0, 1, 50, 500, 10_000])
def test_wrong_certificates_is_the_binomial_quantile(m, alpha, rho):
    assert metrics.wrong_certificates(m, alpha, rho) == int(stats.binom.isf(rho, m, alpha) if m else 0)


def test_wrong_certificates_of_the_usual_table():
    assert metrics.wrong_certificates(500, 0.001, 0.001) == 4
    for bad in [(-1, 0.1, 0.1), (5, 0, 0.1), (5, 0.1, 1)]:
        with pytest.raises(InputError):
            metrics.wrong_certificates(*bad)


def test_mean_and_sample_deviation():
    assert metrics.mean_sd([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, np.std([1, 2, 4], ddof=1)))
    assert metrics.mean_sd(np.array([1.5])) == (1.5, None)
    with pytest.raises(InputError):
        metrics.mean_sd([])


# --- paired comparisons ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "p"), [(0, 0, 1.0), (1, 0, 1.0), (6, 0, 2 / 64), (3, 1, 10 / 16), (0, 11, 2 / 2**11)]
)
def test_mcnemar_counted_by_hand(first, second, p):
    assert paired.mcnemar(first, second) == pytest.approx(p, rel=1e-12)


def test_holm_worked_by_hand():
    # sorted: .01 * 4 = .04, .02 * 3 = .06, .03 * 2 = .06, .5 * 1
    np.testing.assert_allclose(paired.holm([0.03, 0.01, 0.5, 0.02]), [0.06, 0.04, 0.5, 0.06])
    np.testing.assert_allclose(paired.holm([0.9, 0.8]), [1.0, 1.0])
    assert paired.holm([]).size == 0
    with pytest.raises(InputError):
        paired.holm([0.5, 1.5])


def test_models_are_compared_radius_by_radius():
    first, second = np.full(12, 1.0), np.array([1.0, 0.4] * 6)
    right_first, right_second = np.ones(12), np.array([1] * 10 + [0, 0])
    tests = paired.compare_radii(first, right_first, second, right_second, [0.0, 0.5, 2.0])
    assert [(t.radius, t.only_first, t.only_second) for t in tests] == [(0.0, 2, 0), (0.5, 7, 0), (2.0, 0, 0)]
    assert [t.p_value for t in tests] == pytest.approx([0.5, 2 / 2**7, 1.0])
    assert [t.adjusted for t in tests] == pytest.approx([1.0, 3 * 2 / 2**7, 1.0])


def test_bootstrap_interval_is_paired_seeded_and_near_the_normal_one():
    rng = np.random.default_rng(5)
    base = rng.random(1000)
    better = base + 0.02 + 0.05 * rng.standard_normal(1000).clip(-2, 2)
    arguments = (better.clip(0), np.ones(1000), base, np.ones(1000))
    found = paired.compare_acr(*arguments, seed=1)
    gain = better.clip(0) - base
    half = 1.96 * gain.std() / np.sqrt(1000)
    assert found.difference == pytest.approx(gain.mean())
    assert (found.low, found.high) == pytest.approx((gain.mean() - half, gain.mean() + half), abs=0.1 * half)
    assert found == paired.compare_acr(*arguments, seed=1)
    assert found != paired.compare_acr(*arguments, seed=2)
    assert half < 0.005  # unpaired it would be .025


def test_bootstrap_covers_as_often_as_it_says():
    rng = np.random.default_rng(6)
    covered = 0
    for trial in range(300):
        gain = rng.exponential(1.0, 80)  # mean 1
        found = paired.compare_acr(gain, np.ones(80), np.zeros(80), np.ones(80), resamples=400, seed=trial)
        covered += found.low <= 1.0 <= found.high
    assert 260 <= covered <= 298  # 95 % asked for; the percentile method is a little short on skewed data


def test_equal_models_differ_by_nothing():
    found = paired.compare_acr(RADIUS, CORRECT, RADIUS, CORRECT, resamples=10)
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)


def test_pairs_of_unequal_length_are_refused():
    with pytest.raises(InputError, match="same images"):
        paired.compare_acr([1.0], [1], [1.0, 2.0], [1, 1])
    with pytest.raises(InputError, match="same images"):
        paired.compare_radii([1.0], [1], [1.0, 2.0], [1, 1], [0.0])
    with pytest.raises(InputError):
        paired.compare_acr([1.0], [1], [1.0], [1], level=1.0)
    with pytest.raises(InputError):
        paired.compare_acr([1.0], [1], [1.0], [1], resamples=0)
