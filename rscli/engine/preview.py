"""What a long certification will cost, and what the sequential certifier would take instead: said before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rscli.api import Certifier, Decision, Noise, Plan, Question
from rscli.engine.data import Split
from rscli.engine.inquiry import CertifierInquiry
from rscli.engine.sample import Sampler
from rscli.engine.seeds import derive
from rscli.stats.sequential import look_schedule, nested_test

PILOT_IMAGES, PILOT_SAMPLES, PILOT_SECONDS = 16, 200, 2.0
PATHS = 20
"""Simulated runs of the sequential test for each pilot image."""


class _Pilot(Certifier):
    """Counts; decides nothing."""

    def selection(self, question: Question) -> int:
        return 0

    def plan(self, counts: NDArray[np.int64], question: Question) -> Plan:
        return Plan(0, (PILOT_SAMPLES,))

    def decide(self, counts: NDArray[np.int64], n: int, plan: Plan) -> Decision:
        return Decision(0, 0.0, 1.0, "pilot")


def cost(certifier: Certifier, images: int, speed: float) -> str:
    """One line: images, samples at most, and the time that they take at `speed` samples a second."""
    samples = images * (certifier.n0 + certifier.n)
    return f"{images:,} images, at most {samples:,} samples: about {_clock(samples / speed)} at that speed"


def alternative(
    certifier: Certifier,
    noise: Noise,
    split: Split,
    wanted: Sequence[int],
    radii: Sequence[float],
    sampler: Sampler,
    speed: float,
) -> str | None:
    """One line: how many samples the sequential certifier would take for the grid `radii`; None if a pilot costs too much.

    A pilot of a few samples on a few images estimates the class probabilities (on noise of its own, that no certificate uses),
    and the test is simulated on them.
    """
    if speed * PILOT_SECONDS < PILOT_IMAGES * PILOT_SAMPLES or not radii:
        return None
    thresholds = tuple(noise.probability(radius) for radius in radii)
    counts = _pilot(split, wanted, sampler)
    looks = look_schedule(certifier.n)
    test = nested_test(thresholds, looks, certifier.alpha)
    random = np.random.default_rng(0)
    taken = []
    for count in counts:
        for _ in range(PATHS):
            p = random.beta(count + 0.5, PILOT_SAMPLES - count + 0.5)
            hits = np.cumsum(random.binomial(np.diff((0, *looks)), p)).tolist()
            certified, hopeful = 0, len(thresholds)
            for look, hit in enumerate(hits):
                certified = max(certified, test.certified(look, hit))
                hopeful = min(hopeful, test.hopeful(look, hit))
                if certified >= hopeful:
                    break
            taken.append(looks[look])
    mean = certifier.n0 + float(np.mean(taken))
    return (
        f"--certifier sequential would decide the radii {radii[0]:g} to {radii[-1]:g} with about {mean:,.0f} samples an image, "
        f"{(certifier.n0 + certifier.n) / mean:.1f} times fewer (estimated from {len(counts)} images)"
    )


def _pilot(split: Split, wanted: Sequence[int], sampler: Sampler) -> list[int]:
    """The count of the most frequent class among `PILOT_SAMPLES`, for a few images spread over `wanted`."""
    chosen = wanted[:: max(1, len(wanted) // PILOT_IMAGES)][:PILOT_IMAGES]
    question = Question(sampler.classes)
    inquiries = [
        CertifierInquiry(_Pilot(), question, derive(sampler.seed, "pilot", index), partial(split.image, index))
        for index in chosen
    ]
    for _ in sampler.run(inquiries):
        pass
    sampler.samples = 0
    return [int(inquiry.counts.max()) for inquiry in inquiries if inquiry.counts is not None]


def _clock(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"
