"""What a run costs, before it begins: passes of the network, floating-point operations, memory, and time."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from rscli.api import Loss, Passes
from rscli.config.layers import Resolved
from rscli.data.splits import open_split, set_aside, spec_of
from rscli.data.subset import limited
from rscli.errors import InputError
from rscli.runtime.devices import pick_device
from rscli.runtime.guard import broken, calling
from rscli.runtime.progress import Progress
from rscli.training.train import TrainOptions
from rscli.training.trainer import Trainer, initial_classifier


@dataclass(frozen=True)
class Cost:
    """What a run costs. Rows are noisy copies (or clean images) that pass the network; None: unknown.

    `trained_rows`, `attacked_rows` and `forward_rows` are those of an epoch, as in `rscli.api.Passes`; `epochs` as many.
    `forward_flops` are the operations of a forward of one image, a multiplication and an addition counted as two, of
    convolutions and matrix products alone. `training_flops` are those of the whole run: 3, 2 and 1 forwards for a row.
    `memory_bytes` is what a step holds on the device at least, in fp32: `weights_bytes` (weights, gradients and the optimiser's
    state) and `rows_in_step` (of a micro-batch, if there are any) times `row_bytes`, what autograd keeps of a row. Workspaces
    and the allocator come on top.
    """

    epochs: int
    trained_rows: float | None
    attacked_rows: float | None
    forward_rows: float | None
    forward_flops: int | None
    training_flops: float | None
    rows_in_step: float
    row_bytes: int | None
    weights_bytes: int | None
    memory_bytes: int | None

    def hours(self, tflops: float, utilization: float) -> float | None:
        """Hours of the run on a device of so many TFLOP/s, `utilization` (0 to 1) of which a network reaches."""
        return None if self.training_flops is None else self.training_flops / (tflops * 1e12 * utilization) / 3600


def cost_of(resolved: Resolved, options: TrainOptions, images: int | None) -> Cost:
    """What a run of `resolved` on `images` training images costs; the network is looked at on the meta device, where nothing
    is computed. Raises `InputError` for a data set that cannot say what it is.
    """
    spec = spec_of(resolved.dataset, options.data_dir)
    network = _on_meta(initial_classifier(resolved, spec))
    flops = None if network is None else forward_flops(network, spec.shape)
    row = None if network is None else kept_bytes(network, spec.shape)
    held = None if network is None else _weights_bytes(resolved, network)
    loss, attack, config = resolved.loss, resolved.attack, resolved.config
    own, more = loss.passes, Passes() if attack is None else attack.passes(loss.m)
    rows = own if more is None else Passes(*(a + b for a, b in zip(own, more, strict=True)))
    epoch = None if images is None or more is None else Passes(*(images * count for count in rows))
    forwards = None if epoch is None else 3 * epoch.trained + 2 * epoch.attacked + epoch.forward
    in_step = math.ceil(config.batch / (loss.m if resolved.chunked else 1)) * own.trained
    if config.micro_batch is not None:
        in_step = min(in_step, max(1, config.micro_batch // loss.m) * own.trained)
    return Cost(
        epochs=config.epochs,
        trained_rows=None if images is None else images * own.trained,
        attacked_rows=None if epoch is None else epoch.attacked,
        forward_rows=None if epoch is None else epoch.forward,
        forward_flops=flops,
        training_flops=None if forwards is None or flops is None else float(config.epochs * forwards * flops),
        rows_in_step=in_step,
        row_bytes=row,
        weights_bytes=held,
        memory_bytes=None if row is None or held is None else held + int(in_step * row),
    )


def _on_meta(classifier: nn.Module) -> nn.Module | None:
    """The classifier without its values; None if it cannot be there."""
    with suppress(Exception):  # a network of somebody else's may refuse with any exception
        return copy.deepcopy(classifier).to("meta")
    return None


def forward_flops(network: nn.Module, shape: tuple[int, int, int]) -> int | None:
    """The operations of a forward of one image of `shape` (channel, height, width), as torch's counter has them; None if the
    network does not run on the meta device.
    """
    device = next(network.parameters()).device
    with suppress(Exception), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, *shape, device=device))
        return int(counter.get_total_flops())
    return None


def kept_bytes(network: nn.Module, shape: tuple[int, int, int]) -> int | None:
    """What autograd keeps of one image of `shape` between forward and backward, its parameters apart, in bytes; None if the
    network does not say.

    Counted by storage, in train mode, as the difference between forwards of four images and of two: what is kept once, whatever
    the batch, does not count.
    """
    with suppress(Exception):
        four, two = (_kept(network, images, shape) for images in (4, 2))
        return (four - two) // 2
    return None


def _kept(network: nn.Module, images: int, shape: tuple[int, int, int]) -> int:
    own = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    network.train()
    device = next(network.parameters()).device
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = network(torch.zeros(images, *shape, device=device))
    found = sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in own)
    del logits
    return found


def _weights_bytes(resolved: Resolved, network: nn.Module) -> int | None:
    """Weights, their gradients, and what the optimiser keeps after a step, in bytes; None if that fails on the meta device."""
    with suppress(Exception):
        optimizer = resolved.optimizer.build(network)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        tensors: list[Any] = [*network.parameters(), *network.buffers()]
        tensors += [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        return sum(int(tensor.nbytes) for tensor in tensors)
    return None


def schedule_remark(resolved: Resolved) -> str | None:
    """What the schedule has to say of a run of so many epochs. Raises `PluginError` if it fails, or says anything but text."""
    with calling(resolved.schedule, "remark"):
        found = resolved.schedule.remark(resolved.config.epochs)
    if found is not None and not isinstance(found, str):
        raise broken(resolved.schedule, "remark", f"returned {found!r:.80}, which is no text")
    return found


# --- a trial -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What a trial measured: images per second, over `seconds`, and hours of the whole run at that speed."""

    images_per_s: float
    seconds: float
    hours: float


def trial(resolved: Resolved, options: TrainOptions, seconds: float, progress: Progress) -> Trial:
    """Trains for about `seconds` on the device, after a batch to warm up, and writes nothing.

    Neither callbacks nor loggers are called. Raises `InputError` for a loss that prepares something before a run, which a trial
    would do as well, and whatever opening the data raises.
    """
    loss = type(resolved.loss)
    if loss.setup is not Loss.setup or loss.networks is not Loss.networks:
        name = resolved.config.loss["name"]
        hint = "Leave out --trial."
        raise InputError(f"there is no trial of the loss {name!r}: it prepares something before the first step", hint)
    device = pick_device(options.device)
    spec = spec_of(resolved.dataset, options.data_dir)
    whole = open_split(resolved.dataset, spec, "train", options.data_dir, download=options.download, workers=options.workers)
    split = limited(whole, resolved.config.limit)
    if resolved.config.holdout:
        split, _ = set_aside(split, resolved.config.holdout, resolved.config.seed)
    trainer = Trainer(resolved, spec, split, device, channels_last=options.channels_last, compile=options.compile)
    with closing(_batch_sizes(trainer)) as sizes:
        next(sizes)
        trainer.meter.flush()  # waits for the device
        began, images, took = time.monotonic(), 0, 0.0
        progress.note(f"a trial of {seconds:g} seconds on {device}")
        while took < seconds:
            images += next(sizes)
            took = time.monotonic() - began
        trainer.meter.flush()
        took = time.monotonic() - began
    return Trial(images / took, took, resolved.config.epochs * len(split) * took / images / 3600)


def _batch_sizes(trainer: Trainer) -> Generator[int]:
    """Trains on and on in the first epoch; gives the images of each batch, when it is done."""
    while True:
        with closing(trainer.epoch_batches()) as batches:
            before = trainer.meter.images
            for _ in batches:
                yield trainer.meter.images - before
                before = trainer.meter.images
        trainer.batch = 0
