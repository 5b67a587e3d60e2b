"""The radius of a decision: certifiers know probabilities, the noise knows radii."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rscli.api import ABSTAIN, Decision, Noise
from rscli.errors import PluginError


def certified_radius(decision: Decision, noise: Noise, radii: Sequence[float] = ()) -> float:
    """The radius of a decision: 0 for an abstention; exactly one of the wanted `radii`, if these were decided.

    Raises `PluginError` if the noise gives a radius that is negative or not finite.
    """
    if decision.predict == ABSTAIN:
        return 0.0
    radius = noise.radius(decision.p_a, decision.p_b) if decision.threshold is None else radii[decision.threshold]
    if not (math.isfinite(radius) and radius >= 0):
        raise PluginError(f"the noise {type(noise).__name__} gave the radius {radius}; it must be finite and not negative")
    return radius
