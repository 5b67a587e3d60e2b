"""Exact group-sequential tests of a probability: certify early, stop for futility, and spend alpha once.

The null hypothesis is p <= p0. Looks happen at fixed cumulative sample counts n_1 < ... < n_K; the test certifies p > p0 at the
first look whose count of hits A_k reaches the boundary b_k. Boundaries come from error spending (Lan & DeMets, Biometrika
1983) with the exact distribution in place of the normal one:

    D_k = (D_{k-1} below b_{k-1}) convolved with Bin(n_k - n_{k-1}, p0)      the paths that have not stopped, under p = p0
    b_k = the smallest b for which P_{D_k}(A_k >= b) fits into the error that may be spent by look k, less what was spent

so that P(A_k >= b_k for some k) <= alpha at p0, and at every p < p0, since A is stochastically increasing in p.

Stopping for futility costs no error, as abstaining is always sound: the boundaries above are computed as if nobody ever did.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from rscli.errors import InputError
from rscli.stats.bounds import check_alpha

if TYPE_CHECKING:
    from numpy.typing import NDArray

EARLY = 0.2
"""The share of alpha spent before the last look: keeps the certified accuracy of a fixed n within 0.15 points."""

FUTILITY = 1e-3
"""The probability, at p0 itself, of stopping for futility what might have been certified; at most EARLY of it is ever spent."""

_ROUNDING = 1e-9
"""The part of alpha kept back for rounding (relative error of the sums below, about 1e-13) and for what `_CUT` drops."""

_CUT = 1e-18
"""What a window may leave out of a distribution, as a part of alpha."""

_BLOCK = 8192
"""Convolution kernels are cut to this length: for longer dot products OpenBLAS starts threads, a hundred times slower when
the processors are busy."""


# --- one hypothesis ----------------------------------------------------------------------------------------------------------


def look_schedule(n: int, first: int = 50, growth: float = 1.2) -> tuple[int, ...]:
    """The looks `first`, then `growth` times the one before, rounded up, as long as they are below `n`, and then `n` itself.

    Raises InputError unless n >= 1, first >= 1 and growth >= 1.01 (below that there would be a look at nearly every sample).
    """
    if n < 1 or first < 1 or not growth >= 1.01:
        raise InputError(f"n = {n}, first look {first}, growth {growth}: n and the first look are at least 1, the growth 1.01")
    looks, size = [], first
    while size < n:
        looks.append(size)
        size = math.ceil(size * growth)
    return (*looks, n)


def _window(n: int, p: float, cut: float) -> tuple[int, int]:
    """Counts low..high that Bin(n, p) leaves with probability at most `cut` (Bernstein's inequality, both sides)."""
    c = math.log(2 / cut)
    reach = c / 3 + math.sqrt(c * c / 9 + 2 * c * n * p * (1 - p))
    return max(0, math.floor(n * p - reach)), min(n, math.ceil(n * p + reach))


def _binomial(n: int, p: float, cut: float) -> tuple[int, NDArray[np.float64]]:
    """Bin(n, p) on its window: the first count, and the probabilities from there on.

    Built by the ratios of neighbours from the mode outwards: relative error about 1e-13 also in the tails, where
    exp(gammaln(...)) has 1e-10. Large p are mirrored, so that 1 - p is never rounded away.
    """
    if p > 0.5:
        low, mass = _binomial(n, 1 - p, cut)
        return n - low - mass.size + 1, mass[::-1]
    low, high = _window(n, p, cut)
    mode, odds = int((n + 1) * p), p / (1 - p)
    up, down = np.arange(mode, high), np.arange(mode, low, -1)
    rising = np.cumprod((n - up) / (up + 1) * odds)
    falling = np.cumprod(down / (n - down + 1) / odds) if down.size else np.empty(0)
    mass = np.concatenate([falling[::-1], [1.0], rising])
    return low, mass / mass.sum()


def _convolve(alive: NDArray[np.float64], step: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distribution of a sum, by direct convolution: an FFT errs by 1e-16 of the largest term, which drowns the tails."""
    out = np.zeros(alive.size + step.size - 1)
    for start in range(0, step.size, _BLOCK):
        part = np.convolve(alive, step[start : start + _BLOCK])
        out[start : start + part.size] += part
    return out


def _spend(p0: float, looks: tuple[int, ...], alpha: float, early: float) -> list[int]:
    """The boundaries b_k; n_k + 1 where not even unanimous samples suffice. The recursion of the module's docstring."""
    cut, total = alpha * _CUT, alpha * (1 - _ROUNDING)
    low, alive = 0, np.ones(1)
    spent, before = 0.0, 0
    boundary = []
    for number, n in enumerate(looks, start=1):
        shift, step = _binomial(n - before, p0, cut)
        first, last = _window(n, p0, cut)
        alive, low = _convolve(alive, step), low + shift
        alive, low = alive[max(0, first - low) : last - low + 1], max(low, first)
        budget = total if number == len(looks) else total * early * number / (len(looks) - 1)
        tail = np.cumsum(alive[::-1])[::-1]  # tail[i] = P(A_k >= low + i), summed from the small terms up
        kept = int(np.count_nonzero(tail > budget - spent))
        boundary.append(low + kept)
        spent += float(tail[kept]) if kept < tail.size else 0.0
        alive, before = alive[:kept], n
    return boundary


@lru_cache(maxsize=4096)
def boundary(p0: float, looks: tuple[int, ...], alpha: float, early: float = EARLY) -> tuple[int, ...]:
    """b_k for each of `looks`: p > p0 may be certified at the first look with at least b_k hits, at error `alpha` in all.

    Lan & DeMets 1983, with the exact distribution (see above); `looks` are cumulative samples. `early` of alpha is spent evenly
    over the looks before the last, the rest on the last; at 0 the looks before the last certify only by counts that are all
    but impossible at p0 (`_CUT` of alpha). b_k = n_k + 1 means never at that look. Exact in float64 and rounded to the safe
    side; kept in memory. Raises InputError unless p0 is in [0, 1], looks increase strictly from at
    least 1, alpha is in (0, 1) and early in [0, 1].
    """
    check_alpha(alpha)
    if not 0 <= p0 <= 1:
        raise InputError(f"the tested probability is {p0}, but it lies in [0, 1]")
    if not 0 <= early <= 1:
        raise InputError(f"early is {early}, but it is a share of alpha, in [0, 1]", f"{EARLY} is the default")
    if not looks or looks[0] < 1 or any(b <= a for a, b in pairwise(looks)):
        raise InputError(f"the looks {looks} must increase strictly, from 1 or more")
    return tuple(_spend(p0, looks, alpha, early))


def futility_boundary(p0: float, looks: tuple[int, ...], beta: float = FUTILITY, early: float = EARLY) -> tuple[int, ...]:
    """a_k for each of `looks`: p > p0 is futile at the first look with at most a_k hits (-1: never at that look).

    The mirror image of `boundary`, of the misses at error `beta`: whoever has p >= p0 is stopped before the last look with
    probability at most early * beta. Nothing of alpha is spent, as abstaining is always sound. Raises as `boundary` does.
    """
    return tuple(n - misses for n, misses in zip(looks, boundary(1 - p0, looks, beta, early), strict=True))


# --- nested hypotheses -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NestedTest:
    """Boundaries for increasing thresholds p0: at look k, threshold j is certified by >= `certify[k, j]` hits and futile at
    <= `futility[k, j]` hits. Both arrays are (looks, thresholds), int64, non-decreasing along each row.
    """

    looks: tuple[int, ...]
    certify: NDArray[np.int64]
    futility: NDArray[np.int64]

    def certified(self, look: int, hits: int) -> int:
        """How many of the thresholds, from the smallest up, `hits` certify at look number `look` (from 0).

        Raises IndexError if there is no such look.
        """
        return int(np.searchsorted(self.certify[look], hits, side="right"))

    def not_futile(self, look: int, hits: int) -> int:
        """How many of the thresholds, from the smallest up, are not futile with `hits` at look number `look` (from 0).

        Raises IndexError if there is no such look.
        """
        return int(np.searchsorted(self.futility[look], hits, side="left"))


@lru_cache(maxsize=64)
def nested_test(
    thresholds: tuple[float, ...],
    looks: tuple[int, ...],
    alpha: float,
    beta: float = FUTILITY,
    early: float = EARLY,
) -> NestedTest:
    """Tests of p > p0 for all `thresholds` at once, each at the full `alpha`.

    The hypotheses are nested, so the cumulative maximum of the boundaries over increasing p0 needs no further correction: let
    p0 be the smallest threshold >= p. Any wrong certificate, at whatever threshold, reaches the boundary of p0, which happens
    with probability at most alpha. Besides the mirrored boundary, a threshold is futile as soon as the misses exceed what
    every later look would allow (curtailment: this loses nothing). Raises InputError unless thresholds increase strictly, and
    as `boundary` does.
    """
    if not thresholds or any(b <= a for a, b in pairwise(thresholds)):
        raise InputError(f"the thresholds {thresholds} must increase strictly, and be at least one")
    sizes = np.array(looks, np.int64)[:, None]
    upper = np.array([boundary(p0, looks, alpha, early) for p0 in thresholds], np.int64).T
    lower = np.array([futility_boundary(p0, looks, beta, early) for p0 in thresholds], np.int64).T
    certify = np.maximum.accumulate(upper, axis=1)
    futility = np.maximum.accumulate(np.maximum(lower, sizes - 1 - _misses_allowed_later(sizes - certify)), axis=1)
    return NestedTest(looks, certify, np.minimum(futility, certify - 1))


def _misses_allowed_later(allowed: NDArray[np.int64]) -> NDArray[np.int64]:
    """The most misses with which any look after this one still certifies; -1 for none, as after the last look."""
    later = np.maximum.accumulate(allowed[::-1], axis=0)[::-1]
    return np.concatenate([later[1:], np.full_like(later[:1], -1)])
