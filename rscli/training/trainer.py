"""The state of a training run, and its optimiser steps: noisy copies, an optional attack, a loss, a step.

Every random draw has a key made of the seed, the epoch, the batch and the chunk (`rscli.runtime.seeds`), so a run
stopped between two batches continues exactly where it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rscli.api import Attack, DataSpec, Loss, Position, TrainStep
from rscli.config.layers import Resolved
from rscli.data.splits import Batch, Split
from rscli.models.initial import start_from
from rscli.models.network import Classifier, build_classifier, head_of
from rscli.runtime.guard import broken, calling, draw_noise, number
from rscli.runtime.seeds import derive, generator
from rscli.training.checkpoint import check_optimizer, check_place, settings_of, training_data
from rscli.training.freezing import freeze
from rscli.training.layout import training_layout
from rscli.training.metrics import Meter

RESERVED = {"loss", "accuracy", "epoch", "batch", "chunk", "lr", "images_per_s", "seconds"}
"""Figures that the log has for itself."""


def initial_classifier(resolved: Resolved, spec: DataSpec) -> Classifier:
    """The classifier with the initial weights of the run's seed, or those that it is to start from; what stays is frozen."""
    torch.manual_seed(derive(resolved.config.seed, "weights"))
    classifier = build_classifier(resolved.architecture, spec)
    start_from(classifier, resolved)
    freeze(classifier, resolved.config.freeze, lambda: head_of(resolved.architecture, spec))
    return classifier


class Trainer:
    """Weights, optimiser and position of a run, and one epoch of it."""

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
        with calling(resolved.optimizer, "build"):
            self.optimizer = resolved.optimizer.build(self.classifier)
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise broken(resolved.optimizer, "build", f"returned {self.optimizer!r:.80}, which is no optimiser of torch's")
        if inspect.signature(self.optimizer.step).parameters["closure"].default is inspect.Parameter.empty:
            raise broken(resolved.optimizer, "build", f"returned {type(self.optimizer).__name__}, whose step needs a closure")
        self.batches = split.steps(self.config.batch)
        self.epoch, self.batch = 0, 0
        self.on_figures: Callable[[Mapping[str, Any]], None] | None = None
        """Called with the figures of every step, when they are read from the device."""
        self.meter = Meter()
        self.loss_state: dict[str, Tensor] = {}
        """What `Loss.setup` prepared, on the device."""
        self.networks: dict[str, nn.Module] = {}
        """What `Loss.networks` gave, on the device."""
        self.after_step: Callable[[], None] = lambda: None
        self.last_lr = 0.0
        """The learning rate of the last optimiser step."""

    def new_meter(self) -> Meter:
        """The meter of a new epoch."""
        return Meter(on_figures=self.on_figures)

    @cached_property
    def data(self) -> dict[str, Any]:
        """What the run is trained on: see `training_data`."""
        return training_data(self.split)

    @property
    def lr_factor(self) -> float:
        """What the schedule multiplies the learning rate by now."""
        schedule = self.resolved.schedule
        with calling(schedule, "factor"):
            factor = schedule.factor(self.epoch + self.batch / self.batches, self.config.epochs)
        found = number(schedule, "factor", "a factor", factor)
        if found < 0:
            raise broken(schedule, "factor", f"gave {found}: a learning rate is never negative")
        return found

    @property
    def lr(self) -> float:
        """The learning rate now."""
        return self.resolved.optimizer.lr * self.lr_factor

    def state(self) -> dict[str, Any]:
        """All that a run needs to continue to the same bits; no generator has a state to save."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "data": self.data,
            "model": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meter": self.meter.state(),
            "loss": self.loss_state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from `state`. Raises what torch does, or `ValueError`, if it is not of this run."""
        check_place(state["epoch"], state["batch"], epochs=self.config.epochs, batches=self.batches)
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.classifier.load_state_dict(state["model"])
        wanted = settings_of(self.optimizer)
        self.optimizer.load_state_dict(state["optimizer"])
        if "data" not in state:  # a checkpoint of format 1, whose content nothing else vouches for
            check_optimizer(self.optimizer, wanted)
        self.meter = Meter(state["meter"], self.on_figures)
        self.loss_state = {name: tensor.to(self.device) for name, tensor in state.get("loss", {}).items()}

    def epoch_batches(self) -> Generator[None]:
        """Trains the rest of the current epoch; yields after each batch, with `batch` counting it."""
        self.classifier.train()
        batches = self.split.batches(
            seed=self.config.seed, epoch=self.epoch, batch=self.config.batch, device=self.device, start=self.batch
        )
        with closing(batches):  # and with it the processes that read, whatever happens here
            for batch in batches:
                position = self._next_position()
                for number, chunk in enumerate(_chunks(batch, self.chunks)):
                    self._step(chunk, number, position)
                self.batch += 1
                yield

    def _next_position(self) -> Position:
        """Where the next batch is in the run; its learning rate is set."""
        self.last_lr = self.lr
        for group in self.optimizer.param_groups:
            group["lr"] = self.last_lr * group.get("lr_scale", 1)
        share = (self.epoch * self.batches + self.batch) / (self.config.epochs * self.batches)
        return Position(self.epoch, share, self.lr_factor)

    def _step(self, chunk: Batch, number: int, position: Position) -> None:
        """One optimiser step on a chunk of a batch."""
        key = ("step", self.epoch, self.batch, number)
        torch.manual_seed(derive(self.config.seed, "global", *key))  # dropout and the like
        random = generator(self.device, self.config.seed, *key)
        smoothing, m = self.resolved.noise, self.resolved.loss.m
        noise = draw_noise(smoothing, (m, *chunk.images.shape), random, self.device)
        images = chunk.images.contiguous(memory_format=self.layout)
        step = TrainStep(
            model=self.classifier,
            images=images,
            clean=images,
            labels=chunk.labels,
            indices=chunk.indices,
            noise=noise,
            smoothing=smoothing,
            generator=random,
            position=position,
            state=self.loss_state,
            networks=self.networks,
        )
        if self.resolved.attack is not None:
            step = attacked(self.resolved.attack, step)
        terms = _terms(self.resolved.loss, step)
        loss = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        where = {"epoch": self.epoch + 1, "batch": self.batch + 1, "chunk": number + 1, "lr": self.last_lr}
        self.meter.add(terms, loss, step, where=where)
        self.after_step()


def attacked(attack: Attack, step: TrainStep) -> TrainStep:
    """The step that the loss trains on after `attack`, checked and detached; the model is left as it was.

    Raises `PluginError` if the attack returns something else, tensors of another shape, or pixels outside [0, 1] or NaN.
    """
    with step.frozen(), calling(attack, "perturb"), _untouched(attack, "perturb", step):
        moved = attack.perturb(step)
    if not isinstance(moved, TrainStep):
        raise broken(attack, "perturb", f"returned a {type(moved).__name__}: it must return step.moved(images=...)")
    for what in ("images", "noise"):
        here, there = getattr(step, what), getattr(moved, what)
        if not isinstance(there, Tensor) or there.dtype != here.dtype or there.device != here.device:
            raise broken(attack, "perturb", f"returned {what} that are no tensor of {here.dtype} on {here.device}")
        if there.shape != here.shape:
            raise broken(attack, "perturb", f"returned {what} of shape {tuple(there.shape)}, not {tuple(here.shape)}")
    images = moved.images.detach()
    low, high = torch.stack(torch.aminmax(images)).tolist()  # the host waits once for a whole attack
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise broken(attack, "perturb", f"returned pixels from {low:g} to {high:g}: they must be in [0, 1]")
    if not all(isinstance(tensor, Tensor) for tensor in moved.extra.values()):
        raise broken(attack, "perturb", f"added {', '.join(moved.extra)}, of which not all are tensors")
    extra = {key: tensor.detach() for key, tensor in moved.extra.items()}
    return replace(step, images=images, noise=moved.noise.detach(), extra=extra)


def _chunks(batch: Batch, count: int) -> Iterator[Batch]:
    """The batch in at most `count` chunks of equal size, the last possibly smaller."""
    parts = zip(batch.images.chunk(count), batch.labels.chunk(count), batch.indices.chunk(count), strict=True)
    return (Batch(*part) for part in parts)


def _terms(loss: Loss, step: TrainStep) -> dict[str, Tensor]:
    """The named terms of the objective. Raises `PluginError` unless they are scalars, at least one."""
    with calling(loss, "step"), _untouched(loss, "step", step):
        terms = loss.step(step)
    if not isinstance(terms, dict) or not all(isinstance(k, str) and isinstance(term, Tensor) for k, term in terms.items()):
        raise broken(loss, "step", f"returned {terms!r:.80}: it must return named scalars, such as {{'ce': ...}}")
    if not terms or any(term.ndim for term in terms.values()):
        shapes = {name: tuple(term.shape) for name, term in terms.items()}
        raise broken(loss, "step", f"must return at least one named scalar, and returned {shapes}")
    if taken := RESERVED & terms.keys() - ({"loss"} if len(terms) == 1 else set()):
        raise broken(loss, "step", f"calls a term {' and '.join(sorted(taken))}, which the log has for itself; call it ce, say")
    if not any(term.requires_grad for term in terms.values()):
        raise broken(loss, "step", "returned terms without gradients, from which nothing can be learned")
    return terms


@contextmanager
def _untouched(plugin: Attack | Loss, method: str, step: TrainStep) -> Iterator[None]:
    """Raises `PluginError` if the body changes the tensors of `step` in place: others are to see them, too."""
    handed = {name: getattr(step, name) for name in ("images", "clean", "labels", "noise")}
    before = {name: tensor._version for name, tensor in handed.items()}
    yield
    changed = [name for name, tensor in handed.items() if tensor._version != before[name]]
    if changed:
        raise broken(plugin, method, f"changed the step's {' and '.join(changed)} in place")
