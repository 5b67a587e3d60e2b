"""Certification: every wanted image of a split through a certifier, one flushed row per image, resumable at any point."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from rscli import __version__
from rscli.api import Certifier, Dataset, fields_of
from rscli.config.layers import build_section
from rscli.config.problems import Problems
from rscli.config.settings import flatten
from rscli.data.splits import HOLDOUT, Split, open_split, set_aside, spec_of
from rscli.data.subset import limited
from rscli.errors import InputError, RscliError, Stopped
from rscli.models.card import ModelCard
from rscli.models.modelfile import card_of, load_model
from rscli.models.smoothed import Smoothed
from rscli.registry import installed
from rscli.results.protocol import FORMAT, protocol_path, read_protocol
from rscli.results.shards import part_path, parts_of, union
from rscli.results.writer import ResultWriter
from rscli.runtime.devices import environment
from rscli.runtime.guard import largest_p_a
from rscli.runtime.progress import Progress
from rscli.runtime.signals import StopRequest, stop_requests
from rscli.sampling.autotune import Choice
from rscli.sampling.blocks import BLOCK
from rscli.sampling.options import SamplingOptions, Work
from rscli.sampling.requests import CertifierRequest, Request
from rscli.sampling.sampler import Sampler
from rscli.smoothing.cost import at_most
from rscli.smoothing.radii import decided_radii
from rscli.smoothing.summary import Score, Tally
from rscli.smoothing.task import CertificationTask, row_of
from rscli.smoothing.work_queue import Ranks, join
from rscli.text import same_name

LONG_RUN = 1_000_000
"""From so many samples on, a trial at the start looks for the fastest batch size and layout."""

SHARED_SECONDS = 30.0
"""So long may a file take to be seen by other machines that share the folder."""

OWN = "rscli"
"""The distribution whose plugins keep their tests from version to version; of others, the version counts."""

SHOW_SECONDS = 0.2
"""Time between two reports of progress."""


@dataclass(frozen=True)
class CertifyOptions:
    """What is certified, and where the rows go.

    Of the split's images, those at index `start`, `start + skip`, `start + 2 skip`, ... are taken, `max` of them at most; of
    these, with `shard` = (k, K), every K-th, from the k-th on. `radii` are for certifiers that decide given radii; without any,
    they get a grid of `GRID_STEP`.
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
    shard: tuple[int, int] | None = None
    radii: tuple[float, ...] = ()
    labels: bool = False
    resume: bool = False
    download: bool = False
    sampling: SamplingOptions = field(default_factory=SamplingOptions)


def build_certifier(section: dict[str, Any]) -> Certifier:
    """The certifier of `section` ("name" and fields). Raises `ConfigError` naming each field that does not fit."""
    problems = Problems(flatten({"certifier": section}, "as given"))
    plugin = build_section("certifier", section, problems, kind="certifiers")
    problems.check()
    certifier = cast(Certifier, plugin)
    if largest_p_a(certifier, certifier.n) < 0.5:
        least = 1 + bisect_left(range(1, 10**6), True, key=lambda n: largest_p_a(certifier, n) >= 0.5)
        raise InputError(
            f"n is {certifier.n}, but at alpha {certifier.alpha:g} even a unanimous vote of so few certifies nothing",
            f"Use n = {least} or more.",
        )
    return certifier


def certify(options: CertifyOptions, progress: Progress, waiting: Callable[[str], None] | None = None) -> Tally:
    """Certifies, or continues a run, and returns its tally; started by torchrun, does so together with the other processes.

    `waiting` is told if those are long in coming (None: `progress` is): every process may have to say so, not the first alone.

    Raises `InputError` for a model, data, options or a result file that do not fit, and `Stopped` when asked to stop (all
    decided images are saved).
    """
    with stop_requests() as stop:
        return _certify(options, progress, stop, join(waiting or progress.note, stop))


def _certify(options: CertifyOptions, progress: Progress, stop: StopRequest, ranks: Ranks) -> Tally:
    if ranks.rank == 0 and not options.resume:
        _refuse_to_overwrite(options)
    model = load_model(options.model)
    certifier = build_certifier(options.certifier)
    options = replace(options, radii=decided_radii(certifier, model.noise, options.radii))
    split = _open(card_of(model), options)
    if split.note and ranks.rank == 0:
        progress.warn(split.note)
    wanted = _wanted(options, len(split))
    task = CertificationTask(model, certifier, split.image, options.radii, split.labels.__getitem__ if options.labels else None)
    sampler, protocol = _prepare(model, task, split, options, ranks, progress, stop, wanted)
    with _begin(options, protocol, ranks, stop) as writer:
        for text in writer.notes if ranks.rank == 0 else ():
            progress.warn(text)
        _check_labels(writer, split)
        run = _Run(task, split, sampler, writer, ranks, progress, stop)
        return run.over(wanted, merge=options.shard is None)


def _check_labels(writer: ResultWriter, split: Split) -> None:
    """Raises `InputError` if a row that is there already has another label than the data."""
    known = (row for row in writer.rows if row.idx < len(split))
    wrong = next((row for row in known if row.label != split.labels[row.idx]), None)
    if wrong is not None:
        label = split.labels[wrong.idx]
        raise InputError(
            f"{writer.path} says that image {wrong.idx} has the label {wrong.label}, but in the data it has the label {label}",
            "Restore the file, or remove the row: its image is then certified again.",
        )


class _Run:
    """One process's part of a certification."""

    def __init__(
        self,
        task: CertificationTask,
        split: Split,
        sampler: Sampler,
        writer: ResultWriter,
        ranks: Ranks,
        progress: Progress,
        stop: StopRequest,
    ) -> None:
        self.task, self.split, self.sampler, self.writer = task, split, sampler, writer
        self.ranks, self.progress, self.stop = ranks, progress, stop
        self.score = Score(writer.rows)
        self.start = self.shown = self.decided = time.monotonic()
        self.done = self.opened = 0

    def over(self, wanted: list[int], *, merge: bool) -> Tally:
        """Certifies what is not decided yet of `wanted`; the first process puts the parts together, if `merge`."""
        todo = [index for index in wanted if index not in self.writer.done]
        self.done = len(wanted) - len(todo)
        handed = self.ranks.hand_out(todo, lambda: self.opened)
        requests = (None if index is None else self._request_for(index) for index in handed)
        self.progress.start("certify", len(wanted), self.done, "image")
        try:
            for request in self.sampler.run(requests, self._tick):
                before, self.decided = self.decided, time.monotonic()
                certificate = self.task.certificate(cast(CertifierRequest, request))
                row = row_of(certificate, int(self.split.labels[certificate.index]), self.decided - before)
                self.writer.append(row)
                self.opened -= 1
                self.score.add(row)
                self.ranks.add("decided", 1)
            self._show()
        finally:
            self.progress.finish()
        if self.stop.requested and self.done + self.ranks.add("decided", 0) < len(wanted):
            hint = "Run the same command with --resume to continue from there."
            text = f"stopped as asked; {self.score.images} images are certified and saved"
            raise Stopped(text, hint, exit_code=self.stop.exit_code)
        samples = self.ranks.add("samples", self.sampler.samples)
        self.writer.close()
        self.ranks.meet("done", self.stop)
        if merge and self.ranks.rank == 0:
            missing = set(wanted) - {row.idx for row in union(self.writer.path, self.writer.rows, self.writer.protocol)}
            if missing:
                hint = "All processes must write to the same folder: use an --out that they share, then --resume."
                raise RscliError(f"{len(missing)} images are missing from the parts beside {self.writer.path}", hint)
            self.writer.finish()
            self.score = Score(self.writer.rows)
            samples = self.ranks.add("samples", 0)
        self.ranks.leave(self.stop)
        seconds = time.monotonic() - self.start
        return self.score.tally(self.writer.path, self.task.radii, samples, seconds)

    def _request_for(self, index: int) -> Request:
        self.opened += 1
        return self.task.request_for(index)

    def _tick(self) -> bool:
        """Before every batch: shows how far all processes are, now and then, and says whether to stop."""
        if time.monotonic() - self.shown >= SHOW_SECONDS:
            self._show()
        return self.stop.requested

    def _show(self) -> None:
        self.shown = time.monotonic()
        speed = self.sampler.samples / max(self.shown - self.start, 1e-9)
        self.progress.update(self.done + self.ranks.add("decided", 0), self.score.figures(speed))


def _prepare(
    model: Smoothed,
    task: CertificationTask,
    split: Split,
    options: CertifyOptions,
    ranks: Ranks,
    progress: Progress,
    stop: StopRequest,
    wanted: list[int],
) -> tuple[Sampler, dict[str, Any]]:
    """The sampler, and the protocol. All processes of a run, and a run that is resumed, use one batch size and layout.

    Another batch size draws the same noise, but may change the last bits of the network's output.
    """
    if ranks.rank > 0:
        ranks.meet("protocol", stop)
        _see_protocol(options.out)
    certifier = task.certifier
    before = read_protocol(options.out) if options.resume or ranks.rank > 0 or options.shard else None
    info = (before or {}).get("info") or {}
    samples = len(wanted) * certifier.n
    work = Work(samples // ranks.world, early=certifier.grid, long=samples >= LONG_RUN)
    sampler, choice = options.sampling.sampler(model, work, info, progress, lambda: stop.requested)
    if choice.speed is not None:
        progress.note(f"trial: {choice}: {choice.speed:,.0f} samples/s")
    if choice.speed is not None and not info:  # of a run that goes on, most may be done
        progress.note(at_most(task, wanted[0], len(wanted), choice.speed, ranks.world))
    return sampler, _protocol(model, certifier, split, sampler, choice, options)


def _see_protocol(out: Path) -> None:
    """Raises `InputError` if what the first process has written beside `out` is not to be seen here, after a while."""
    until = time.monotonic() + SHARED_SECONDS
    while not protocol_path(out).exists():
        if time.monotonic() > until:
            hint = "All processes must write to the same folder: use an --out that they share."
            raise InputError(f"{protocol_path(out)}, which the first process has written, does not appear here", hint)
        time.sleep(0.05)


def _begin(options: CertifyOptions, protocol: dict[str, Any], ranks: Ranks, stop: StopRequest) -> ResultWriter:
    """Opens the result file, or this process's part of it."""
    names = [] if options.shard is None else [_shard_name(options.shard)]
    names += [] if ranks.world == 1 else [f"rank-{ranks.rank}-of-{ranks.world}"]
    if not names:
        return (ResultWriter.resume if _there(options) else ResultWriter.create)(options.out, protocol)
    writer = ResultWriter.join(options.out, protocol, "-".join(names))
    if ranks.rank == 0:
        ranks.meet("protocol", stop)
    ranks.meet("begun", stop)  # nobody writes before everybody has read what is there
    return writer


def _refuse_to_overwrite(options: CertifyOptions) -> None:
    """Raises `InputError` if there is a result already; of a shard, only its own part and the finished result count."""
    there = _there(options)
    if options.shard is not None:
        own = part_path(options.out, _shard_name(options.shard)).name
        there = [path for path in there if path.name in (options.out.name, own) or path.name.startswith(f"{own}-rank")]
    if there:
        hint = "Continue it (--resume), or write to another file (--out)."
        raise InputError(f"the result file {there[0]} already exists", hint)


def _there(options: CertifyOptions) -> list[Path]:
    return [path for path in (options.out, *parts_of(options.out)) if path.exists()]


def _shard_name(shard: tuple[int, int]) -> str:
    return f"shard-{shard[0]}-of-{shard[1]}"


def _open(card: ModelCard, options: CertifyOptions) -> Split:
    """The split to certify, read as the model wants its input."""
    problems = Problems({**flatten({"data": card.data}, "model file"), **flatten({"data": options.data}, "--set")})
    plugin = build_section("data", {**card.data, **options.data}, problems)
    problems.check()
    dataset = cast(Dataset, plugin)
    names = spec_of(dataset, options.data_dir).class_names
    if [*map(same_name, names)] != [*map(same_name, card.spec.class_names)]:
        raise InputError(
            f"the data has the classes {_some(names)}, but the model was trained on {_some(card.spec.class_names)}",
            "The labels would not match. Give the data set that the model was trained on (--data-dir, --set data.KEY=VALUE).",
        )
    if options.split == HOLDOUT and (card.config or {}).get("holdout"):
        whole = open_split(dataset, card.spec, "train", options.data_dir, download=options.download)
        count, seed, limit = _holdout_of(card)
        return set_aside(limited(whole, limit), count, seed)[1]
    return open_split(dataset, card.spec, options.split, options.data_dir, download=options.download)


def _holdout_of(card: ModelCard) -> tuple[int, int, int | None]:
    """How many training images were set aside, the seed that chose them, and the limit that they were chosen from, if any.

    Raises `InputError` if the model file is wrong.
    """
    holdout, seed, limit = found = [(card.config or {}).get(key) for key in ("holdout", "seed", "limit")]
    if not all(type(value) is int and value >= 0 for value in (holdout, seed, 1 if limit is None else limit)):
        said = ", ".join(f"{key} = {value!r:.40}" for key, value in zip(("holdout", "seed", "limit"), found, strict=True))
        raise InputError(f"the model file says {said}: whole numbers are wanted")
    return cast(tuple[int, int, int | None], tuple(found))


def _some(names: tuple[str, ...]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}, ...)" if len(names) > 3 else ", ".join(names)


def _wanted(options: CertifyOptions, images: int) -> list[int]:
    """The indices to certify, increasing. Raises `InputError` for a start, skip or max that selects nothing."""
    for name, value, least in (("--start", options.start, 0), ("--skip", options.skip, 1), ("--max", options.max, 1)):
        if value is not None and value < least:
            raise InputError(f"{name} is {value}, but must be at least {least}")
    wanted = list(range(options.start, images, options.skip))[: options.max]
    if options.shard is not None:
        number, count = options.shard
        if not 1 <= number <= count:
            raise InputError(f"--shard is {number}/{count}, but must be from 1/{count} to {count}/{count}")
        wanted = wanted[number - 1 :: count]
    if not wanted and options.shard is not None:
        raise InputError(f"--shard {options.shard[0]}/{options.shard[1]} has no image to certify", "Use fewer shards.")
    if not wanted:
        raise InputError(f"--start is {options.start}, but the split {options.split!r} has only {images} images")
    return wanted


def _protocol(
    model: Smoothed, certifier: Certifier, split: Split, sampler: Sampler, choice: Choice, options: CertifyOptions
) -> dict[str, Any]:
    """What the rows depend on; `info` holds what they do not, or only in the last bits of the network's output."""
    card, sampling = card_of(model), options.sampling
    origin = installed().provenance("certifiers", options.certifier["name"])
    return {
        "format": FORMAT,
        "model_sha256": model.source.sha256 if model.source else None,
        "dataset": card.data["name"],
        "split": options.split,
        "data_sha256": split.fingerprint(),
        "noise": card.noise,
        "norm": model.noise.norm,
        "sigma": model.noise.sigma,
        "certifier": {
            "name": origin.name,
            "package": origin.package,
            "decisive": list(certifier.decisive),
            **({} if origin.package == OWN else {"version": origin.version}),  # another version may be another test
            **fields_of(certifier),
        },
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
            "preset": card.preset,
            "overrides": card.overrides,
            "config": card.config,
            "start": options.start,
            "skip": options.skip,
            "max": options.max,
            "batch": sampler.batch,
            "channels_last": choice.channels_last,
            "lanes": choice.parallel,
            "trial": choice.speed is not None,
            "compile": choice.compiled,
            "classes": len(card.spec.class_names),
            "images": len(split),
            **environment(sampler.device),
        },
    }
