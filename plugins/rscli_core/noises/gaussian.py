"""Gaussian smoothing: the L2 certificate of Cohen, Rosenfeld & Kolter, ICML 2019 (arXiv 1902.02918), theorem 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from rscli.api import Noise
from rscli.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Gaussian(Noise):
    """Isotropic Gaussian noise, certifying L2 balls."""

    norm: ClassVar[str] = "L2"

    def sample(self, shape: Sequence[int], *, generator: torch.Generator, device: torch.device) -> Tensor:
        """sigma * N(0, I), float32, of `shape` on `device`, drawn with `generator` (which lives on the same device)."""
        import torch

        return torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32) * self.sigma

    def radius(self, p_a: float, p_b: float) -> float:
        """sigma/2 * (PhiInv(p_a) - PhiInv(p_b)), at least 0 (equation 3 of the paper); in units of sigma.

        With `p_b = 1 - p_a` this is sigma * PhiInv(p_a), to the last bit: for p_a >= 1/2 the float `1 - p_a` is exact and
        PhiInv is computed antisymmetrically, so nothing is lost in the tail. Finitely many samples never give p_a = 1 or
        p_b = 0, whose radius would be infinite: InputError, as for anything outside [0, 1].
        """
        from scipy.special import ndtri

        if not (0 <= p_a <= 1 and 0 <= p_b <= 1):
            raise InputError(f"p_a = {p_a} and p_b = {p_b}: bounds on probabilities lie in [0, 1]")
        if p_a <= p_b:
            return 0.0
        if p_a == 1 or p_b == 0:
            raise InputError(
                f"p_a = {p_a} and p_b = {p_b} would certify an infinite radius, which no number of samples can",
                "a lower bound stays below 1 and an upper bound above 0",
            )
        return self.sigma / 2 * float(ndtri(p_a) - ndtri(p_b))

    def probability(self, radius: float) -> float:
        """What p_a must exceed for `radius` >= 0 (units of sigma) if p_b = 1 - p_a: Phi(radius / sigma), 1/2 at 0.

        Rounded up, by a few units in the last place, so that `self.radius(p, 1 - p) >= radius` holds in floats too. Beyond
        about 8 sigma it is 1.0, which no bound exceeds. Raises InputError if the radius is negative or not finite.
        """
        from scipy.special import ndtr

        if not (math.isfinite(radius) and radius >= 0):
            raise InputError(f"the radius is {radius}, but it must be finite and 0 or more")
        p = float(ndtr(radius / self.sigma))
        while p < 1 and self.radius(p, 1 - p) < radius:
            p = math.nextafter(p, 1)
        return p
