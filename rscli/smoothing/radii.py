"""Between probabilities, which certifiers know, and radii, which the noise knows."""

from __future__ import annotations

import itertools

from rscli.api import Certifier, Noise
from rscli.errors import InputError
from rscli.results.radius import threshold_of
from rscli.runtime.guard import largest_p_a

GRID_STEP = 0.25
"""Distance of the radii of the default grid, in [0, 1] pixels: the field's tables have these."""


def decided_radii(certifier: Certifier, noise: Noise, asked: tuple[float, ...]) -> tuple[float, ...]:
    """The radii to decide: those asked for, or a grid up to what n samples can prove; none if the certifier takes none."""
    if not certifier.grid:
        if asked:
            name = type(certifier).__name__
            hint = "Leave the radii out, or choose a certifier of given radii: `rscli plugins` lists them."
            raise InputError(f"the certifier {name} certifies the largest radius that it can, and takes no radii", hint)
        return ()
    return asked or grid_radii(certifier, noise)


def grid_radii(certifier: Certifier, noise: Noise) -> tuple[float, ...]:
    """0, 0.25, 0.5, ... as far as n unanimous samples can prove."""
    largest = largest_p_a(certifier, certifier.n)
    grid = (place * GRID_STEP for place in itertools.count())
    return tuple(itertools.takewhile(lambda radius: threshold_of(noise, radius) < largest, grid))
