"""What is asked about each image of a split, and the row that the answer becomes."""

from __future__ import annotations

import numpy as np

from rscli.api import Certifier, Question
from rscli.data.splits import Split
from rscli.models.modelfile import Model
from rscli.results.rows import Row
from rscli.sampling.requests import CertifierInquiry, Inquiry
from rscli.smoothing.radii import certified_radius


class Images:
    """Makes the inquiry for an image of `split`, and the row from its answer.

    `radii` are those that the certifier decides, if it decides given ones; with `labels`, the class under test is the label.
    """

    def __init__(self, model: Model, certifier: Certifier, split: Split, radii: tuple[float, ...], *, labels: bool) -> None:
        self.noise, self.certifier, self.split, self.labels = model.noise, certifier, split, labels
        self.classes = len(model.card.spec.class_names)
        self.radii = {model.noise.probability(radius): radius for radius in radii}

    def question(self, index: int) -> Question:
        """What the certifier is asked about the image at `index`."""
        return Question(self.classes, tuple(self.radii), int(self.split.labels[index]) if self.labels else None)

    def inquire(self, index: int) -> Inquiry:
        """The inquiry about the image at `index`."""
        return CertifierInquiry(self.certifier, self.question(index), index, lambda: self.split.image(index))

    def row(self, inquiry: CertifierInquiry, seconds: float) -> Row:
        """The row of a finished inquiry."""
        assert inquiry.decision is not None and inquiry.plan is not None and inquiry.counts is not None  # noqa: PT018
        decision, candidate, label = inquiry.decision, inquiry.plan.candidate, int(self.split.labels[inquiry.key])
        return Row(
            idx=inquiry.key,
            label=label,
            predict=decision.predict,
            radius=certified_radius(decision, self.noise, self.radii),
            correct=decision.predict == label,
            seconds=seconds,
            n0=inquiry.n0,
            n=inquiry.n,
            count=int(inquiry.counts[candidate]),
            runner_up=int(np.delete(inquiry.counts, candidate).max(initial=0)),
            reason=decision.reason,
            saturated=decision.saturated,
        )
