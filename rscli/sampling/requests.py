"""What is asked about one image: a conversation of samples wanted, counts received, and at last a decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rscli.api import ABSTAIN, Certifier, Decision, Plan, Question
from rscli.runtime.guard import broken, calling, largest_p_a, number, whole

Counts = NDArray[np.int64]

MOST_SAMPLES = 10**12
"""More selection samples than this are a mistake."""


class Request(Protocol):
    """What is asked about one image; the sampler draws `wanted` samples in all, reports counts, and asks again."""

    @property
    def key(self) -> int:
        """The image's key for its noise."""

    @property
    def wanted(self) -> int:
        """The number of samples, counted from the first, after which `receive` is to be called next."""

    def image(self) -> Tensor:
        """The image (channel, height, width), float32 in [0, 1]."""

    def receive(self, counts: Counts) -> bool:
        """Takes the `counts` (classes,) of the samples since the last reset; True when nothing more is wanted."""

    @property
    def fresh(self) -> bool:
        """Whether the counts are to start again at zero: asked after each `receive`."""


@dataclass
class CertifierRequest:
    """A certifier's conversation about one image: selection samples, then look after look at fresh ones.

    The certifier is given copies of the counts, and what it says is checked: `PluginError` if it breaks its contract.
    """

    certifier: Certifier
    question: Question
    key: int
    load: Callable[[], Tensor]
    n0: int = field(init=False)
    plan: Plan | None = None
    decision: Decision | None = None
    n: int = 0
    counts: Counts | None = None
    fresh: bool = False
    _look: int = 0

    def __post_init__(self) -> None:
        with calling(self.certifier, "selection"):
            wanted = self.certifier.selection(self.question)
        self.n0 = whole(self.certifier, "selection", "samples", wanted, 0, MOST_SAMPLES)
        if self.n0 == 0:
            self._begin(np.zeros(self.question.classes, np.int64))

    @property
    def wanted(self) -> int:
        """The selection samples, or the selection samples and those of the next look."""
        return self.n0 if self.plan is None else self.n0 + self.plan.looks[self._look]

    def image(self) -> Tensor:
        """The image (channel, height, width), loaded when its first samples are drawn."""
        return self.load()

    def receive(self, counts: Counts) -> bool:
        """Takes the `counts` (classes,): selection counts make the plan, counts at a look a decision or the next look."""
        self.fresh = self.plan is None
        if self.plan is None:
            return self._begin(counts)
        self.n = self.plan.looks[self._look]
        self._look += 1
        return self._decide(counts, last=self._look == len(self.plan.looks))

    def _begin(self, counts: Counts) -> bool:
        with calling(self.certifier, "plan"):
            plan = self.certifier.plan(counts.copy(), self.question)
        self.plan = self._checked_plan(plan)
        if self.plan.looks:
            return False
        if self.n0 == 0:
            raise broken(self.certifier, "plan", "wants no samples at all")
        return self._decide(np.zeros_like(counts), last=True)

    def _decide(self, counts: Counts, *, last: bool) -> bool:
        assert self.plan is not None
        self.counts = counts
        with calling(self.certifier, "decide"):
            decision = self.certifier.decide(counts.copy(), self.n, self.plan)
        if decision is None and last:
            raise broken(self.certifier, "decide", f"did not decide at its last look ({self.n})")
        self.decision = None if decision is None else self._checked_decision(decision)
        return self.decision is not None

    def _checked_plan(self, plan: Any) -> Plan:
        certifier = self.certifier
        if not isinstance(plan, Plan) or not isinstance(plan.looks, tuple | list):
            raise broken(certifier, "plan", f"returned {plan!r:.80}, which is not a Plan with looks")
        candidate = whole(certifier, "plan", "candidate", plan.candidate, 0, self.question.classes - 1)
        looks = tuple(whole(certifier, "plan", "look", look, 1, certifier.n) for look in plan.looks)
        if any(b <= a for a, b in pairwise(looks)):
            raise broken(certifier, "plan", f"wants looks that do not increase: {looks}")
        return Plan(candidate, looks, plan.state)

    def _checked_decision(self, said: Any) -> Decision:
        certifier, classes = self.certifier, self.question.classes
        if not isinstance(said, Decision):
            raise broken(certifier, "decide", f"returned {said!r:.80}, which is not a Decision")
        predict = whole(certifier, "decide", "predict", said.predict, ABSTAIN, classes - 1)
        p_a, p_b = (number(certifier, "decide", name, getattr(said, name)) for name in ("p_a", "p_b"))
        for name, value in (("p_a", p_a), ("p_b", p_b)):
            if not 0 <= value <= 1:
                raise broken(certifier, "decide", f"gave {name} = {value}, which is not a probability")
        if not isinstance(said.reason, str) or not isinstance(said.saturated, bool | np.bool_):
            raise broken(certifier, "decide", f"gave reason = {said.reason!r:.40}, saturated = {said.saturated!r:.40}")
        threshold = said.threshold
        if predict != ABSTAIN:
            largest = largest_p_a(certifier, self.n) if self.n else 0.0
            if p_a > largest * (1 + 1e-12):
                raise broken(certifier, "decide", f"gave p_a = {p_a}, but {self.n} samples can give {largest} at most")
            if certifier.grid or threshold is not None:
                threshold = whole(certifier, "decide", "threshold", threshold, 0, len(self.question.thresholds) - 1)
        return Decision(predict, p_a, p_b, said.reason, bool(said.saturated), threshold)
