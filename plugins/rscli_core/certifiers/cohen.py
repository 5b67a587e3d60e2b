"""CERTIFY of Cohen, Rosenfeld & Kolter, ICML 2019 (arXiv 1902.02918), section 3.2.2: one look at n samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from rscli.api import ABSTAIN, Certifier, Decision, Plan, Question
from rscli.stats import bounds, sequential

if TYPE_CHECKING:
    from numpy.typing import NDArray


def candidate(counts: NDArray[np.int64], question: Question) -> int:
    """The class under test: the label if one was asked for, else the most frequent selected class (the lowest on ties).

    `counts` (classes,) of the selection samples. The first step of CERTIFY; raises nothing of its own.
    """
    return int(np.argmax(counts)) if question.label is None else question.label


def fixed_n_decision(hits: int, n: int, candidate: int, alpha: float) -> Decision:
    """The candidate if its lower bound L is at least 1/2 (radius 0 at 1/2 itself), else an abstention; p_b = 1 - L.

    L is the Clopper-Pearson bound from `hits` in `n` samples at error `alpha`: the second step of CERTIFY. Valid only if `n`
    was fixed before any of these samples was seen. Raises InputError unless 0 <= hits <= n, n >= 1 and 0 < alpha < 1.
    """
    bound = bounds.lower(hits, n, alpha)
    if bound < 0.5:
        return Decision(ABSTAIN, bound, 1 - bound, "below-half")
    return Decision(candidate, bound, 1 - bound, "n-reached", saturated=hits == n)


class Cohen(Certifier):
    """CERTIFY: the exact binomial bound from a fixed number of samples."""

    early_abstain: bool = Field(False, description="abstain early for futility, at looks before n; spends no alpha")

    def selection(self, question: Question) -> int:
        """n0 samples to choose the class; none if the question names it."""
        return self.n0 if question.label is None else 0

    def plan(self, counts: NDArray[np.int64], question: Question) -> Plan:
        """One look, at n; before it, with `early_abstain`, those of the sequential test, only to abstain; `counts` (classes,).

        The state maps each of these to the hits at or below which the image is futile (`sequential.futility_boundary` at 1/2:
        an image whose class has probability 1/2 or more is declared futile with probability at most 2e-4). Raises nothing of
        its own.
        """
        if not self.early_abstain:
            return Plan(candidate(counts, question), (self.n,))
        looks = sequential.look_schedule(self.n)
        limits = sequential.futility_boundary(0.5, looks)
        return Plan(candidate(counts, question), looks, dict(zip(looks[:-1], limits, strict=False)))

    def decide(self, counts: NDArray[np.int64], n: int, plan: Plan) -> Decision | None:
        """At n, the exact bound. Before it, an abstention or nothing: no bound is taken from samples that stopped early.

        `counts` (classes,) of the first `n` fresh samples, `n` a look of the plan. Raises InputError if the class has more hits
        than n.
        """
        hits = int(counts[plan.candidate])
        if n == plan.looks[-1]:
            return fixed_n_decision(hits, n, plan.candidate, self.alpha)
        return Decision(ABSTAIN, 0.0, 1.0, "gave-up") if hits <= plan.state[n] else None
