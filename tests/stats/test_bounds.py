"""Clopper-Pearson bounds against exact arithmetic, scipy's Beta quantiles, and coverage computed without either."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from math import comb, log, sqrt

import mpmath
import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtri

from rscli.errors import InputError
from rscli.stats import bounds

SMALL = [(1, 1), (1, 7), (3, 7), (6, 7), (7, 7), (2, 30), (15, 30), (29, 30), (50, 90), (89, 90)]
LARGE = [(n, k) for n in (1000, 10**5, 10**6, 10**7) for k in (1, n // 100, n // 2, n * 6 // 10, n * 99 // 100, n - 3, n - 1)]


def exact_tail(k: int, n: int, p: float) -> Fraction:
    """P(Bin(n, p) >= k) in rational arithmetic, p being the exact value of the float."""
    q = Fraction(p)
    return sum((comb(n, j) * q**j * (1 - q) ** (n - j) for j in range(k, n + 1)), Fraction(0))


def large_tail(k: int, n: int, p: float) -> mpmath.mpf:
    """P(Bin(n, p) >= k) for k above the mean: the terms from k on, with 40 digits."""
    with mpmath.workdps(40):
        q = mpmath.mpf(p)
        term = mpmath.binomial(n, k) * q**k * (1 - q) ** (n - k)
        total = mpmath.mpf(0)
        for j in range(k, n + 1):
            total += term
            term *= mpmath.mpf(n - j) / (j + 1) * q / (1 - q)
            if term < total * mpmath.mpf(10) ** -25:
                break
        return total


@pytest.mark.parametrize("alpha", [0.05, 0.001, 1e-6])
@pytest.mark.parametrize(("k", "n"), SMALL)
def test_lower_is_where_the_exact_tail_equals_alpha(k, n, alpha):
    found = bounds.lower(k, n, alpha)
    assert float(exact_tail(k, n, found) / Fraction(alpha)) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.05, 0.001, 1e-6])
@pytest.mark.parametrize(("k", "n"), SMALL)
def test_upper_is_where_the_exact_lower_tail_equals_alpha(k, n, alpha):
    if k == n:
        assert bounds.upper(k, n, alpha) == 1.0
    else:
        found = bounds.upper(k, n, alpha)
        at_most_k = 1 - exact_tail(k + 1, n, found)
        rounding = 2**-52 / (1 - found)  # a float next to 1 cannot say more
        assert float(at_most_k / Fraction(alpha)) == pytest.approx(1, rel=1e-12 + rounding)


@pytest.mark.parametrize(("n", "k"), LARGE)
def test_lower_never_exceeds_the_true_bound_by_more_than_rounding(n, k):
    excess = float(large_tail(k, n, bounds.lower(k, n, 1e-3)) / mpmath.mpf(0.001) - 1)
    assert abs(excess) < 1e-8  # of alpha itself: alpha becomes at most .00100000001


@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_arrays_agree_with_the_beta_quantiles_of_scipy(alpha):
    n = 100_000
    k = np.array([1, 2, 17, 5000, 50_000, 50_490, 84_492, 99_999])
    np.testing.assert_allclose(bounds.lower(k, n, alpha), stats.beta.ppf(alpha, k, n - k + 1), rtol=1e-11)
    np.testing.assert_allclose(bounds.upper(k, n, alpha), stats.beta.isf(alpha, k + 1, n - k), rtol=1e-11)
    assert bounds.lower(int(k[3]), n, alpha) == bounds.lower(k, n, alpha)[3]
    assert bounds.upper(k, np.full(k.size, n), alpha)[3] == bounds.upper(int(k[3]), n, alpha)


@pytest.mark.parametrize("n", [1, 10, 10**4, 10**7])
def test_closed_forms_at_the_extreme_counts(n):
    with mpmath.workdps(40):
        unanimous = mpmath.mpf(0.001) ** (mpmath.mpf(1) / n)
        never = float(1 - unanimous)
    assert bounds.lower(0, n, 0.001) == 0.0
    assert bounds.upper(n, n, 0.001) == 1.0
    assert bounds.lower(n, n, 0.001) == pytest.approx(float(unanimous), rel=1e-15)
    assert bounds.upper(0, n, 0.001) == pytest.approx(never, rel=1e-14)
    assert list(bounds.lower(np.array([0, n]), n, 0.001)) == [0.0, bounds.lower(n, n, 0.001)]


@pytest.mark.parametrize(("n", "largest"), [(10**4, 3.199), (10**5, 3.811), (10**6, 4.347)])
def test_largest_radius_in_sigma(n, largest):
    assert float(ndtri(bounds.lower(n, n, 0.001))) == pytest.approx(largest, abs=5e-4)


def test_bounds_move_the_right_way():
    k = np.arange(1001)
    assert (np.diff(bounds.lower(k, 1000, 0.001)) > 0).all()
    assert (np.diff(bounds.upper(k, 1000, 0.001)) > 0).all()
    assert (bounds.lower(k, 1000, 0.001) < k / 1000)[1:].all()
    assert (bounds.upper(k, 1000, 0.001) > k / 1000)[:-1].all()
    assert bounds.lower(600, 1000, 0.01) > bounds.lower(600, 1000, 0.001)


@pytest.mark.parametrize("alpha", [0.1, 0.001])
@pytest.mark.parametrize("n", [1, 12, 60])
def test_exact_coverage_at_every_p(n, alpha):
    k = np.arange(n + 1)
    low, high = bounds.lower(k, n, alpha), bounds.upper(k, n, alpha)
    for p in np.linspace(0.001, 0.999, 301):
        pmf = np.array([comb(n, j) * p**j * (1 - p) ** (n - j) for j in k])
        assert pmf[low > p].sum() <= alpha * (1 + 1e-9)
        assert pmf[high < p].sum() <= alpha * (1 + 1e-9)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.9997])
def test_simulated_coverage(p):
    alpha, trials = 0.01, 200_000
    hits = np.random.default_rng(20).binomial(2000, p, size=trials)
    wrong = int((bounds.lower(hits, 2000, alpha) > p).sum())
    margin = 4 * sqrt(trials * alpha * (1 - alpha))  # 4 standard deviations
    assert wrong <= trials * alpha + margin


def test_two_sided_interval_splits_the_error():
    low, high = bounds.interval(250, 500)
    expected = stats.binomtest(250, 500).proportion_ci(0.95, method="exact")
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert high - low == pytest.approx(0.09, abs=0.001)  # +-4.5 points at m = 500
    assert bounds.interval(0, 10)[0] == 0.0
    assert bounds.interval(10, 10)[1] == 1.0


@pytest.mark.parametrize(
    ("c1", "c2"), [(0, 0), (1, 0), (11, 0), (5, 5), (6, 5), (60, 40), (561, 439), (50_600, 49_400), (3, 9)]
)
def test_top_two_p_value_is_the_binomial_test(c1, c2):
    expected = stats.binomtest(c1, c1 + c2, 0.5).pvalue if c1 + c2 else 1.0
    assert bounds.top_two_p_value(c1, c2) == pytest.approx(expected, rel=1e-10)
    assert bounds.top_two_p_value(c2, c1) == bounds.top_two_p_value(c1, c2)


@pytest.mark.parametrize(("alpha", "n"), [(0.001, 11), (0.05, 6), (0.5, 2), (0.999, 2), (1e-12, 41)])
def test_fewest_samples_of_a_unanimous_vote(alpha, n):
    assert bounds.smallest_n_for(alpha) == n
    assert bounds.top_two_p_value(n, 0) <= alpha
    assert n == 2 or bounds.top_two_p_value(n - 1, 0) > alpha
    assert n >= log(1 / alpha) / log(2) + 1


@pytest.mark.parametrize("bound", [bounds.lower, bounds.upper])
@pytest.mark.parametrize(
    ("k", "n", "alpha"),
    [(6, 5, 0.1), (-1, 5, 0.1), (0, 0, 0.1), (1.5, 5, 0.1), (1, 5, 0.0), (1, 5, 1.0), (1, 5, float("nan")), (1, 5, -0.1)],
)
def test_wrong_input_is_refused(bound, k, n, alpha):
    with pytest.raises(InputError):
        bound(k, n, alpha)
    with pytest.raises(InputError):
        bound(np.array([1, k]), n, alpha)


def test_other_wrong_input_is_refused():
    for call in (
        lambda: bounds.interval(1, 2, 1.0),
        lambda: bounds.top_two_p_value(-1, 3),
        lambda: bounds.smallest_n_for(0),
    ):
        with pytest.raises(InputError):
            call()


def test_importing_the_bounds_imports_neither_torch_nor_scipy_stats():
    imports = "import sys, rscli.stats.bounds, rscli.stats.metrics, rscli.stats.paired"
    code = f"{imports}; print({{'torch', 'scipy.stats'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
