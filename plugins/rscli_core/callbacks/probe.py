"""Certified accuracy of held-out images while training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from rscli.api import Callback, Run, unit
from rscli.errors import InputError
from rscli_core.callbacks._held_out import SPLIT, accuracies, mean_figures

if TYPE_CHECKING:
    from rscli.api import Certificate

COPIES = 4
"""Noisy copies of an image for the accuracy under noise."""


class Probe(Callback):
    """Logs the certified accuracy of held-out training images at given radii; needs holdout.

    `certified_0.25` is the part of the images that are certified, with the right class, at radius 0.25; `probe_noisy` is their
    accuracy under noise; each comes with its standard error (`_se`) over the images. `probe_samples` says how many Monte Carlo
    samples it took, `probe_seconds` how long. `rscli certify --split holdout` of the same model certifies the same images, and
    with the same settings gives the same certificates.
    """

    looks_on: ClassVar[bool] = True
    needs_holdout: ClassVar[bool] = True

    every: int = Field(5, ge=1, description="epochs between two probes", json_schema_extra=unit("epochs"))
    radii: tuple[float, ...] = Field(
        (),
        strict=False,
        max_length=100,
        description="radii to certify, increasing; left out: 0, sigma and 2 sigma",
        json_schema_extra=unit("[0, 1] pixels"),
    )
    images: int = Field(200, ge=1, description="held-out images, at most", json_schema_extra=unit("images"))
    n: int = Field(1000, ge=1, le=10**9, description="Monte Carlo samples per image, at most")
    n0: int = Field(100, ge=1, le=10**9, description="selection samples per image")
    samples: int = Field(
        10**6, ge=1, description="Monte Carlo samples of a probe in all, at most: fewer images are looked at if need be"
    )
    alpha: float = Field(0.001, gt=0, lt=1, description="failure probability of a certificate, at most")
    certifier: str = Field("sequential", min_length=1, max_length=500, description="the certifier, with its usual settings")
    label: bool = Field(
        True, description="test each image's label, not a class chosen first: the same question for fewer samples"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the noise")
    batch: int = Field(256, ge=1, le=10**6, description="noisy images in a forward pass", json_schema_extra=unit("images"))

    @field_validator("radii")
    @classmethod
    def _increasing(cls, radii: tuple[float, ...]) -> tuple[float, ...]:
        if any(radius < 0 for radius in radii) or any(b <= a for a, b in pairwise(radii)):
            raise ValueError("must be increasing radii, the first 0 or more")
        return radii

    def begin(self, run: Run, state: dict[str, Any]) -> None:
        """Certifies one image: what is wrong with the settings shows now, and not after some epochs.

        Raises `InputError` if the samples do not suffice for one image, or for the largest radius.
        """
        if self.samples < self._an_image:
            text = f"callbacks.probe.samples = {self.samples:,} is less than one image may take ({self._an_image:,})"
            raise InputError(text, "Allow more samples, or fewer for an image (callbacks.probe.n).")
        largest = max(self._radii(run))
        if self.alpha ** (1 / self.n) <= run.noise.probability(largest):
            text = f"callbacks.probe cannot certify the radius {largest:g}: n = {self.n} samples prove less even if all agree"
            raise InputError(text, "Raise callbacks.probe.n, or name smaller radii (callbacks.probe.radii).")
        self._certificates(run, 1)

    def after_epoch(self, run: Run, state: dict[str, Any]) -> None:
        """Probes, if it is time, and after the last epoch."""
        if run.epoch % self.every and run.epoch != run.epochs:
            return
        began = time.monotonic()
        count = min(self.images, len(run.labels(SPLIT)), self.samples // self._an_image)
        labels = run.labels(SPLIT)[:count]
        found = self._certificates(run, count)
        for radius in self._radii(run):
            holds = [float(one.predict == label and one.radius >= radius) for one, label in zip(found, labels, strict=True)]
            run.log(mean_figures(f"certified_{radius:g}", holds))
        run.log(mean_figures("probe_noisy", accuracies(run, count, COPIES, self.seed)[1]))
        samples = sum(one.n0 + one.n for one in found) + COPIES * count
        run.log({"probe_images": count, "probe_samples": samples, "probe_seconds": round(time.monotonic() - began, 3)})

    @property
    def _an_image(self) -> int:
        """Samples that an image may take."""
        return self.n0 + self.n + COPIES

    def _radii(self, run: Run) -> tuple[float, ...]:
        return self.radii or (0.0, run.noise.sigma, 2 * run.noise.sigma)

    def _certificates(self, run: Run, count: int) -> Sequence[Certificate]:
        images, labels = run.images(SPLIT, range(count))
        return run.certify(
            images,
            n=self.n,
            n0=self.n0,
            alpha=self.alpha,
            certifier=self.certifier,
            radii=self._radii(run),
            labels=labels.tolist() if self.label else None,
            seed=self.seed,
            batch=self.batch,
        )
