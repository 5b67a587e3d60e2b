"""Training, or continuing, a run: from a resolved configuration to a model file in its run folder."""

from __future__ import annotations

import math
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rscli.config.layers import Resolved
from rscli.config.schema import steps_per_epoch
from rscli.data.splits import Split, check_holdout, open_split, set_aside, spec_of
from rscli.data.subset import limited
from rscli.errors import InputError, Stopped
from rscli.models.network import LARGE, parameter_count
from rscli.plugin_files import from_file
from rscli.runtime.devices import emulated, environment, pick_device
from rscli.runtime.files import read_json
from rscli.runtime.guard import calling
from rscli.runtime.memory import enough_memory
from rscli.runtime.progress import Progress, Silent
from rscli.runtime.signals import StopRequest, stop_requests
from rscli.sampling.certifiable import check_certifiable, why_not_certifiable
from rscli.training.autotune import Execution, fastest
from rscli.training.checkpoint import FORMAT, fitting
from rscli.training.context import SetupContext
from rscli.training.minimum_batch import check_single_image_batches
from rscli.training.processes import Processes, joined
from rscli.training.run import TrainingRun
from rscli.training.run_folder import RunFolder
from rscli.training.trainer import Trainer, initial_classifier

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
    compile: bool = False
    profile: bool = False
    autotune: bool = False
    resume: bool = False
    overwrite: bool = False
    download: bool = False


@dataclass(frozen=True)
class Outlook:
    """What a run would do: for the dry run."""

    parameters: int
    images: int | None
    steps_per_epoch: int | None
    chunks: int
    files: list[Path]
    notes: tuple[str, ...] = ()


def outlook(resolved: Resolved, options: TrainOptions) -> Outlook:
    """Builds the network and counts, without reading images or writing anything.

    Raises `InputError` if the network cannot be trained on the smallest step, or the attack not with so few copies.
    """
    _check_copies(resolved)
    spec = spec_of(resolved.dataset, options.data_dir)
    images = spec.sizes.get("train")
    if images is not None:
        images = min(images, resolved.config.limit or images)
        check_holdout(resolved.config.holdout, images)
        images -= resolved.config.holdout
    chunks = resolved.loss.m if resolved.chunked else 1
    steps = None if images is None else steps_per_epoch(images, resolved.config.batch, chunks)
    classifier = initial_classifier(resolved, spec)
    if math.prod(spec.shape) <= LARGE:  # larger ones would take the memory that a dry run does without
        check_certifiable(classifier, spec.shape, torch.device("cpu"))
    if images:
        check_single_image_batches(resolved, classifier, spec, images)
    return Outlook(parameter_count(classifier), images, steps, chunks, RunFolder(options.out).files(), classifier.start.notes)


def _check_copies(resolved: Resolved) -> None:
    """Raises `InputError` if the attack needs more noisy copies of an image than the loss has."""
    attack, m = resolved.attack, resolved.loss.m
    if attack is not None and m < attack.min_m:
        name = (resolved.config.attack or {})["name"]
        hint = f"Write --set loss.m={attack.min_m} or more, or choose another attack."
        raise InputError(f"the attack {name!r} compares {attack.min_m} noisy copies of an image or more, but m = {m}", hint)


def train(resolved: Resolved, options: TrainOptions, progress: Progress) -> Path:
    """Trains, or continues a run; returns the path of the model file. Under torchrun, each process does its part.

    Raises `InputError` for data or a run folder that do not fit, `Stopped` when asked to stop (the state is saved), and
    `RscliError` when the loss is no longer finite.
    """
    _check_copies(resolved)
    with stop_requests() as stop:
        device = pick_device(options.device)
        processes = joined(stop, progress.note, device)
        with processes.failing_together():
            model = _Training(resolved, options, progress if processes.first else Silent(), stop, device, processes).complete()
            if processes.any([stop.requested])[0]:  # all or none: one that stops would end the others
                raise Stopped(f"stopped as asked, when {model} was just finished", exit_code=stop.exit_code)
    return model


def record_of(resolved: Resolved) -> dict[str, Any]:
    """What a run folder keeps of the configuration, and a run must share to go on there."""
    files = {origin.package: origin.version for origin in resolved.provenance if from_file(origin.version)}
    return {"config": resolved.as_dict(), "sources": resolved.sources, "plugin_files": files}


class _Training:
    """One run, from its data to its model file."""

    def __init__(
        self,
        resolved: Resolved,
        options: TrainOptions,
        progress: Progress,
        stop: StopRequest,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self.resolved, self.options, self.progress, self.stop = resolved, options, progress, stop
        self.device, self.processes, self.folder = device, processes, RunFolder(options.out)
        self.record = record_of(resolved)

    def complete(self) -> Path:
        """Trains to the end, and writes the model file."""
        self._warn_of_emulation()
        split = limited(self._open_split(), self.resolved.config.limit)
        holdout = None
        if self.resolved.config.holdout:
            split, holdout = set_aside(split, self.resolved.config.holdout, self.resolved.config.seed)
        self.execution = self._execution(split)
        trainer = Trainer(
            self.resolved,
            split.spec,
            split,
            self.device,
            channels_last=self.execution.channels_last,
            compile=self.execution.compile,
            processes=self.processes,
        )
        start = trainer.classifier.start
        for text in start.notes:
            self.progress.note(text)
        self.record["init_sha256"] = start.sha256
        check_certifiable(trainer.classifier, split.spec.shape, self.device)
        check_single_image_batches(self.resolved, trainer.classifier, split.spec, len(split))
        state, finished = self._found(trainer)
        if finished:
            self.progress.note(f"{self.folder.model} is finished already")
            return self.folder.model
        more = partial(open_split, self.resolved.dataset, split.spec, root=self.options.data_dir, workers=self.options.workers)
        run = TrainingRun(trainer, self.folder, more, self.progress, self.stop, holdout)
        run.profile = self.folder.trace if self.options.profile and self.processes.first else None
        self._prepare(trainer, run, state)
        size = math.ceil(self.resolved.config.batch / trainer.chunks / self.processes.world)
        if self.resolved.config.micro_batch is not None:
            size = min(size, max(1, self.resolved.config.micro_batch // self.resolved.loss.m))
        copies = f"a forward of {size} images with {self.resolved.loss.m} noisy copies each"
        at_work = self.folder.at_work(self.progress) if self.processes.first else nullcontext()
        failing_together = self.processes.failing_together()  # inside: the folder says what another process failed with
        with closing(split), at_work, failing_together, enough_memory(self.device, copies, TOO_LARGE):
            run.complete()
        if self.processes.first:
            run.write_model(self.folder.model)
            if why := why_not_certifiable(trainer.classifier, split.spec.shape, self.device):
                self.progress.warn(f"{self.folder.model} cannot be certified: {why}")
        self.processes.wait()
        return self.folder.model

    def _open_split(self) -> Split:
        """The training images; if they must be fetched, the first process does it while the others wait."""
        options = self.options
        spec = spec_of(self.resolved.dataset, options.data_dir)

        def opened(download: bool) -> Split:
            return open_split(
                self.resolved.dataset, spec, "train", options.data_dir, download=download, workers=options.workers
            )

        if not self.processes.first:
            self.processes.wait()
            return opened(False)
        split = opened(options.download)
        self.processes.wait()
        if split.note:
            self.progress.warn(split.note)
        return split

    def _found(self, trainer: Trainer) -> tuple[dict[str, Any] | None, bool]:
        """The checkpoint to go on from, if any, and whether the run is finished already; a new run has begun then."""
        state = None
        if self.processes.first:
            state = self.folder.open(self.record, trainer.data, resume=self.options.resume, overwrite=self.options.overwrite)
        state = self.processes.share(state)
        ended = state is not None and (state["epoch"] >= self.resolved.config.epochs or "ended" in state)
        finished = ended and self.folder.model.exists()
        return state, self.processes.share(finished)

    def _prepare(self, trainer: Trainer, run: TrainingRun, state: dict[str, Any] | None) -> None:
        """What the loss needs, and the state of a run that goes on; a new run begins here."""
        loss, device = self.resolved.loss, self.device
        context = SetupContext(trainer.split, self.resolved.noise, device, self.resolved.config.seed, self.progress, self.stop)
        with calling(loss, "networks"):
            trainer.networks = {name: network.to(device) for name, network in loss.networks(context).items()}
        if state is None:
            prepared: dict[str, Tensor] = {}
            if self.processes.first:
                with calling(loss, "setup"), enough_memory(device, "what the loss prepares", TOO_LARGE):
                    prepared = {name: tensor.cpu() for name, tensor in loss.setup(context).items()}
                self.folder.start(self.record, self._environment(), overwrite=self.options.overwrite)
            trainer.loss_state = {name: tensor.to(device) for name, tensor in self.processes.share(prepared).items()}
            return
        if "data" not in state:
            text = f"{self.folder.checkpoint} is of an older version: whether it is intact, and of this data, cannot be told"
            self.progress.note(text)
        if state.get("format", FORMAT) < FORMAT:
            text = "it is of an older version, which drew other random numbers: the run goes on, but not to the same bits"
            self.progress.note(f"{self.folder.checkpoint}: {text}")
        with fitting(self.folder.checkpoint):
            trainer.restore(state)
            run.restore(state)
        self.progress.note(f"resumed after epoch {trainer.epoch}, batch {trainer.batch}")

    def _environment(self) -> dict[str, Any]:
        """What the figures of the run may depend on besides its configuration."""
        chosen = {"execution": self.execution._asdict()} if self.options.autotune else {}
        return {
            **environment(self.device),
            "processes": self.processes.world,
            "compiled": self.execution.compile,
            **chosen,
        }

    def _execution(self, split: Split) -> Execution:
        """Layout and compilation: as a trial chose when this run began, or chooses now if asked for; or as the options say.

        The trial happens in the first process, and leaves the run's random numbers as they are.
        """
        options = self.options
        if not options.autotune:
            return Execution(options.channels_last, options.compile)
        if not self.processes.first:
            return self.processes.share(Execution(None, False))
        known = read_json(self.folder.environment, "environment of the run") if self.folder.environment.exists() else {}
        before = known.get("execution") if isinstance(known, dict) and options.resume else None
        if isinstance(before, dict) and set(before) == set(Execution._fields):
            return self.processes.share(Execution(**before))
        chunks = self.resolved.loss.m if self.resolved.chunked else 1
        images = math.ceil(min(self.resolved.config.batch, len(split)) / chunks / self.processes.world)
        rows = images * self.resolved.loss.m
        steps = split.steps(self.resolved.config.batch) * chunks * self.resolved.config.epochs
        with torch.random.fork_rng(devices=[]):
            network = initial_classifier(self.resolved, split.spec).to(self.device)
            rows = min(rows, self.resolved.config.micro_batch or rows)
            found = fastest(self.resolved, network, split.spec, self.device, rows=rows, steps=steps, progress=self.progress)
        return self.processes.share(found)

    def _warn_of_emulation(self) -> None:
        if emulated(self.resolved.config.precision, self.device):
            self.progress.warn(
                f"{self.resolved.config.precision} is emulated on this processor, and many times slower than fp32: "
                "leave --precision out, or use a GPU"
            )
