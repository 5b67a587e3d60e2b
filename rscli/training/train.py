"""Training, or continuing, a run: from a resolved configuration to a model file in its run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rscli import __version__
from rscli.api import DataSpec
from rscli.config.layers import Resolved
from rscli.config.schema import steps_per_epoch
from rscli.data.splits import open_split, spec_of
from rscli.data.subset import limited
from rscli.errors import InputError, Stopped
from rscli.models.card import ModelCard
from rscli.models.modelfile import save_model, tensor_digest
from rscli.models.network import parameter_count
from rscli.plugin_files import from_file
from rscli.runtime.devices import environment, pick_device
from rscli.runtime.guard import calling
from rscli.runtime.memory import enough_memory
from rscli.runtime.progress import Progress
from rscli.runtime.signals import StopRequest, stop_requests
from rscli.runtime.torchrun import world_size
from rscli.training.checkpoint import fitting
from rscli.training.context import SetupContext
from rscli.training.minimum_batch import check_single_image_batches
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


def outlook(resolved: Resolved, options: TrainOptions) -> Outlook:
    """Builds the network and counts, without reading images or writing anything.

    Raises `InputError` if the network cannot be trained on the smallest step, or the attack not with so few copies.
    """
    _check_copies(resolved)
    spec = spec_of(resolved.dataset, options.data_dir)
    images = spec.sizes.get("train")
    if images is not None and resolved.config.limit is not None:
        images = min(images, resolved.config.limit)
    chunks = resolved.loss.m if resolved.chunked else 1
    steps = None if images is None else steps_per_epoch(images, resolved.config.batch, chunks)
    classifier = initial_classifier(resolved, spec)
    if images:
        check_single_image_batches(resolved, classifier, spec, images)
    return Outlook(parameter_count(classifier), images, steps, chunks, RunFolder(options.out).files())


def _check_copies(resolved: Resolved) -> None:
    """Raises `InputError` if the attack needs more noisy copies of an image than the loss has."""
    attack, m = resolved.attack, resolved.loss.m
    if attack is not None and m < attack.min_m:
        name = (resolved.config.attack or {})["name"]
        hint = f"Write --set loss.m={attack.min_m} or more, or choose another attack."
        raise InputError(f"the attack {name!r} compares {attack.min_m} noisy copies of an image or more, but m = {m}", hint)


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


def record_of(resolved: Resolved) -> dict[str, Any]:
    """What a run folder keeps of the configuration, and a run must share to go on there."""
    files = {origin.package: origin.version for origin in resolved.provenance if from_file(origin.version)}
    return {"config": resolved.as_dict(), "sources": resolved.sources, "plugin_files": files}


def _train(resolved: Resolved, options: TrainOptions, progress: Progress, stop: StopRequest) -> Path:
    _check_copies(resolved)
    device = pick_device(options.device)
    spec = spec_of(resolved.dataset, options.data_dir)
    split = open_split(resolved.dataset, spec, "train", options.data_dir, download=options.download, workers=options.workers)
    if split.note:
        progress.warn(split.note)
    split = limited(split, resolved.config.limit)
    trainer = Trainer(resolved, spec, split, device, channels_last=options.channels_last)
    check_single_image_batches(resolved, trainer.classifier, spec, len(split))
    folder = RunFolder(options.out)
    record = record_of(resolved)
    state = folder.open(record, trainer.data, resume=options.resume, overwrite=options.overwrite)
    if state is not None and folder.model.exists() and state["epoch"] >= resolved.config.epochs:
        progress.note(f"{folder.model} is finished already")
        return folder.model
    more = partial(open_split, resolved.dataset, spec, root=options.data_dir, workers=options.workers)
    run = TrainingRun(trainer, folder, more, progress, stop)
    context = SetupContext(split, resolved.noise, device, resolved.config.seed, progress, stop)
    with calling(resolved.loss, "networks"):
        trainer.networks = {name: network.to(device) for name, network in resolved.loss.networks(context).items()}
    if state is None:
        with calling(resolved.loss, "setup"), enough_memory(device, "what the loss prepares", TOO_LARGE):
            trainer.loss_state = {name: tensor.to(device) for name, tensor in resolved.loss.setup(context).items()}
        folder.start(record, environment(device), overwrite=options.overwrite)
    else:
        if "data" not in state:
            progress.note(f"{folder.checkpoint} is of an older version: whether it is intact, and of this data, cannot be told")
        with fitting(folder.checkpoint):
            trainer.restore(state)
            run.restore(state)
        progress.note(f"resumed after epoch {trainer.epoch}, batch {trainer.batch}")
    size = math.ceil(resolved.config.batch / trainer.chunks)
    with (
        folder.at_work(progress),
        enough_memory(device, f"a step of {size} images with {resolved.loss.m} noisy copies each", TOO_LARGE),
    ):
        run.complete()
    save_model(folder.model, trainer.classifier, model_card(resolved, spec, trainer.loss_state))
    return folder.model


def model_card(resolved: Resolved, spec: DataSpec, loss_state: Mapping[str, Tensor]) -> ModelCard:
    """What the model file of a finished run says of itself; of what the loss kept, the digests."""
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
        preset=resolved.preset,
        overrides=resolved.overrides if resolved.preset else None,
        loss_state={name: tensor_digest({name: tensor}) for name, tensor in loss_state.items()},
    )
