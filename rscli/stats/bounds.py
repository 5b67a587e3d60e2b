"""Exact confidence bounds on a probability from a count of samples (Clopper & Pearson, Biometrika 1934), in float64.

One-sided bounds at error `alpha`, for `k` hits in `n` independent samples:

    L(k, n, alpha) = BetaInv(alpha; k, n - k + 1),      L(0) = 0,  L(n) = alpha^(1/n)
    U(k, n, alpha) = BetaInv(1 - alpha; k + 1, n - k),  U(n) = 1,  U(0) = 1 - alpha^(1/n)

The extreme counts use the closed forms on the right; at k = 0 and k = n one parameter of the Beta distribution would be 0. The
upper bound uses the complementary inverse, which needs no `1 - alpha`. Relative error at most about 1e-12 up to n = 1e7.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from scipy import special

from rscli.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def check_alpha(alpha: float, name: str = "alpha") -> None:
    """Raises InputError unless `alpha`, called `name` in the message, lies strictly between 0 and 1."""
    if not 0 < alpha < 1:
        raise InputError(f"{name} is {alpha}, but an error probability lies between 0 and 1", f"the field uses {name} = 0.001")


def _checked(k: Any, n: Any, alpha: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`k` and `n` as float64 arrays of one shape; counts up to 2^53 are exact."""
    check_alpha(alpha)
    hits, samples = np.broadcast_arrays(np.asarray(k, np.float64), np.asarray(n, np.float64))
    for text, wrong in (
        ("fewer than 1 sample", ~(samples >= 1)),
        ("a negative count", ~(hits >= 0)),
        ("more hits than samples", hits > samples),
        ("a count that is no whole number", (hits % 1 != 0) | (samples % 1 != 0)),
    ):
        if wrong.any():
            where = int(np.argmax(wrong))
            raise InputError(
                f"{hits.flat[where]:g} hits in {samples.flat[where]:g} samples: {text}",
                "whole numbers with 0 <= k <= n, n >= 1",
            )
    return hits, samples


def _plain(bound: NDArray[np.float64]) -> Any:
    """A float for a scalar question, the array for an array."""
    return float(bound) if bound.ndim == 0 else bound


@overload
def lower(k: int, n: int, alpha: float) -> float: ...
@overload
def lower(k: NDArray[Any], n: int | NDArray[Any], alpha: float) -> NDArray[np.float64]: ...
def lower(k: int | NDArray[Any], n: int | NDArray[Any], alpha: float) -> float | NDArray[np.float64]:
    """The one-sided lower bound L(k, n, alpha) in [0, 1): for every p, P(p < L) <= alpha (Clopper & Pearson 1934).

    `k` hits in `n` samples: scalars, for a float, or arrays that broadcast, for a float64 array of their common shape. Raises
    InputError unless 0 <= k <= n, n >= 1, 0 < alpha < 1.
    """
    hits, samples = _checked(k, n, alpha)
    inner = special.betaincinv(np.maximum(hits, 1), samples - hits + 1, alpha)
    unanimous = np.exp(math.log(alpha) / samples)
    result: float | NDArray[np.float64] = _plain(np.where(hits == 0, 0.0, np.where(hits == samples, unanimous, inner)))
    return result


@overload
def upper(k: int, n: int, alpha: float) -> float: ...
@overload
def upper(k: NDArray[Any], n: int | NDArray[Any], alpha: float) -> NDArray[np.float64]: ...
def upper(k: int | NDArray[Any], n: int | NDArray[Any], alpha: float) -> float | NDArray[np.float64]:
    """The one-sided upper bound U(k, n, alpha) in (0, 1]: for every p, P(p > U) <= alpha (Clopper & Pearson 1934).

    `k` hits in `n` samples: scalars, for a float, or arrays that broadcast, for a float64 array of their common shape. Raises
    InputError unless 0 <= k <= n, n >= 1, 0 < alpha < 1.
    """
    hits, samples = _checked(k, n, alpha)
    inner = special.betainccinv(hits + 1, np.maximum(samples - hits, 1), alpha)
    never = -np.expm1(math.log(alpha) / samples)
    result: float | NDArray[np.float64] = _plain(np.where(hits == samples, 1.0, np.where(hits == 0, never, inner)))
    return result


def interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The two-sided Clopper-Pearson interval (low, high) at confidence `level`: half of the error on each side.

    `k` hits in `n` samples. Raises InputError unless 0 <= k <= n, n >= 1 and 0 < level < 1.
    """
    check_alpha(level, "level")
    side = (1 - level) / 2
    return lower(k, n, side), upper(k, n, side)


def top_two_p_value(c1: int, c2: int) -> float:
    """The two-sided binomial p-value of `c1` hits in `c1 + c2` at 1/2 (PREDICT: Cohen et al. 2019, section 3.2.1).

    The distribution is symmetric, so this is twice the larger tail, at most 1. Raises InputError on a negative count.
    """
    if min(c1, c2) < 0:
        raise InputError(f"the counts of the top two classes are {c1} and {c2}, but a count is never negative")
    more, fewer = max(c1, c2), min(c1, c2)
    if more == fewer:
        return 1.0
    return min(1.0, 2 * float(special.betainc(more, fewer + 1, 0.5)))  # P(Bin(c1 + c2, 1/2) >= more)


def smallest_n_for(alpha: float) -> int:
    """The fewest samples with which PREDICT can answer at `alpha`: a unanimous vote has p-value 2^(1 - n) (11 at .001).

    Raises InputError unless 0 < alpha < 1.
    """
    check_alpha(alpha)
    n = 2
    while math.ldexp(1.0, 1 - n) > alpha:
        n += 1
    return n
