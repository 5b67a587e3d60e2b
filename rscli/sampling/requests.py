"""What is asked about one image: a conversation of samples wanted, counts received, and at last a decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rscli.api import Certifier, Decision, Plan, Question
from rscli.errors import PluginError

Counts = NDArray[np.int64]


class Inquiry(Protocol):
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
class CertifierInquiry:
    """A certifier's conversation about one image: selection samples, then look after look at fresh ones."""

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
        self.n0 = self.certifier.selection(self.question)
        if self.n0 < 0:
            raise PluginError(f"the certifier {type(self.certifier).__name__} wants {self.n0} selection samples")
        if self.n0 == 0:
            self._begin(np.zeros(self.question.classes, np.int64))

    @property
    def wanted(self) -> int:
        """The selection samples, or the selection samples and those of the next look."""
        return self.n0 if self.plan is None else self.n0 + self.plan.looks[self._look]

    def image(self) -> Tensor:
        """The image, loaded when its first samples are drawn."""
        return self.load()

    def receive(self, counts: Counts) -> bool:
        """Selection counts make the plan; counts at a look make a decision, or lead to the next look."""
        self.fresh = self.plan is None
        if self.plan is None:
            return self._begin(counts)
        self.n, self.counts = self.plan.looks[self._look], counts
        self.decision = self.certifier.decide(counts, self.n, self.plan)
        self._look += 1
        if self.decision is None and self._look == len(self.plan.looks):
            raise PluginError(f"the certifier {type(self.certifier).__name__} did not decide at its last look ({self.n})")
        return self.decision is not None

    def _begin(self, counts: Counts) -> bool:
        self.plan = self.certifier.plan(counts, self.question)
        looks = self.plan.looks
        if any(b <= a for a, b in zip((0, *looks), looks, strict=False)):
            raise PluginError(f"the certifier {type(self.certifier).__name__} wants looks that do not increase: {looks}")
        if not looks and self.n0 == 0:
            raise PluginError(f"the certifier {type(self.certifier).__name__} wants no samples at all")
        if not looks:
            self.counts = np.zeros_like(counts)
            self.decision = self.certifier.decide(self.counts, 0, self.plan)
            if self.decision is None:
                raise PluginError(f"the certifier {type(self.certifier).__name__} wants no more samples, and did not decide")
        return self.decision is not None
