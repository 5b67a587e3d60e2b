"""What a long certification will cost, and what the sequential certifier would take instead: said before it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rscli.api import Certifier, Decision, Plan, Question
from rscli.data.splits import Split
from rscli.registry import installed
from rscli.runtime.seeds import derive
from rscli.sampling.requests import CertifierInquiry, Counts
from rscli.sampling.sampler import Sampler
from rscli.smoothing.images import Images
from rscli.smoothing.radii import grid_radii

PILOT_SECONDS, PILOT_SHARE, LONGEST_PILOT = 2.0, 1e-3, 20.0
"""The pilot takes so many seconds at most, or such a share of the whole run, but never longer than the last of these."""

PILOT_SAMPLES, LEAST_IMAGES, MOST_IMAGES = 250, 16, 64
"""It has so many samples an image; where it cannot classify the least number of images in its time, it is left out."""

PATHS = 10
"""Simulated conversations with a certifier about each pilot image."""

FEWER = 0.9
"""Below this part of the most that a certifier may take, what it probably takes is worth a line."""


class _Pilot(Certifier):
    """Counts; decides nothing."""

    def selection(self, question: Question) -> int:
        return 0

    def plan(self, counts: Counts, question: Question) -> Plan:
        return Plan(0, (PILOT_SAMPLES,))

    def decide(self, counts: Counts, n: int, plan: Plan) -> Decision:
        return Decision(0, 0.0, 1.0, "pilot")


def preview(
    images: Images, wanted: Sequence[int], sampler: Sampler, speed: float, world: int, stop: Callable[[], bool]
) -> Iterator[str]:
    """Lines: the most that certifying `wanted` takes, what it probably takes, and the alternative.

    `speed` is that of this process, in samples a second; there are `world` of them. The last two lines are there if they are
    less. They come from a pilot of a few samples on a few images (on noise of its own, that no certificate uses), and are left
    out where that would cost too much.
    """
    certifier, question = images.certifier, images.question
    most = certifier.selection(question(wanted[0])) + certifier.n
    samples = len(wanted) * most
    longest = samples / speed / world
    yield f"{len(wanted):,} images, at most {samples:,} samples: {_duration(longest)} at that speed"
    affordable = int(speed * min(max(PILOT_SECONDS, PILOT_SHARE * longest), LONGEST_PILOT) / PILOT_SAMPLES)
    if affordable < LEAST_IMAGES:
        return
    pilot = _pilot(images.split, wanted, min(affordable, MOST_IMAGES), sampler, stop)
    if not pilot:
        return
    source = f"(estimated from {len(pilot)} images)"
    probably = _expected(certifier, question, pilot)
    if probably < FEWER * most:
        yield f"probably {probably:,.0f} samples an image: {_duration(len(wanted) * probably / speed / world)} {source}"
    radii = grid_radii(certifier, images.noise)
    if certifier.grid or not radii:
        return
    given = certifier.model_dump(include={"n0", "n", "alpha"}, exclude_unset=True)
    sequential = cast(Certifier, installed().build("certifiers", {"name": "sequential", **given}))
    thresholds = tuple(images.noise.probability(radius) for radius in radii)
    instead = _expected(sequential, lambda index: replace(question(index), thresholds=thresholds), pilot)
    if instead < probably:
        yield (
            f"--certifier sequential would decide the radii {radii[0]:g} to {radii[-1]:g} with about {instead:,.0f} samples "
            f"an image, {probably / instead:.1f} times fewer {source}"
        )


def _pilot(split: Split, wanted: Sequence[int], most: int, sampler: Sampler, stop: Callable[[], bool]) -> dict[int, Counts]:
    """The counts of `PILOT_SAMPLES` samples each, for `most` images at most, spread over `wanted`, by index."""
    chosen = wanted[:: max(1, len(wanted) // most)][:most]
    question = Question(sampler.classes)
    keys = {derive(sampler.seed, "pilot", index): index for index in chosen}
    inquiries = [CertifierInquiry(_Pilot(), question, key, partial(split.image, index)) for key, index in keys.items()]
    for _ in sampler.run(inquiries, stop):
        pass
    sampler.samples = 0
    return {keys[inquiry.key]: inquiry.counts for inquiry in inquiries if inquiry.counts is not None}


def _expected(certifier: Certifier, question: Callable[[int], Question], pilot: dict[int, Counts]) -> float:
    """The mean number of samples an image, selection included, simulated on what the pilot says of the class probabilities.

    The pilot cannot tell 0.998 from 0.9999, so far-out radii look more doubtful than they are: this is rather too much, up to
    about twice (MNIST, radii to 3 sigma).
    """
    random = np.random.default_rng(0)
    taken = [
        _conversation(CertifierInquiry(certifier, question(index), index, _no_image), _plausible(counts, random), random)
        for index, counts in pilot.items()
        for _ in range(PATHS)
    ]
    return float(np.mean(taken))


def _no_image() -> Tensor:
    raise AssertionError("a simulated conversation needs no image")


def _plausible(counts: Counts, random: np.random.Generator) -> NDArray[np.float64]:
    """Class probabilities that may have given `counts`: the top class from its Jeffreys posterior, the others in proportion."""
    top, total = int(counts.argmax()), int(counts.sum())
    hits = int(counts[top])
    others = counts + 1 / len(counts)
    others[top] = 0
    p = random.beta(hits + 0.5, total - hits + 0.5)
    probabilities: NDArray[np.float64] = (1 - p) * others / others.sum()
    probabilities[top] = p
    return probabilities


def _conversation(inquiry: CertifierInquiry, probabilities: NDArray[np.float64], random: np.random.Generator) -> int:
    """The samples that `inquiry` takes until it is decided, with counts drawn from `probabilities`."""
    drawn, counts = 0, np.zeros(len(probabilities), np.int64)
    while inquiry.decision is None:
        counts = counts + random.multinomial(inquiry.wanted - drawn, probabilities)
        drawn = inquiry.wanted
        inquiry.receive(counts)
        if inquiry.fresh:
            counts = np.zeros_like(counts)
    return drawn


def _duration(seconds: float) -> str:
    return f"about {int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"
