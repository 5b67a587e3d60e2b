"""Comparing two models on the *same* images: exact McNemar tests with Holm's correction, and a paired bootstrap for ACR.

Arrays are (images,), row i of both models about the same image; `first` and `second` are two models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rscli.errors import InputError
from rscli.stats import bounds, metrics

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_DRAWS_AT_ONCE = 2_000_000
"""Bootstrap indices held in memory at a time (16 MB)."""


@dataclass(frozen=True)
class RadiusTest:
    """The comparison at one radius: images that only one of the two certifies, the p-value, and Holm's adjusted p-value."""

    radius: float
    only_first: int
    only_second: int
    p_value: float
    adjusted: float


@dataclass(frozen=True)
class AcrDifference:
    """ACR of the first model minus that of the second, with a confidence interval."""

    difference: float
    low: float
    high: float


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided McNemar p-value (McNemar 1947) from the images that exactly one model certifies; 1 if none.

    Under the null hypothesis each of them is equally likely to be either's: a binomial at 1/2. Raises InputError if negative.
    """
    return bounds.top_two_p_value(only_first, only_second)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down adjusted p-values (Scand. J. Statist. 1979), in the order given; any dependence is allowed.

    Raises InputError unless `p_values` (tests,) lie in [0, 1].
    """
    p = np.asarray(p_values, np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise InputError(f"p-values {p.tolist()}: a list of numbers between 0 and 1 is needed")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


def _pair(
    radius_first: ArrayLike, correct_first: ArrayLike, radius_second: ArrayLike, correct_second: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64], NDArray[np.bool_]]:
    """Both models' columns, checked; a paired test needs the same images."""
    a, a_right = metrics.checked(radius_first, correct_first)
    b, b_right = metrics.checked(radius_second, correct_second)
    if a.size != b.size:
        raise InputError(
            f"one model has {a.size} images and the other {b.size}, but a paired comparison needs the same images",
            "align both by image index first",
        )
    return a, a_right, b, b_right


def compare_radii(
    radius_first: ArrayLike,
    correct_first: ArrayLike,
    radius_second: ArrayLike,
    correct_second: ArrayLike,
    radii: Sequence[float],
) -> list[RadiusTest]:
    """Certified accuracy compared at each of `radii`: exact McNemar, adjusted over the radii by Holm.

    Raises InputError when the columns are invalid or of different lengths.
    """
    a, a_right, b, b_right = _pair(radius_first, correct_first, radius_second, correct_second)
    counts = []
    for r in radii:
        by_first, by_second = a_right & (a >= r), b_right & (b >= r)
        counts.append((int((by_first & ~by_second).sum()), int((by_second & ~by_first).sum())))
    p_values = [mcnemar(*pair) for pair in counts]
    return [
        RadiusTest(float(r), only_first, only_second, p, float(adjusted))
        for r, (only_first, only_second), p, adjusted in zip(radii, counts, p_values, holm(p_values), strict=True)
    ]


def compare_acr(
    radius_first: ArrayLike,
    correct_first: ArrayLike,
    radius_second: ArrayLike,
    correct_second: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> AcrDifference:
    """The difference of ACR (first minus second) with a paired percentile-bootstrap interval (Efron 1979) at `level`.

    Images are drawn with replacement, both models' rows together; the same `seed` gives the same interval. Raises InputError
    when the columns are invalid or of different lengths, `level` is outside (0, 1) or `resamples` is less than 1.
    """
    from scipy.stats import bootstrap

    bounds.check_alpha(level, "level")
    if resamples < 1:
        raise InputError(f"resamples is {resamples}, but at least 1 is needed", "10000 is usual")
    a, a_right, b, b_right = _pair(radius_first, correct_first, radius_second, correct_second)
    gain = a * a_right - b * b_right
    if gain.size < 2 or np.ptp(gain) == 0:
        return AcrDifference(float(gain.mean()), float(gain.mean()), float(gain.mean()))
    found = bootstrap(
        (gain,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _DRAWS_AT_ONCE // gain.size),
        confidence_level=level,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    low, high = found.low, found.high
    return AcrDifference(float(gain.mean()), float(low), float(high))
