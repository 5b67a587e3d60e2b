"""The radius of a decision: certifiers know probabilities, the noise knows radii."""

from __future__ import annotations

from collections.abc import Sequence

from rscli.api import ABSTAIN, Decision, Noise
from rscli.runtime.guard import broken, calling, number


def certified_radius(decision: Decision, noise: Noise, radii: Sequence[float] = ()) -> float:
    """The radius of a decision: 0 for an abstention; exactly one of the wanted `radii`, if these were decided.

    Raises `PluginError` if the noise gives a radius that is negative or not finite.
    """
    if decision.predict == ABSTAIN:
        return 0.0
    if decision.threshold is not None:
        return radii[decision.threshold]
    with calling(noise, "radius"):
        radius = noise.radius(decision.p_a, decision.p_b)
    radius = number(noise, "radius", "a radius", radius)
    if radius < 0:
        raise broken(noise, "radius", f"gave the negative radius {radius}")
    return radius


def threshold_of(noise: Noise, radius: float) -> float:
    """What `p_a` must exceed for a `radius` >= 0. Raises `PluginError` unless the noise says a probability of 1/2 or more."""
    with calling(noise, "probability"):
        threshold = noise.probability(radius)
    threshold = number(noise, "probability", "a threshold", threshold)
    if not 0.5 <= threshold <= 1:
        raise broken(noise, "probability", f"gave {threshold} for the radius {radius}, which must lie in [1/2, 1]")
    return threshold
