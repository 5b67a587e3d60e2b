"""Certification: every wanted image of a split through a certifier, one flushed row an image, resumable at any point."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from pydantic import ValidationError

from rscli import __version__
from rscli.api import ABSTAIN, Certifier, Dataset, Decision, Noise, Question, fields_of
from rscli.engine.data import Split, open_split
from rscli.engine.devices import environment, memory_layout, pick_device
from rscli.engine.modelfile import Model, load_model
from rscli.engine.progress import Progress
from rscli.engine.results import ResultWriter, Row
from rscli.engine.sample import BLOCK, CertifierInquiry, Inquiry, Sampler
from rscli.engine.signals import StopRequest, stop_requests
from rscli.errors import ConfigError, InputError, PluginError, Stopped
from rscli.registry import installed


@dataclass(frozen=True)
class SamplingOptions:
    """How samples are drawn. Only `precision`, `seed` and the kind of device change what a certificate rests on."""

    device: str = "auto"
    batch: int = 256
    precision: str = "fp32"
    channels_last: bool = True
    seed: int = 0

    def sampler(self, model: Model) -> Sampler:
        """A sampler of `model`, moved to the device. Raises `InputError` for a device or precision that is not to be had."""
        device = pick_device(self.device)
        return Sampler(
            model.classifier.to(device).to(memory_format=memory_layout(self.channels_last)),
            model.noise,
            len(model.card.spec.class_names),
            seed=self.seed,
            batch=self.batch,
            device=device,
            precision=self.precision,
            channels_last=self.channels_last,
        )


@dataclass(frozen=True)
class CertifyOptions:
    """What is certified, and where the rows go.

    Of the split's images, those at index `start`, `start + skip`, `start + 2 skip`, ... are taken, `max` of them at most.
    """

    model: Path
    out: Path
    data_dir: Path
    certifier: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    split: str = "test"
    start: int = 0
    skip: int = 1
    max: int | None = None
    radii: tuple[float, ...] = ()
    labels: bool = False
    resume: bool = False
    download: bool = False
    sampling: SamplingOptions = SamplingOptions()


@dataclass(frozen=True)
class Tally:
    """What a run of certification came to, over all rows of its file."""

    out: Path
    images: int
    abstained: int
    certified_accuracy: float
    acr: float
    samples: int
    seconds: float


def build_certifier(section: dict[str, Any]) -> Certifier:
    """The certifier of `section` ("name" and fields). Raises `ConfigError` naming each field that does not fit."""
    name = section["name"]
    try:
        return cast(Certifier, installed().build("certifiers", section))
    except ValidationError as cause:
        problems = [f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in cause.errors()]
        raise ConfigError(problems, f"`rscli plugins info certifiers {name}` shows the fields.") from cause


def certify(options: CertifyOptions, progress: Progress) -> Tally:
    """Certifies, or continues a run, and returns its tally.

    Raises `InputError` for a model, data, options or a result file that do not fit, and `Stopped` when asked to stop (all
    decided images are saved).
    """
    model = load_model(options.model)
    certifier = build_certifier(options.certifier)
    split = _open(model, options)
    wanted = _wanted(options, len(split))
    sampler = options.sampling.sampler(model)
    protocol = _protocol(model, certifier, split, sampler, options)
    if options.resume and options.out.exists():
        writer = ResultWriter.resume(options.out, protocol)
        for text in writer.notes:
            progress.warn(text)
    else:
        writer = ResultWriter.create(options.out, protocol)
    with writer, stop_requests() as stop:
        return _run(_Images(model, certifier, split, options), wanted, sampler, writer, progress, stop)


class _Images:
    """Makes the inquiry for an image, and the row from its answer."""

    def __init__(self, model: Model, certifier: Certifier, split: Split, options: CertifyOptions) -> None:
        self.noise, self.certifier, self.split, self.labels = model.noise, certifier, split, options.labels
        self.classes = len(model.card.spec.class_names)
        self.radii = {model.noise.probability(radius): radius for radius in options.radii}

    def inquire(self, index: int) -> Inquiry:
        """The inquiry about the image at `index`."""
        label = int(self.split.labels[index]) if self.labels else None
        question = Question(self.classes, tuple(self.radii), label)
        return CertifierInquiry(self.certifier, question, index, lambda: self.split.image(index))

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


def certified_radius(decision: Decision, noise: Noise, radii: dict[float, float] | None = None) -> float:
    """The radius of a decision: 0 for an abstention; exactly a wanted radius, if `p_a` is that radius' threshold in `radii`.

    Raises `PluginError` if the noise gives a radius that is negative or not finite.
    """
    if decision.predict == ABSTAIN:
        return 0.0
    radius = (radii or {}).get(decision.p_a)
    radius = noise.radius(decision.p_a, decision.p_b) if radius is None else radius
    if not (math.isfinite(radius) and radius >= 0):
        raise PluginError(f"the noise {type(noise).__name__} gave the radius {radius}; it must be finite and not negative")
    return radius


class _Score:
    """The running figures of a run: over all rows of its file."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.images = self.abstained = self.correct = 0
        self.radius = 0.0
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Counts one row."""
        self.images += 1
        self.abstained += row.predict == ABSTAIN
        self.correct += row.correct
        self.radius += row.radius if row.correct else 0.0

    def figures(self, speed: float) -> dict[str, str]:
        """For the eye: abstentions, certified accuracy at radius 0, and samples a second."""
        accuracy = f"{100 * self.correct / self.images:.1f}%" if self.images else "-"
        return {"abstained": str(self.abstained), "certified": accuracy, "samples/s": f"{speed:.0f}"}

    def tally(self, out: Path, samples: int, seconds: float) -> Tally:
        """The figures at the end."""
        images = max(self.images, 1)
        return Tally(out, self.images, self.abstained, self.correct / images, self.radius / images, samples, seconds)


def _run(
    images: _Images, wanted: list[int], sampler: Sampler, writer: ResultWriter, progress: Progress, stop: StopRequest
) -> Tally:
    todo = [index for index in wanted if index not in writer.done]
    began: dict[int, float] = {}
    score, start, done = _Score(writer.rows), time.monotonic(), len(wanted) - len(todo)

    def inquiries() -> Iterator[Inquiry]:
        for index in todo:
            began[index] = time.monotonic()
            yield images.inquire(index)

    def tick() -> bool:
        progress.update(done, score.figures(sampler.samples / max(time.monotonic() - start, 1e-9)))
        return stop.requested

    progress.start("certify", len(wanted), done, "image")
    try:
        for inquiry in sampler.run(inquiries(), tick):
            row = images.row(cast(CertifierInquiry, inquiry), time.monotonic() - began.pop(inquiry.key))
            writer.append(row)
            score.add(row)
            done += 1
        tick()
    finally:
        progress.finish()
    if done < len(wanted):
        hint = "The same command with --resume goes on from there."
        raise Stopped(f"stopped as asked; {score.images} images are decided and saved", hint, exit_code=stop.exit_code)
    writer.finish()
    return score.tally(writer.path, sampler.samples, time.monotonic() - start)


def _open(model: Model, options: CertifyOptions) -> Split:
    """The split to certify, read as the model wants its input."""
    card = model.card
    section = {**card.data, **options.data}
    try:
        dataset = cast(Dataset, installed().build("datasets", section))
    except ValidationError as cause:
        raise ConfigError([f"data.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in cause.errors()]) from cause
    names = dataset.spec(options.data_dir).class_names
    if names != card.spec.class_names:
        raise InputError(
            f"the data has the classes {_some(names)}, but the model was trained on {_some(card.spec.class_names)}",
            "Labels could not be compared. Give the data set that the model was trained on (--data-dir, --set data.KEY=VALUE).",
        )
    return open_split(dataset, card.spec, options.split, options.data_dir, download=options.download)


def _some(names: tuple[str, ...]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}, ...)" if len(names) > 3 else ", ".join(names)


def _wanted(options: CertifyOptions, images: int) -> list[int]:
    """The indices to certify, increasing. Raises `InputError` for a start, skip or max that selects nothing."""
    for name, value, least in (("--start", options.start, 0), ("--skip", options.skip, 1), ("--max", options.max, 1)):
        if value is not None and value < least:
            raise InputError(f"{name} is {value}, but must be at least {least}")
    wanted = list(range(options.start, images, options.skip))[: options.max]
    if not wanted:
        raise InputError(f"--start {options.start} lies behind the last of the {images} images of the split {options.split!r}")
    return wanted


def _protocol(model: Model, certifier: Certifier, split: Split, sampler: Sampler, options: CertifyOptions) -> dict[str, Any]:
    """What the rows depend on; `info` holds what they do not, or only in the last bits of the network's output."""
    card, sampling = model.card, options.sampling
    origin = installed().provenance("certifiers", options.certifier["name"])
    return {
        "format": 1,
        "model_sha256": model.sha256,
        "dataset": card.data["name"],
        "split": options.split,
        "data_sha256": split.fingerprint(),
        "noise": card.noise,
        "sigma": model.noise.sigma,
        "certifier": {"name": origin.name, "package": origin.package, **fields_of(certifier)},
        "n0": certifier.n0,
        "n": certifier.n,
        "alpha": certifier.alpha,
        "radii": list(options.radii) or None,
        "labels": options.labels,
        "seed": sampling.seed,
        "block": BLOCK,
        "precision": sampling.precision,
        "noise_device": sampler.device.type,
        "info": {
            "rscli": __version__,
            "model": str(options.model),
            "data": {**card.data, **options.data},
            "arch": card.arch,
            "loss": (card.config or {}).get("loss"),
            "attack": (card.config or {}).get("attack"),
            "train_seed": (card.config or {}).get("seed"),
            "start": options.start,
            "skip": options.skip,
            "max": options.max,
            "batch": sampling.batch,
            "channels_last": sampling.channels_last,
            **environment(sampler.device),
        },
    }
