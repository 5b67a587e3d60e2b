"""Sequential boundaries against rational arithmetic, a sample-by-sample recursion, and figures worked out elsewhere."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import mpmath
import numpy as np
import pytest
from scipy.special import ndtr

from rscli.errors import InputError
from rscli.stats import bounds, sequential

LOOKS = sequential.look_schedule(100_000)
SHORT = sequential.look_schedule(2000)
THRESHOLDS = (0.5, 0.501, 0.55, 0.6, 2 / 3, 0.75, 0.8413447, 0.9, 0.95, 0.97725, 0.99, 0.998, 0.9999)


def walk(p, looks, certify, futility=None, reach=None):
    """Follows the count of hits sample by sample, stopping paths at the looks: (P certified, P gave up, mean samples).

    The exact recursion d[a] = (1 - p) d[a] + p d[a - 1], with neither convolutions nor windows; `reach` bounds the array for
    long runs: counts farther than that from the mean, more than 15 standard deviations away, are not followed.
    """
    size = looks[-1] + 2
    d = np.zeros(size)
    d[0] = 1.0
    certified = gave_up = samples = 0.0
    look = 0
    counts = np.arange(size)
    for n in range(1, looks[-1] + 1):
        low, high = (0, n + 1) if reach is None else (max(0, int(n * p) - reach), min(n + 1, int(n * p) + reach))
        if low:
            d[low : high + 1] = d[low : high + 1] * (1 - p) + d[low - 1 : high] * p
        else:
            d[1 : high + 1] = d[1 : high + 1] * (1 - p) + d[:high] * p
            d[0] *= 1 - p
        if n == looks[look]:
            up = counts >= certify[look]
            down = counts <= (-1 if futility is None else futility[look])
            stopped = d[up].sum() + d[down].sum()
            certified, gave_up = certified + d[up].sum(), gave_up + d[down].sum()
            samples += n * stopped
            d[up | down] = 0
            look += 1
    return certified, gave_up, samples + looks[-1] * d.sum()


def by_rule_in_fractions(p0, looks, alpha, early):
    """The boundary by its definition, in rational arithmetic, over the outcomes of each stage."""
    p, budget = Fraction(p0), Fraction(alpha)
    alive, before, spent, found = {0: Fraction(1)}, 0, Fraction(0), []
    for number, n in enumerate(looks, start=1):
        m = n - before
        after: dict[int, Fraction] = {}
        for a, mass in alive.items():
            for j in range(m + 1):
                after[a + j] = after.get(a + j, Fraction(0)) + mass * comb(m, j) * p**j * (1 - p) ** (m - j)
        may = budget if number == len(looks) else budget * Fraction(early) * number / (len(looks) - 1)
        b = n + 1
        while b > 0 and spent + sum(after.get(a, Fraction(0)) for a in range(b - 1, n + 1)) <= may:
            b -= 1
        spent += sum(after.get(a, Fraction(0)) for a in range(b, n + 1))
        found.append(b)
        alive, before = {a: mass for a, mass in after.items() if a < b}, n
    return tuple(found)


# --- looks -------------------------------------------------------------------------------------------------------------------


def test_looks_grow_by_a_fifth_up_to_n():
    assert LOOKS[:6] == (50, 60, 72, 87, 105, 126)
    assert len(LOOKS) == 43
    assert LOOKS[-1] == 100_000


@pytest.mark.parametrize("n", [1, 49, 50, 51, 60, 61, 1000])
@pytest.mark.parametrize(("first", "growth"), [(50, 1.2), (1, 1.01), (7, 3.0)])
def test_looks_increase_strictly_and_end_at_n(n, first, growth):
    looks = sequential.look_schedule(n, first, growth)
    assert looks[-1] == n
    assert looks[0] == min(first, n)
    assert (np.diff(looks) > 0).all()
    assert (np.array(looks[1:]) <= np.ceil(np.array(looks[:-1]) * growth)).all()


@pytest.mark.parametrize(("n", "first", "growth"), [(0, 50, 1.2), (10, 0, 1.2), (10, 5, 1.0), (10, 5, float("nan"))])
def test_impossible_schedules_are_refused(n, first, growth):
    with pytest.raises(InputError):
        sequential.look_schedule(n, first, growth)


# --- one hypothesis ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("z", "last"), [(0, 50_517), (1, 84_512), (2, 97_878)], ids=["1/2", "Phi(1)", "Phi(2)"])
def test_last_boundary_worked_out_independently(z, last):
    assert sequential.boundary(float(ndtr(z)), LOOKS, 0.001, 0.5)[-1] == last


@pytest.mark.parametrize(("z", "last"), [(0, 50_490), (1, 84_492), (2, 97_870)], ids=["1/2", "Phi(1)", "Phi(2)"])
def test_one_look_is_the_fixed_test(z, last):
    p0 = float(ndtr(z))
    assert sequential.boundary(p0, (100_000,), 0.001) == (last,)
    assert sequential.boundary(p0, LOOKS, 0.001, early=0.0)[-1] == last  # nothing early: all alpha is left at the end


@pytest.mark.parametrize("p0", THRESHOLDS)
@pytest.mark.parametrize("n", [3, 100, 5000])
@pytest.mark.parametrize("alpha", [0.2, 0.001])
def test_one_look_agrees_with_clopper_pearson(p0, n, alpha):
    enough = bounds.lower(np.arange(n + 1), n, alpha) >= p0
    assert sequential.boundary(p0, (n,), alpha) == (int(np.argmax(enough)) if enough.any() else n + 1,)


@pytest.mark.parametrize("p0", [0.5, 0.7, 0.93])
@pytest.mark.parametrize(("alpha", "early"), [(0.05, 0.2), (0.01, 0.5), (0.3, 1.0), (1e-4, 0.2)])
def test_boundary_is_the_rule_in_exact_arithmetic(p0, alpha, early):
    looks = (5, 9, 14, 20, 33)
    assert sequential.boundary(p0, looks, alpha, early) == by_rule_in_fractions(p0, looks, alpha, early)


@pytest.mark.parametrize("early", [0.2, 0.5])
@pytest.mark.parametrize("p0", THRESHOLDS)
def test_error_is_at_most_alpha_and_nearly_all_of_it_is_used(p0, early):
    boundary = sequential.boundary(p0, SHORT, 0.001, early)
    error, _, _ = walk(p0, SHORT, boundary)
    assert error <= 0.001
    assert error > 0.0008 or p0 > 0.97  # near 1 the counts are too coarse to use it up
    lowered = (*boundary[:-1], boundary[-1] - 1)
    assert walk(p0, SHORT, lowered)[0] > 0.001  # one hit less at the end would be too many


@pytest.mark.parametrize("p", [0.3, 0.5, 0.59, 0.5999])
def test_error_is_smaller_below_the_threshold(p):
    boundary = sequential.boundary(0.6, SHORT, 0.01)
    assert walk(p, SHORT, boundary)[0] < walk(0.6, SHORT, boundary)[0] <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("z", [0.0, 1.0, 3.0])
def test_error_of_a_hundred_thousand_samples(z):
    p0 = float(ndtr(z))
    error, _, _ = walk(p0, LOOKS, sequential.boundary(p0, LOOKS, 0.001), reach=2500)
    assert 0.0008 < error <= 0.001


@pytest.mark.parametrize("alpha", [0.9, 0.05, 1e-6, 1e-12])
def test_every_alpha_is_kept(alpha):
    error, _, _ = walk(0.6, SHORT, sequential.boundary(0.6, SHORT, alpha))
    assert 0.8 * alpha < error <= alpha


@pytest.mark.slow
@pytest.mark.parametrize(("p", "samples"), [(0.8572, 9630), (0.9207, 334), (0.9841, 88)])
def test_mean_samples_to_certify(p, samples):
    boundary = sequential.boundary(float(ndtr(1)), LOOKS, 0.001, 0.5)
    certified, _, mean = walk(p, LOOKS, boundary, reach=2500)
    assert certified > 0.999
    assert mean == pytest.approx(samples, rel=0.006)  # p was given with four digits


@pytest.mark.slow
def test_mean_samples_to_give_up():
    boundary, limits = sequential.boundary(0.5, LOOKS, 0.001, 0.5), sequential.futility_boundary(0.5, LOOKS, 1e-3, 0.5)
    _, gave_up, mean = walk(0.45, LOOKS, boundary, limits, reach=2500)
    assert gave_up > 0.9999
    assert mean == pytest.approx(1868, rel=0.001)


@pytest.mark.parametrize("p0", [0.5, 0.7, 0.95, 0.998])
def test_giving_up_loses_no_more_than_its_share_of_beta(p0):
    limits = sequential.futility_boundary(p0, SHORT, 0.01, 0.2)
    never = [n + 1 for n in SHORT]
    before_the_last = (*limits[:-1], -1)
    assert walk(p0, SHORT, never, before_the_last)[1] <= 0.2 * 0.01
    assert walk(p0 - 0.1, SHORT, never, before_the_last)[1] > 0.9  # and it does give up


def test_extreme_probabilities():
    assert sequential.boundary(1.0, (5, 10), 0.1) == (6, 11)  # never
    assert sequential.boundary(0.0, (5, 10), 0.1) == (1, 1)  # one hit refutes p = 0
    assert sequential.futility_boundary(1.0, (5, 10), 0.1) == (4, 9)


@pytest.mark.parametrize(
    ("p0", "looks", "alpha", "early"),
    [
        (-0.1, (5,), 0.1, 0.2),
        (1.1, (5,), 0.1, 0.2),
        (float("nan"), (5,), 0.1, 0.2),
        (0.5, (), 0.1, 0.2),
        (0.5, (0, 5), 0.1, 0.2),
        (0.5, (5, 5), 0.1, 0.2),
        (0.5, (5,), 0.0, 0.2),
        (0.5, (5,), 0.1, 1.2),
    ],
)
def test_wrong_input_is_refused(p0, looks, alpha, early):
    with pytest.raises(InputError):
        sequential.boundary(p0, looks, alpha, early)


@pytest.mark.parametrize("n", [1, 40, 20_000])
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1587, 0.5, 0.9, 0.99995, 1.0])
def test_binomials_are_right_also_in_the_tails(n, p):
    low, mass = sequential._binomial(n, p, 1e-21)
    with mpmath.workdps(40):
        q = mpmath.mpf(p)
        for i in {0, mass.size // 4, mass.size // 2, 3 * mass.size // 4, mass.size - 1}:
            exact = mpmath.binomial(n, low + i) * q ** (low + i) * (1 - q) ** (n - low - i)
            assert mass[i] == pytest.approx(float(exact), rel=1e-11)


# --- nested hypotheses -------------------------------------------------------------------------------------------------------


def test_nested_boundaries_are_monotone_and_still_keep_alpha():
    test = sequential.nested_test(THRESHOLDS, SHORT, 0.001)
    assert test.certify.shape == test.futility.shape == (len(SHORT), len(THRESHOLDS))
    assert (np.diff(test.certify, axis=1) >= 0).all()
    assert (np.diff(test.futility, axis=1) >= 0).all()
    assert (test.futility < test.certify).all()
    assert (test.futility[-1] == test.certify[-1] - 1).all()  # the last look decides everything
    for j, p0 in enumerate(THRESHOLDS):
        assert walk(p0, SHORT, test.certify[:, j])[0] <= 0.001


def test_boundaries_that_cross_are_raised():
    close = (0.502, 0.503)  # the coarse counts make these two boundaries cross
    alone = np.array([sequential.boundary(p0, SHORT, 0.001) for p0 in close])
    assert (alone[1] < alone[0]).any()
    test = sequential.nested_test(close, SHORT, 0.001)
    np.testing.assert_array_equal(test.certify.T, [alone[0], np.maximum(alone[0], alone[1])])


def test_the_cumulative_maximum_costs_little_power():
    test = sequential.nested_test(THRESHOLDS, SHORT, 0.001)
    for j, p0 in enumerate(THRESHOLDS[:-2]):
        p = p0 + 0.15 * (1 - p0)
        alone = walk(p, SHORT, sequential.boundary(p0, SHORT, 0.001))[0]
        assert walk(p, SHORT, test.certify[:, j], test.futility[:, j])[0] > alone - 0.002


def test_misses_that_no_later_look_allows_are_hopeless_at_once():
    test = sequential.nested_test((0.5, 0.9999), SHORT, 0.001)  # .9999^2000 = .8: 2000 samples never certify it
    assert test.not_futile(0, 50) == 1
    test = sequential.nested_test((0.99,), SHORT, 0.001)
    allowed = 2000 - int(test.certify[-1, 0])
    assert all(test.not_futile(look, n - allowed - 1) == 0 for look, n in enumerate(SHORT) if n > allowed)


def test_one_count_decides_a_range_of_thresholds():
    test = sequential.nested_test((0.5, 0.7, 0.9), SHORT, 0.001)
    assert (test.certified(0, 50), test.not_futile(0, 50)) == (2, 3)  # .9^50 = .005 is more than a look may spend
    assert (test.certified(0, 0), test.not_futile(0, 0)) == (0, 0)
    last = len(SHORT) - 1
    for hits in range(0, 2001, 100):
        assert test.certified(last, hits) == test.not_futile(last, hits)


@pytest.mark.parametrize("thresholds", [(), (0.5, 0.5), (0.7, 0.6)])
def test_thresholds_must_increase(thresholds):
    with pytest.raises(InputError):
        sequential.nested_test(thresholds, SHORT, 0.001)
