"""The state of a training run, and its optimiser steps: noisy copies, an optional attack, a loss, a step.

Every random draw has a key made of the seed, the epoch, the batch and the chunk (`rscli.runtime.seeds`), and of the image's
place in it: so a run stopped between two batches continues exactly where it was, and any number of processes computes the same
objective. It is not the same to the last bit: sums over images are put together in another order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rscli.api import DataSpec, Noise, Position, TrainStep
from rscli.config.layers import Resolved
from rscli.data.splits import Batch, Split
from rscli.models.initial import start_from
from rscli.models.modelfile import tensor_digest
from rscli.models.network import Classifier, build_classifier, head_of
from rscli.runtime.devices import tf32_only_if
from rscli.runtime.guard import broken, calling, number
from rscli.runtime.seeds import derive, generator
from rscli.training.checkpoint import check_optimizer, check_place, settings_of, training_data
from rscli.training.draws import StepDraws
from rscli.training.freezing import freeze
from rscli.training.layout import training_layout
from rscli.training.metrics import Meter
from rscli.training.objective import Objective, attacked
from rscli.training.precision import Forward, compiled, gradient_scaler
from rscli.training.processes import Processes
from rscli.training.ramps import ramped


def initial_classifier(resolved: Resolved, spec: DataSpec) -> Classifier:
    """The classifier with the initial weights of the run's seed, or those that it is to start from; what stays is frozen."""
    torch.manual_seed(derive(resolved.config.seed, "weights"))
    classifier = build_classifier(resolved.architecture, spec)
    start_from(classifier, resolved)
    freeze(classifier, resolved.config.freeze, lambda: head_of(resolved.architecture, spec))
    return classifier


class Trainer:
    """Weights, optimiser and position of a run, and one epoch of it; the part of one of its `processes`."""

    def __init__(
        self,
        resolved: Resolved,
        spec: DataSpec,
        split: Split,
        device: torch.device,
        *,
        channels_last: bool | None,
        compile: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self.resolved, self.config, self.split, self.device = resolved, resolved.config, split, device
        self.processes = processes or Processes()
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
        self.scaler = gradient_scaler(self.config.precision, device)
        self.model = Forward(compiled(self.classifier) if compile else self.classifier, self.config.precision, device)
        """What losses and attacks call."""
        self.objective = self.processes.average(Objective(self.model), device, shared_statistics=self.config.sync_batch_norm)
        self.trained = [(name, each) for name, each in self.classifier.named_parameters() if each.requires_grad]
        self.batches = split.steps(self.config.batch)
        self.epoch, self.batch = 0, 0
        self.on_figures: Callable[[Mapping[str, Any]], None] | None = None
        """Called with the figures of every step, when they are read from the device."""
        self.meter = self.new_meter()
        self.loss_state: dict[str, Tensor] = {}
        """What `Loss.setup` prepared, on the device."""
        self._seen: dict[str, int] = {}
        """Its versions, as they were when its processes were last found to agree."""
        self.networks: dict[str, nn.Module] = {}
        """What `Loss.networks` gave, on the device."""
        self.after_step: Callable[[], None] = lambda: None
        self.last_lr = 0.0
        """The learning rate of the last optimiser step."""

    def new_meter(self, state: dict[str, Any] | None = None) -> Meter:
        """The meter of a new epoch, or one that goes on from `state`."""
        return Meter(state, self.on_figures, self.processes.sum)

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
            **({} if self.scaler is None else {"scaler": self.scaler.state_dict()}),
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
        self.meter = self.new_meter(state["meter"])
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
        self.loss_state = {name: tensor.to(self.device) for name, tensor in state.get("loss", {}).items()}

    def epoch_batches(self) -> Generator[None]:
        """Trains the rest of the current epoch; yields after each batch, with `batch` counting it."""
        self.classifier.train()
        items = self.split.batches(
            seed=self.config.seed,
            epoch=self.epoch,
            batch=self.config.batch,
            device=self.device,
            start=self.batch,
            chunks=self.chunks,
            rank=self.processes.rank,
            world=self.processes.world,
        )
        with closing(items), tf32_only_if(self.config.precision == "tf32", self.device):  # whatever happens here, readers end
            position = self._next_position()
            for item in items:
                if item.number != self.batch:
                    self.batch += 1
                    yield
                    position = self._next_position()
                self._step(item, position)
            self.batch += 1
            yield

    def _next_position(self) -> Position:
        """Where the next batch is in the run; its learning rate is set."""
        self.last_lr = self.lr
        for group in self.optimizer.param_groups:
            group["lr"] = self.last_lr * group.get("lr_scale", 1)
        share = (self.epoch * self.batches + self.batch) / (self.config.epochs * self.batches)
        return Position(self.epoch, share, self.lr_factor)

    def _step(self, item: Batch, position: Position) -> None:
        """One optimiser step: this process's images of it, in micro-batches."""
        processes, config = self.processes, self.config
        alike = item.size < processes.world  # too few images to share: every process does all of them
        self.optimizer.zero_grad(set_to_none=True)
        objective, attack, noise = ramped(self.resolved, self.epoch + self.batch / self.batches)
        parts = _micro_batches(item, config.micro_batch, objective.m, 1 if alike else processes.world)
        values: dict[str, Tensor] = {}
        for place, part in enumerate(parts):
            self._seed_globally(item, place, 0 if alike else processes.rank)
            step = self._train_step(part, position, noise, objective.m)
            if attack is not None:
                step = attacked(attack, step)
            share = len(part.labels) / item.size * (1 if alike else processes.world)
            shared = config.sync_batch_norm and not alike
            with (
                processes.gathering(self.objective, last=place == len(parts) - 1),
                processes.together(shared_statistics=shared),
            ):
                terms = self.objective(objective, step)
                loss = torch.stack(list(terms.values())).sum()
                self._backward(loss * share if share != 1 else loss)  # in here, as checkpointed layers run once more
            for name, value in _figures(terms, loss, step).items():
                values[name] = values.get(name, 0) + value * (len(part.labels) / item.size / (processes.world if alike else 1))
        processes.check_gradients(self.trained)
        self._follow_gradients(values)
        where = {"epoch": self.epoch + 1, "batch": self.batch + 1, "chunk": item.chunk + 1, "lr": self.last_lr}
        self.meter.add(values, item.size, where=where)
        self.after_step()

    def _seed_globally(self, item: Batch, part: int, rank: int) -> None:
        """Seeds what draws from torch's global generator: dropout and the like, of its own for each `rank`."""
        key = ("step", self.epoch, item.number, item.chunk)
        own = (rank, part) if rank or part else ()
        torch.manual_seed(derive(self.config.seed, "global", *key, *own))

    def _train_step(self, part: Batch, position: Position, smoothing: Noise, m: int) -> TrainStep:
        """What losses and attacks see of the images of `part`."""
        key = ("step", self.epoch, part.number, part.chunk)
        images = part.images.contiguous(memory_format=self.layout)
        draws = StepDraws(
            smoothing,
            images.shape[1:],
            first=part.first,
            end=part.first + len(images),
            size=part.size,
            seed=self.config.seed,
            key=key,
            device=self.device,
        )
        return TrainStep(
            model=self.model,
            images=images,
            clean=images,
            labels=part.labels,
            indices=part.indices,
            noise=draws.noise(m),
            smoothing=smoothing,
            generator=generator(self.device, self.config.seed, *key),
            position=position,
            state=self.loss_state,
            networks=self.networks,
            draws=draws,
            gather=None if part.size < self.processes.world else partial(self.processes.rows, first=part.first, size=part.size),
        )

    def check_loss_state(self) -> None:
        """Raises `PluginError` if the loss has changed its state, and not in the same way in every process."""
        versions = {name: tensor._version for name, tensor in self.loss_state.items() if not tensor.is_inference()}
        changed, self._seen = versions != self._seen, versions
        if self.processes.world == 1 or not self.processes.any([changed])[0]:
            return
        digest = tensor_digest(self.loss_state)
        if self.processes.any([digest != self.processes.share(digest)])[0]:
            what = "changed its state otherwise in one process than in another; it must change it by what step.gathered gives"
            raise broken(self.resolved.loss, "step", what)

    def _backward(self, loss: Tensor) -> None:
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]

    def _follow_gradients(self, values: dict[str, Tensor]) -> None:
        """The optimiser's step; with a largest norm of the gradient, the norm before it was shortened is added to `values`."""
        if self.config.clip_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.classifier.parameters(), self.config.clip_norm)
            if self.scaler is not None:  # it skips the step, and training goes on
                norm = torch.where(norm.isfinite(), norm, 0)
            values["grad_norm"] = norm / self.processes.world  # the same in all of them, and summed over them
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()


def _micro_batches(item: Batch, most: int | None, m: int, world: int) -> list[Batch]:
    """The images of `item` in parts of nearly equal size, whose `m` copies each are at most `most` noisy images.

    All of `world` processes have the same number of parts, because layers that share statistics wait for each other. So a part
    has one image at least, and two if only some processes have an image more than others.
    """
    if most is None:
        return [item]
    images, largest = len(item.labels), -(-item.size // world)
    count = min(-(-largest // max(1, most // m)), item.size // world)
    edges = [place * images // count for place in range(count + 1)]
    return [item.part(begin, end) for begin, end in pairwise(edges)]


def _figures(terms: Mapping[str, Tensor], loss: Tensor, step: TrainStep) -> dict[str, Tensor]:
    """The loss, its terms and the accuracy under noise: scalars, detached. The accuracy only if the loss asked for the logits
    of the noisy images: no forward just for the log.
    """
    found = {"loss": loss, **terms}
    if "noisy_logits" in step.__dict__:
        found["accuracy"] = (step.noisy_logits.argmax(-1) == step.labels).float().mean()
    return {name: value.detach().float() for name, value in found.items()}
