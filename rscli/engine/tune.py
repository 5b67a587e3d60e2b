"""How to run a network fastest here: a trial of a second or two, over batch sizes and memory layouts.

The best choice differs by machine and network (certification.md measured factors of 4 to 6 on one CPU), so it is measured and
reported, not assumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rscli.engine.devices import memory_layout, precision_scope

BATCHES = {"cpu": (64, 128, 256, 512), "cuda": (256, 512, 1024, 2048, 4096, 8192), "mps": (128, 256, 512, 1024)}
TRIAL_SECONDS = 0.15
"""The least time for one candidate."""


BATCH_SECONDS = 2e-4
"""What the engine does for a batch besides its samples (assembling, counting); measured on a CPU."""


@dataclass(frozen=True)
class Choice:
    """A batch size, a layout, and the forwards' samples a second that a trial measured (None: not tried)."""

    batch: int
    channels_last: bool
    speed: float | None = None


def tune(
    model: nn.Module,
    shape: tuple[int, int, int],
    device: torch.device,
    precision: str,
    *,
    batch: int | None = None,
    channels_last: bool | None = None,
) -> Choice:
    """The fastest choice for `model` on images `shape` (channel, height, width); what is given is kept.

    Both layouts are tried at one batch size, then the other batch sizes in the better layout, until one does not fit.
    """
    sizes = (batch,) if batch else BATCHES.get(device.type, BATCHES["cpu"])
    middle = sizes[len(sizes) // 2 - 1] if len(sizes) > 1 else sizes[0]
    layouts = (True, False) if channels_last is None else (channels_last,)
    measured = [Choice(middle, layout, _speed(model, shape, device, precision, middle, layout)) for layout in layouts]
    best = max(measured, key=_rank)
    for size in sizes:
        if size != middle:
            speed = _speed(model, shape, device, precision, size, best.channels_last)
            if speed is None:
                break  # out of memory: larger ones are, too
            best = max(best, Choice(size, best.channels_last, speed), key=_rank)
    return best


def _rank(choice: Choice) -> float:
    """Samples a second of the engine: the network's, less the time that is lost around every forward."""
    return choice.batch / (choice.batch / choice.speed + BATCH_SECONDS) if choice.speed else 0.0


def _speed(
    model: nn.Module, shape: tuple[int, int, int], device: torch.device, precision: str, batch: int, channels_last: bool
) -> float | None:
    """Samples a second of the bare network; None if the batch does not fit into memory."""
    layout = memory_layout(channels_last)
    try:
        model.to(memory_format=layout)
        images = torch.zeros(batch, *shape, device=device).contiguous(memory_format=layout)
        with torch.inference_mode(), precision_scope(precision, device):
            return batch / min(_timed(lambda: model(images), device))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def _timed(forward: Callable[[], Tensor], device: torch.device) -> Iterator[float]:
    """Seconds of each of at least two forwards, after one that is not counted."""
    forward()
    _wait(device)
    began, count = time.perf_counter(), 0
    while count < 2 or time.perf_counter() - began < TRIAL_SECONDS:
        start = time.perf_counter()
        forward()
        _wait(device)
        count += 1
        yield time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
