"""A radius from both bounds of Cohen et al. 2019 (arXiv 1902.02918, theorem 1): p_A from below and the runner-up from above.

CERTIFY replaces the runner-up's bound by 1 - p_A. With a bound of its own, images with p_A < 1/2 can be certified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from rscli.api import ABSTAIN, Certifier, Decision, Plan, Question
from rscli.stats import bounds
from rscli_core.certifiers.cohen import candidate

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TwoSided(Certifier):
    """One look at n, with an upper bound on the runner-up; compare only with its own kind."""

    decisive: ClassVar[tuple[str, ...]] = ("alpha_split",)
    renamed: ClassVar[Mapping[str, str]] = {"share": "alpha_split"}

    alpha_split: float = Field(0.9, gt=0, lt=1, description="part of alpha spent on the lower bound, the rest on the upper one")

    def selection(self, question: Question) -> int:
        """n0 samples to choose the class; none if the question names it."""
        return self.n0 if question.label is None else 0

    def plan(self, counts: NDArray[np.int64], question: Question) -> Plan:
        """One look, at n, from the `counts` (classes,) of the selection samples; raises nothing of its own."""
        return Plan(candidate(counts, question), (self.n,))

    def decide(self, counts: NDArray[np.int64], n: int, plan: Plan) -> Decision:
        """p_a = L(n_A), p_b = min(U(largest other count), 1 - p_a); abstains unless p_a > p_b; `counts` (classes,).

        L and U are the Clopper-Pearson bounds, at `alpha_split` of alpha and at the rest. Two events suffice however many
        classes there are: U increases in the count, and the largest observed count is at least that of the true runner-up. The
        index of the runner-up is never used. Raises InputError if a count is above `n`.
        """
        hits, runner_up = int(counts[plan.candidate]), int(np.delete(counts, plan.candidate).max(initial=0))
        p_a = bounds.lower(hits, n, self.alpha_split * self.alpha)
        p_b = min(bounds.upper(runner_up, n, (1 - self.alpha_split) * self.alpha), 1 - p_a)
        if p_a <= p_b:
            return Decision(ABSTAIN, p_a, p_b, "no-gap")
        return Decision(plan.candidate, p_a, p_b, "n-reached", saturated=hits == n)
