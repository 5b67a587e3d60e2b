"""Prediction: the class that the smoothed classifier gives to single images, with or without a certified radius."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rscli import image_files
from rscli.api import ABSTAIN, Certifier, Decision, Plan, Question
from rscli.data.splits import to_unit
from rscli.data.transforms import load_image
from rscli.errors import InputError, Stopped
from rscli.models.smoothed import Smoothed
from rscli.results.radius import certified_radius
from rscli.runtime.progress import Progress
from rscli.runtime.seeds import derive
from rscli.runtime.signals import stop_requests
from rscli.sampling.options import SamplingOptions, Work
from rscli.sampling.requests import CertifierRequest, Request
from rscli.stats.bounds import smallest_n_for, top_two_p_value


class MajorityVote(Certifier):
    """PREDICT of Cohen et al. 2019 (section 3.2.1): the top class of n samples, unless the runner-up could be it.

    Abstains when the two-sided binomial test of the top two counts does not reject 1/2 at level alpha: then the returned
    class is g(x) with probability at least 1 - alpha. It says nothing of a radius.
    """

    def selection(self, question: Question) -> int:
        """None: all samples vote."""
        return 0

    def plan(self, counts: NDArray[np.int64], question: Question) -> Plan:
        """One look, at n; no class is chosen beforehand (0 stands for that), and `counts` (classes,) are zeros."""
        return Plan(0, (self.n,))

    def decide(self, counts: NDArray[np.int64], n: int, plan: Plan) -> Decision:
        """The vote of `counts` (classes,)."""
        top = int(counts.argmax())
        first = int(counts[top])
        second = int(np.delete(counts, top).max(initial=0))
        sure = top_two_p_value(first, second) <= self.alpha
        return Decision(top if sure else ABSTAIN, 0.5, 0.5, "vote" if sure else "near-tie")


@dataclass(frozen=True)
class Prediction:
    """The answer for one image: class index and name (ABSTAIN for none), its share of the `n` samples, and maybe a radius.

    `path` is None for an image in memory. `error` is set, and the rest empty, for a file that could not be read.
    """

    path: Path | None = None
    label: int = ABSTAIN
    name: str = "ABSTAIN"
    share: float = 0.0
    n: int = 0
    radius: float | None = None
    error: str | None = None


def image_key(pixels: Tensor) -> int:
    """The key of an image's noise: its pixels (channel, height, width) decide, not its name or its place in a list.

    Pixels are uint8, or float32 in [0, 1]; where these are 255ths, both give the same key.
    """
    if pixels.is_floating_point():
        levels = (pixels * 255).round().to(torch.uint8)
        pixels = levels if torch.equal(to_unit(levels), pixels) else pixels
    return derive(0, "image", hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest())


def find_images(paths: Sequence[Path], progress: Progress) -> list[Path]:
    """The images among `paths`, folders searched to the bottom; files are taken whatever their suffix, and each once.

    What a folder holds is an image by the rule of `rscli.image_files`; what was skipped is counted in a warning. Raises
    `InputError` for a path that does not exist, or if there is no image at all.
    """
    found = image_files.find_images(paths)
    skipped = image_files.skipped_text(found.skipped)
    if not found.paths:
        hint = f"Folders are searched for {image_files.COMMON_SUFFIXES} files, and a few other formats."
        raise InputError(f"no images in {', '.join(map(str, paths))}{f': {skipped}' if skipped else ''}", hint)
    if skipped:
        progress.warn(skipped)
    return list(found.paths)


def vote(n: int, alpha: float) -> MajorityVote:
    """The rule of a prediction without a radius. Raises `InputError` if not even a unanimous vote of n could decide."""
    least = smallest_n_for(alpha)
    if n < least:
        raise InputError(f"n is {n}, but at alpha {alpha:g} even a unanimous vote needs at least {least} samples")
    return MajorityVote(n=n, alpha=alpha)


def predict(
    model: Smoothed, paths: Sequence[Path], certifier: Certifier, sampling: SamplingOptions, progress: Progress
) -> Iterator[Prediction]:
    """Predicts every image of `paths`; yields a prediction each, in order of completion, broken images first of their kind.

    With `MajorityVote` the answer has no radius; any other certifier gives one. Raises `Stopped` when asked to stop.
    """
    work = Work(len(paths) * (certifier.n0 + certifier.n))
    sampler, _ = sampling.sampler(model, work, {}, progress, lambda: False)
    if model.transform is None:
        raise InputError(
            "this classifier has no transform, so it cannot read image files", "Give it transform=rscli.api.Transform(...)."
        )
    transform = model.transform
    broken: list[Prediction] = []
    opened: dict[int, Path] = {}
    done = 0

    def requests() -> Iterator[Request]:
        for path in paths:
            try:
                pixels = load_image(path, transform)
            except InputError as error:
                broken.append(Prediction(path, error=error.message))
                continue
            request = CertifierRequest(certifier, Question(model.classes), image_key(pixels), partial(to_unit, pixels))
            opened[id(request)] = path
            yield request

    progress.start("predict", len(paths), 0, "image")
    try:
        with stop_requests() as stop:
            for request in sampler.run(requests(), lambda: stop.requested):
                done += 1
                progress.update(done + len(broken), {})
                yield prediction_of(cast(CertifierRequest, request), model, opened.pop(id(request)))
            if stop.requested:
                raise Stopped(f"stopped as asked, after {done} images", exit_code=stop.exit_code)
    finally:
        progress.finish()
    yield from broken


def prediction_of(request: CertifierRequest, model: Smoothed, path: Path | None = None) -> Prediction:
    """What a finished request says of an image."""
    decision, counts = request.decision, request.counts
    if decision is None or counts is None:
        raise RuntimeError("a request ended without a decision")
    top = int(counts.argmax()) if decision.predict == ABSTAIN else decision.predict
    name = "ABSTAIN" if decision.predict == ABSTAIN else model.class_names[decision.predict]
    radius = None if isinstance(request.certifier, MajorityVote) else certified_radius(decision, model.noise)
    return Prediction(path, decision.predict, name, int(counts[top]) / max(request.n, 1), request.n, radius)
