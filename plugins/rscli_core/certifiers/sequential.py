"""An exact group-sequential certificate at given radii: alpha as in CERTIFY, for a small part of the samples.

The test and its references are in `rscli.stats.sequential`. A table asks only whether an image is certified at 0, 0.25, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from rscli.api import ABSTAIN, Certifier, Decision, Plan, Question
from rscli.errors import InputError
from rscli.stats import sequential
from rscli_core.certifiers.cohen import candidate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass
class _Standing:
    """Where an image stands after the looks so far: it changes from look to look, as the test depends on the path.

    Of the thresholds, from the smallest up, the first `certified` are certified, and those from `not_futile` on are futile.
    """

    thresholds: tuple[float, ...]
    test: sequential.NestedTest
    certified: int
    not_futile: int


class Sequential(Certifier):
    """Stops as soon as every wanted radius is certified or futile; needs radii.

    With early = 0, nothing is spent before the last look: until then a radius is certified, or declared futile, only on a count
    that is all but impossible (1e-18 of alpha or futility) at its threshold, or futile if the rest of the samples cannot help.
    """

    grid: ClassVar[bool] = True
    decisive: ClassVar[tuple[str, ...]] = ("early",)
    renamed: ClassVar[Mapping[str, str]] = {"give_up": "futility"}

    early: float = Field(
        sequential.EARLY,
        ge=0,
        le=1,
        description="share of alpha and of futility spent before the last look; 0: an image is stopped early only if the "
        "rest of its samples cannot help, or its count is all but impossible",
    )
    futility: float = Field(
        sequential.FUTILITY,
        gt=0,
        lt=1,
        description="probability of stopping although the radius holds; spends no alpha",
    )
    first_look: int = Field(50, ge=1, description="samples at the first look")
    growth: float = Field(1.2, ge=1.01, description="each look's samples, as a multiple of those at the look before")

    def selection(self, question: Question) -> int:
        """n0 samples to choose the class; none if the question names it."""
        return self.n0 if question.label is None else 0

    def plan(self, counts: NDArray[np.int64], question: Question) -> Plan:
        """Looks that grow geometrically up to n, from the `counts` (classes,) of the selection samples.

        The test is `rscli.stats.sequential.nested_test`, error spending after Lan & DeMets 1983. Raises InputError without
        thresholds, with any below 1/2, or if they do not increase strictly.
        """
        thresholds = question.thresholds
        if not thresholds:
            raise InputError("the sequential certifier decides given radii, but none were given", "As in --radii 0,0.25,0.5.")
        if thresholds[0] < 0.5:
            raise InputError(f"the threshold {thresholds[0]} is below 1/2, where a class need not be the most probable one")
        looks = sequential.look_schedule(self.n, self.first_look, self.growth)
        test = sequential.nested_test(thresholds, looks, self.alpha, self.futility, self.early)
        return Plan(candidate(counts, question), looks, _Standing(thresholds, test, certified=0, not_futile=len(thresholds)))

    def decide(self, counts: NDArray[np.int64], n: int, plan: Plan) -> Decision | None:
        """Decides at the first look that leaves no threshold open; p_a is then the largest certified one.

        `counts` (classes,) of the first `n` fresh samples. `saturated`: all thresholds hold, and more might be proved. Raises
        ValueError if `n` is no look of the plan.
        """
        now: _Standing = plan.state
        look, hits = plan.looks.index(n), int(counts[plan.candidate])
        now.certified = max(now.certified, now.test.certified(look, hits))
        now.not_futile = min(now.not_futile, now.test.not_futile(look, hits))
        if now.certified < now.not_futile:
            return None
        everything = now.certified == len(now.thresholds)
        reason = "all-radii" if everything else "n-reached" if n == plan.looks[-1] else "gave-up"
        if now.certified == 0:
            return Decision(ABSTAIN, 0.0, 1.0, reason)
        proved = now.thresholds[now.certified - 1]
        return Decision(plan.candidate, proved, 1 - proved, reason, saturated=everything, threshold=now.certified - 1)
