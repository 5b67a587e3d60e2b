"""CERTIFY with a number of samples chosen for each image by a pilot, for a wanted relative loss of radius.

The idea of input-specific sampling (Chen et al., AAAI 2022, arXiv 2112.12084), in a form of our own. The pilot is the selection
samples; the certificate counts fresh samples only, whose number is fixed before the first of them is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from rscli.api import ABSTAIN, Certifier, Decision, Plan, Question
from rscli.stats import bounds, sequential
from rscli_core.certifiers.cohen import candidate, fixed_n_decision

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STEP = 1.05
"""The sizes that the pilot chooses from are 5 % apart."""


class TwoStage(Certifier):
    """A pilot chooses how many samples (at most n) an image is worth."""

    decisive: ClassVar[tuple[str, ...]] = ("radius_tolerance",)
    renamed: ClassVar[Mapping[str, str]] = {"loss": "radius_tolerance"}

    n0: int = Field(1000, ge=1, description="pilot samples per image: they choose its class and its number of samples")
    radius_tolerance: float = Field(
        0.05, gt=0, lt=1, description="accepted loss of radius, relative to the radius that n samples would give"
    )

    def plan(self, counts: NDArray[np.int64], question: Question) -> Plan:
        """One look, at the smallest size whose expected radius is at least (1 - radius_tolerance) of the one expected at n.

        `counts` (classes,) of the pilot's n0 samples; raises InputError if that of the class is above n0.
        Expected: the bound at the pilot's share of hits. No look at all (abstain) where the pilot already shows, at error
        alpha, that the class is below 1/2; all n samples where it is too close to 1/2 to tell. Neither touches the error.
        """
        tested = candidate(counts, question)
        hits = int(counts[tested])
        if bounds.upper(hits, self.n0, self.alpha) < 0.5:
            return Plan(tested, ())
        return Plan(tested, (self._enough(hits / self.n0),))

    def _enough(self, share: float) -> int:
        """The smallest size that keeps the wanted part of the radius, if `share` of the samples are hits."""
        from scipy.special import ndtri

        sizes = np.array(sequential.look_schedule(self.n, growth=_STEP))
        radii = ndtri(np.maximum(bounds.lower(np.floor(share * sizes), sizes, self.alpha), 0.5))  # in sigma
        return int(sizes[np.argmax(radii >= (1 - self.radius_tolerance) * radii[-1])]) if radii[-1] > 0 else self.n

    def decide(self, counts: NDArray[np.int64], n: int, plan: Plan) -> Decision:
        """The exact bound at the chosen size, as CERTIFY; an abstention if the pilot left no hope.

        `counts` (classes,) of the first `n` fresh samples. Raises InputError if the class has more hits than n.
        """
        if not plan.looks:
            return Decision(ABSTAIN, 0.0, 1.0, "gave-up")
        return fixed_n_decision(int(counts[plan.candidate]), n, plan.candidate, self.alpha)
