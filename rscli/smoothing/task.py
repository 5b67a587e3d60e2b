"""What is asked about each image, and the certificate that the answer becomes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from torch import Tensor

from rscli.api import Certificate, Certifier, Question
from rscli.models.smoothed import Smoothed
from rscli.results.radius import certified_radius, threshold_of
from rscli.results.rows import Row
from rscli.sampling.requests import CertifierRequest, Request


class CertificationTask:
    """Makes the request for the image at an index, and the certificate from its answer.

    `image` gives the image at an index, float32 (channel, height, width) in [0, 1] on the CPU. `radii` are those that the
    certifier decides, if it decides given ones; with `label`, the class under test is the one that it gives.
    """

    def __init__(
        self,
        model: Smoothed,
        certifier: Certifier,
        image: Callable[[int], Tensor],
        radii: tuple[float, ...] = (),
        label: Callable[[int], int] | None = None,
    ) -> None:
        self.model, self.certifier, self.image, self.radii, self.label = model, certifier, image, radii, label
        self.thresholds = tuple(threshold_of(model.noise, radius) for radius in radii)

    def question(self, index: int) -> Question:
        """What the certifier is asked about the image at `index`."""
        label = None if self.label is None else int(self.label(index))
        return Question(self.model.classes, self.thresholds, label)

    def request_for(self, index: int) -> Request:
        """The request about the image at `index`, which is the key of its noise."""
        return CertifierRequest(self.certifier, self.question(index), index, partial(self.image, index))

    def certificate(self, request: CertifierRequest) -> Certificate:
        """The certificate of a finished request."""
        assert request.decision is not None and request.plan is not None and request.counts is not None  # noqa: PT018
        decision = request.decision
        return Certificate(
            index=request.key,
            predict=decision.predict,
            radius=certified_radius(decision, self.model.noise, self.radii),
            p_a=decision.p_a,
            p_b=decision.p_b,
            n0=request.n0,
            n=request.n,
            counts=request.counts,
            candidate=request.plan.candidate,
            reason=decision.reason,
            saturated=decision.saturated,
        )


def row_of(certificate: Certificate, label: int, seconds: float) -> Row:
    """The row of a result file that says what was certified of an image with this `label`."""
    counts, candidate = certificate.counts, certificate.candidate
    return Row(
        idx=certificate.index,
        label=label,
        predict=certificate.predict,
        radius=certificate.radius,
        correct=certificate.predict == label,
        seconds=seconds,
        n0=certificate.n0,
        n=certificate.n,
        count=int(counts[candidate]),
        runner_up=int(np.delete(counts, candidate).max(initial=0)),
        reason=certificate.reason,
        saturated=certificate.saturated,
    )
