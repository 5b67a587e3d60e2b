"""What a table of certificates says: ACR, certified accuracy, and how far to trust them.

`radius` (images,) holds certified radii >= 0 (0 where the classifier abstained), `correct` (images,) whether the certified
class is the label (never so where it abstained), as in the columns of a result file.
"""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Sequence
from decimal import ROUND_DOWN, Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special

from rscli.errors import InputError
from rscli.stats import bounds

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def checked(radius: ArrayLike, correct: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """`radius` as float64 and `correct` as bool, both (images,); raises InputError unless lengths agree and radii are valid."""
    radii, right = np.asarray(radius, np.float64), np.asarray(correct).astype(bool)
    if radii.ndim != 1 or radii.shape != right.shape or not radii.size:
        raise InputError(f"radius has shape {radii.shape} and correct {right.shape}, but both need one entry for each image")
    wrong = ~(np.isfinite(radii) & (radii >= 0))
    if wrong.any():
        where = int(np.argmax(wrong))
        raise InputError(f"the radius in row {where} is {radii[where]}, but a radius is finite and never negative")
    return radii, right


def acr(radius: ArrayLike, correct: ArrayLike) -> float:
    """Average certified radius (Zhai et al., ICLR 2020, section 5): the mean over all images of radius * correct.

    It depends on n, since n samples certify at most sigma * PhiInv(alpha^(1/n)). Raises InputError (see `checked`).
    """
    radii, right = checked(radius, correct)
    return float(np.mean(radii * right))


def certified_accuracy(radius: ArrayLike, correct: ArrayLike, radii: ArrayLike) -> NDArray[np.float64]:
    """The share of all images that are correct with radius >= r, for each r of `radii` (any shape; the result has the same), in
    [0, 1]. `radius` and `correct` are (images,).

    At r = 0 this counts every image that was answered correctly. Raises InputError (see `checked`).
    """
    certified, right = checked(radius, correct)
    wanted = np.asarray(radii, np.float64)
    held = np.sort(certified[right])
    smaller = np.searchsorted(held, wanted, side="left")
    share: NDArray[np.float64] = (held.size - smaller) / right.size
    return share


def certified_interval(count: int, images: int, level: float = 0.95) -> tuple[float, float]:
    """The Clopper-Pearson interval of a certified accuracy: `count` of `images` certified, at confidence `level`.

    It covers the sampling of the test images only. Raises InputError unless 0 <= count <= images, images >= 1, 0 < level < 1.
    """
    return bounds.interval(count, images, level)


def round_down(radius: float | str, digits: int) -> float:
    """`radius` cut, never rounded up, to `digits` decimal digits: a certificate that is shortened must still hold.

    Works on the shortest decimal text of the number, so that 0.29 (which floats hold as 0.28999...) stays 0.29 and 1.2361
    becomes 1.23. Raises InputError when `radius` is no finite number >= 0 or `digits` is negative.
    """
    if digits < 0:
        raise InputError(f"digits is {digits}, but it must be 0 or more")
    try:
        exact = Decimal(radius if isinstance(radius, str) else repr(float(radius)))
    except ArithmeticError:
        exact = Decimal("NaN")
    if not exact.is_finite() or exact < 0:
        raise InputError(f"{radius!r} is not a radius: a finite number, 0 or more")
    return float(exact.quantize(Decimal(1).scaleb(-digits), rounding=ROUND_DOWN))


def wrong_certificates(m: int, alpha: float, rho: float) -> int:
    """How many of `m` certificates may be wrong at confidence 1 - rho: BinomQuantile(1 - rho; m, alpha).

    Each certificate errs with probability at most `alpha`, independently of the others, so the count of wrong ones is at most
    binomial. 4 for m = 500, alpha = rho = .001. Raises InputError unless m >= 0 and alpha, rho are in (0, 1).
    """
    bounds.check_alpha(alpha)
    bounds.check_alpha(rho, "rho")
    if m < 0:
        raise InputError(f"m is {m}, but the number of certificates is 0 or more")
    # The quantile is the first count whose upper tail P(X > count) = I_alpha(count + 1, m - count) is at most rho.
    return bisect.bisect_left(range(m), True, key=lambda count: bool(special.betainc(count + 1, m - count, alpha) <= rho))


def mean_sd(values: Sequence[float] | NDArray[Any]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation (n - 1 in the denominator) of `values` (runs,); None for the latter if there
    is one run.

    Raises InputError when there is no value.
    """
    numbers = [float(value) for value in values]
    if not numbers:
        raise InputError("no values to average", "give at least one run")
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None
