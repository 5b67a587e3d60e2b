"""Training: batches, noisy copies, an optional attack, a loss, an optimiser step.

Every random draw has a key made of the seed, the epoch, the batch and the chunk (`rscli.runtime.seeds`), so a run
stopped between two batches continues exactly where it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rscli import __version__
from rscli.api import Attack, DataSpec, TrainStep
from rscli.config.layers import Resolved
from rscli.config.schema import steps_per_epoch
from rscli.data.splits import Split, open_split
from rscli.errors import InputError, PluginError, Stopped
from rscli.models.modelfile import ModelCard, save_model
from rscli.models.network import Classifier, build_classifier, parameter_count
from rscli.runtime.devices import environment, pick_device
from rscli.runtime.memory import enough_memory
from rscli.runtime.progress import Progress
from rscli.runtime.seeds import derive, generator
from rscli.runtime.signals import StopRequest, stop_requests
from rscli.runtime.torchrun import world_size
from rscli.training.checkpoint import check_optimizer, check_place, fitting, training_data
from rscli.training.layout import training_layout
from rscli.training.metrics import Meter
from rscli.training.minimum_batch import check_lonely_images
from rscli.training.run_folder import RunFolder

TOO_LARGE = (
    "Free its memory and go on with --resume, or begin anew with smaller batches (--set batch=N) or on another --device."
)


@dataclass(frozen=True)
class TrainOptions:
    """How a run is executed; nothing here changes what is computed, but for the last bits of another device or layout."""

    out: Path
    data_dir: Path
    device: str = "auto"
    workers: int = 4
    channels_last: bool | None = None
    resume: bool = False
    download: bool = False


@dataclass(frozen=True)
class Outlook:
    """What a run would do: for the dry run."""

    parameters: int
    images: int | None
    steps_an_epoch: int | None
    chunks: int
    files: list[Path]


def outlook(resolved: Resolved, options: TrainOptions) -> Outlook:
    """Builds the network and counts, without reading images or writing anything.

    Raises `InputError` if the network cannot be trained on the smallest step, or the attack not with so few copies.
    """
    _check_copies(resolved)
    spec = resolved.dataset.spec(options.data_dir)
    images = spec.sizes.get("train")
    chunks = resolved.loss.m if resolved.chunked else 1
    steps = None if images is None else steps_per_epoch(images, resolved.config.batch, chunks)
    classifier = initial_classifier(resolved, spec)
    if images:
        check_lonely_images(resolved, classifier, spec, images)
    return Outlook(parameter_count(classifier), images, steps, chunks, RunFolder(options.out).files())


def _check_copies(resolved: Resolved) -> None:
    """Raises `InputError` if the attack needs more noisy copies of an image than the loss has."""
    attack, m = resolved.attack, resolved.loss.m
    if attack is not None and m < attack.least_m:
        name = (resolved.config.attack or {})["name"]
        hint = f"Write --set loss.m={attack.least_m} or more, or choose another attack."
        raise InputError(f"the attack {name!r} compares {attack.least_m} noisy copies of an image or more, but m = {m}", hint)


def initial_classifier(resolved: Resolved, spec: DataSpec) -> Classifier:
    """The classifier with the initial weights of the run's seed."""
    torch.manual_seed(derive(resolved.config.seed, "weights"))
    return build_classifier(resolved.architecture, spec)


def train(resolved: Resolved, options: TrainOptions, progress: Progress) -> Path:
    """Trains, or continues a run; returns the path of the model file.

    Raises `InputError` for data or a run folder that do not fit, `Stopped` when asked to stop (the state is saved), and
    `RscliError` when the loss is no longer finite.
    """
    if world_size() > 1:
        hint = "Start it without torchrun. Certification is what torchrun can share between processes."
        raise InputError("rscli train runs in one process", hint)
    with stop_requests() as stop:
        model = _train(resolved, options, progress, stop)
    if stop.requested:
        raise Stopped(f"stopped as asked, when {model} was just finished", exit_code=stop.exit_code)
    return model


def _train(resolved: Resolved, options: TrainOptions, progress: Progress, stop: StopRequest) -> Path:
    _check_copies(resolved)
    device = pick_device(options.device)
    spec = resolved.dataset.spec(options.data_dir)
    split = open_split(resolved.dataset, spec, "train", options.data_dir, download=options.download, workers=options.workers)
    trainer = Trainer(resolved, spec, split, device, channels_last=options.channels_last)
    check_lonely_images(resolved, trainer.classifier, spec, len(split))
    folder = RunFolder(options.out)
    record = {"config": resolved.as_dict(), "sources": resolved.sources}
    state = folder.begin(record, environment(device), trainer.data, resume=options.resume)
    if state is not None and folder.model.exists() and state["epoch"] >= resolved.config.epochs:
        progress.note(f"{folder.model} is finished already")
        return folder.model
    if state is not None:
        if "data" not in state:
            progress.note(f"{folder.checkpoint} is of an older version: whether it is intact, and of this data, cannot be told")
        with fitting(folder.checkpoint):
            trainer.restore(state)
        progress.note(f"resumed after epoch {trainer.epoch}, batch {trainer.batch}")
    size = math.ceil(resolved.config.batch / trainer.chunks)
    with (
        folder.at_work(progress),
        enough_memory(device, f"a step of {size} images with {resolved.loss.m} noisy copies each", TOO_LARGE),
    ):
        _run(trainer, folder, progress, stop)
    save_model(folder.model, trainer.classifier, model_card(resolved, spec))
    return folder.model


def model_card(resolved: Resolved, spec: DataSpec) -> ModelCard:
    """What the model file of a finished run says of itself."""
    sections = resolved.as_dict()
    return ModelCard(
        rscli=__version__,
        arch=sections["arch"],
        noise=sections["noise"],
        data=sections["data"],
        spec=spec,
        plugins=[{"kind": p.kind, "name": p.name, "package": p.package, "version": p.version} for p in resolved.provenance],
        config=sections,
        epochs=resolved.config.epochs,
    )


class Trainer:
    """The state of a run, and one epoch of it."""

    def __init__(
        self, resolved: Resolved, spec: DataSpec, split: Split, device: torch.device, *, channels_last: bool | None
    ) -> None:
        self.resolved, self.config, self.split, self.device = resolved, resolved.config, split, device
        self.chunks = resolved.loss.m if resolved.chunked else 1
        classifier = initial_classifier(resolved, spec).to(device)
        self.layout = training_layout(classifier, device, channels_last)
        if device.type == "cuda":
            torch.backends.cudnn.deterministic = True
        self.classifier = classifier.to(memory_format=self.layout)
        optimizer = resolved.config.optimizer
        self.optimizer = torch.optim.SGD(
            self.classifier.parameters(),
            lr=optimizer.lr,
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
            nesterov=optimizer.nesterov,
        )
        self.epoch, self.batch = 0, 0
        self.meter = Meter()

    @cached_property
    def data(self) -> dict[str, Any]:
        """What the run is trained on: see `training_data`."""
        return training_data(self.split)

    @property
    def drops(self) -> int:
        """How often the learning rate has dropped: `schedule.drops` counts finished epochs."""
        return sum(1 for drop in self.config.schedule.drops if drop <= self.epoch)

    @property
    def lr(self) -> float:
        """The learning rate of the current epoch."""
        return float(self.config.optimizer.lr * self.config.schedule.factor**self.drops)

    @property
    def batches(self) -> int:
        """Batches an epoch."""
        return self.split.steps(self.config.batch)

    def state(self) -> dict[str, Any]:
        """All that a run needs to continue to the same bits; no generator has a state to save."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "data": self.data,
            "model": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meter": self.meter.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from `state`. Raises what torch does, or `ValueError`, if it is not of this run."""
        check_place(state["epoch"], state["batch"], epochs=self.config.epochs, batches=self.batches)
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.classifier.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        check_optimizer(self.optimizer, self.config.optimizer.model_dump(exclude={"lr"}))
        self.meter = Meter(state["meter"])

    def epoch_batches(self) -> Generator[None]:
        """Trains the rest of the current epoch; yields after each batch, with `batch` counting it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.classifier.train()
        batches = self.split.batches(
            seed=self.config.seed, epoch=self.epoch, batch=self.config.batch, device=self.device, start=self.batch
        )
        with closing(batches):  # and with it the processes that read, whatever happens here
            for images, labels in batches:
                for chunk, (part, answers) in enumerate(zip(images.chunk(self.chunks), labels.chunk(self.chunks), strict=True)):
                    self._step(part, answers, chunk)
                self.batch += 1
                yield

    def _step(self, images: Tensor, labels: Tensor, chunk: int) -> None:
        """One optimiser step on a chunk: images (batch, channel, height, width), labels (batch,)."""
        key = ("step", self.epoch, self.batch, chunk)
        torch.manual_seed(derive(self.config.seed, "global", *key))  # dropout and the like
        random = generator(self.device, self.config.seed, *key)
        noise = self.resolved.noise.sample((self.resolved.loss.m, *images.shape), generator=random, device=self.device)
        images = images.contiguous(memory_format=self.layout)
        step = TrainStep(self.classifier, images, labels, noise, self.resolved.noise.sigma, self.epoch, self.drops, random)
        if self.resolved.attack is not None:
            step = replace(step, images=attacked(self.resolved.attack, step))
        terms = self.resolved.loss.step(step)
        loss = _total(terms)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        where = f"epoch {self.epoch + 1}, batch {self.batch + 1}, chunk {chunk + 1}"
        self.meter.add(terms, loss, step, where=where, lr=self.lr)


def attacked(attack: Attack, step: TrainStep) -> Tensor:
    """The images (batch, channel, height, width) that `attack` moves, checked; the model is left as it was.

    Raises `PluginError` if the attack returns another shape, or pixels outside [0, 1] or NaN.
    """
    with frozen(step.model):
        moved = attack.perturb(step).detach()
    name = type(attack).__name__
    if moved.shape != step.images.shape:
        raise PluginError(f"the attack {name} returned images of shape {tuple(moved.shape)}, not {tuple(step.images.shape)}")
    low, high = torch.stack(torch.aminmax(moved)).tolist()  # the host waits once for a whole attack
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise PluginError(f"the attack {name} returned pixels from {low:g} to {high:g}: they must be in [0, 1]")
    return moved


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """While the body runs, `model` is in eval mode and its parameters need no gradient; both are restored exactly."""
    modes = [(module, module.training) for module in model.modules()]
    needs = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, need in needs:
            parameter.requires_grad_(need)


def _total(terms: dict[str, Tensor]) -> Tensor:
    if not terms or any(term.ndim for term in terms.values()):
        shapes = {name: tuple(term.shape) for name, term in terms.items()}
        raise PluginError(f"a loss must return at least one named scalar; this one returned {shapes}")
    return torch.stack(list(terms.values())).sum()


def _run(trainer: Trainer, folder: RunFolder, progress: Progress, stop: StopRequest) -> None:
    """Epoch after epoch, with a checkpoint after each and one when asked to stop."""
    total = trainer.batches * trainer.config.epochs
    progress.start("train", total, trainer.epoch * trainer.batches + trainer.batch, "batch")
    try:
        while trainer.epoch < trainer.config.epochs:
            began, first = time.monotonic(), trainer.meter.images
            with closing(trainer.epoch_batches()) as batches:
                for _ in batches:
                    speed = (trainer.meter.images - first) / max(time.monotonic() - began, 1e-9)
                    done = trainer.epoch * trainer.batches + trainer.batch
                    figures = {"epoch": str(trainer.epoch + 1), **trainer.meter.figures(), "images/s": f"{speed:.0f}"}
                    progress.update(done, figures)
                    if stop.requested and trainer.batch < trainer.batches:
                        _stop(trainer, folder, stop)
            line = {"epoch": trainer.epoch + 1, "lr": trainer.lr, **trainer.meter.means()}
            folder.log({**line, "images_per_s": round(speed, 1), "seconds": round(time.monotonic() - began, 3)})
            trainer.epoch, trainer.batch, trainer.meter = trainer.epoch + 1, 0, Meter()
            folder.save(trainer.state())
            if stop.requested and trainer.epoch < trainer.config.epochs:
                _stop(trainer, folder, stop, saved=True)
    finally:
        progress.finish()


def _stop(trainer: Trainer, folder: RunFolder, stop: StopRequest, *, saved: bool = False) -> None:
    if not saved:
        trainer.meter.flush()
        folder.save(trainer.state())
    where = f"epoch {trainer.epoch + 1}, batch {trainer.batch}"
    hint = "The same command with --resume goes on from there."
    raise Stopped(f"stopped as asked, at {where}; saved in {folder.path}", hint, exit_code=stop.exit_code)
