"""CERTIFY of Cohen, Rosenfeld & Kolter, ICML 2019 (arXiv 1902.02918), section 3.2.2: one look at n samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rscli.api import ABSTAIN, Certifier, Decision, Plan, Question
from rscli.stats import bounds

if TYPE_CHECKING:
    from numpy.typing import NDArray


def candidate(counts: NDArray[np.int64], question: Question) -> int:
    """The class under test: the label if one was asked for, else the most frequent selected class (the lowest on ties)."""
    return int(np.argmax(counts)) if question.label is None else question.label


class Cohen(Certifier):
    """CERTIFY: the exact binomial bound from a fixed number of samples."""

    def selection(self, question: Question) -> int:
        """n0 samples to choose the class; none if the question names it."""
        return self.n0 if question.label is None else 0

    def plan(self, counts: NDArray[np.int64], question: Question) -> Plan:
        """One look, at n."""
        return Plan(candidate(counts, question), (self.n,))

    def decide(self, counts: NDArray[np.int64], n: int, plan: Plan) -> Decision:
        """The class if its lower bound L is at least 1/2 (radius 0 at 1/2 itself), else an abstention; p_b = 1 - L."""
        hits = int(counts[plan.candidate])
        bound = bounds.lower(hits, n, self.alpha)
        if bound < 0.5:
            return Decision(ABSTAIN, bound, 1 - bound, "below-half")
        return Decision(plan.candidate, bound, 1 - bound, "n-reached", saturated=hits == n)
