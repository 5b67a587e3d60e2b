"""A trial of some steps before a run: which memory layout trains a network faster on a device, and whether to compile it.

It is done only where it is asked for (`--autotune`): a choice by the clock makes the last bits of a run depend on the clock.
The choice is kept in the run folder, and a run that goes on follows it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import nn

from rscli.api import DataSpec
from rscli.config.layers import Resolved
from rscli.runtime.devices import memory_layout
from rscli.runtime.progress import Progress
from rscli.training.layout import unsafe_in_channels_last
from rscli.training.precision import Forward, compiled

ROUNDS = 3
LONG = 1800.0
"""Seconds of a run from which on compilation is tried: it takes a minute or two."""
CLEARLY = 0.95
"""A way other than the usual one must take at most this share of its time."""


class Execution(NamedTuple):
    """How a network is run in training: its memory layout (None: the usual one), and whether it is compiled."""

    channels_last: bool | None
    compile: bool


def fastest(
    resolved: Resolved, network: nn.Module, spec: DataSpec, device: torch.device, progress: Progress, *, rows: int, steps: int
) -> Execution:
    """The fastest way to take `steps` steps of `rows` noisy images each with `network`, which stays as it is.

    Forward and backward of a cross-entropy are timed, in turns; attacks and other terms cost as many forwards and backwards in
    every way. The usual way stays unless another one is clearly faster.
    """
    usual = unsafe_in_channels_last(network) is None or device.type != "cpu"
    ways = [Execution(layout, False) for layout in ((True, False) if usual else (False,))]
    seconds = _timed(resolved, network, spec, device, rows, ways)
    best = min(ways, key=lambda way: seconds[way] / (1 if way == ways[0] else CLEARLY))
    if seconds[best] * steps > LONG:
        progress.note("the trial compiles the network, which takes a minute or two")
        other = best._replace(compile=True)
        seconds |= _timed(resolved, network, spec, device, rows, [other])
        best = other if seconds[other] < CLEARLY * seconds[best] else best
    shown = "; ".join(f"{_name(way)} {1000 * took:.3g} ms" for way, took in seconds.items())
    progress.note(f"a step takes: {shown}; training is {_name(best)}")
    return best


def _timed(
    resolved: Resolved, network: nn.Module, spec: DataSpec, device: torch.device, rows: int, ways: Iterable[Execution]
) -> dict[Execution, float]:
    """The least seconds of a step in each way, over rounds in which they take turns."""
    models = {way: _model(resolved, network, device, way) for way in ways}
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    found: dict[Execution, list[float]] = {way: [] for way in models}
    for turn in range(ROUNDS + 1):
        for way, model in models.items():
            images = torch.rand(rows, *spec.shape, device=device).to(
                memory_format=memory_layout(way.channels_last is not False)
            )
            began = time.perf_counter()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            loss.item()  # waits for the device
            if turn:  # the first is slower
                found[way].append(time.perf_counter() - began)
    return {way: min(times) for way, times in found.items()}


def _model(resolved: Resolved, network: nn.Module, device: torch.device, way: Execution) -> nn.Module:
    made = deepcopy(network).train().to(memory_format=memory_layout(way.channels_last is not False))
    return Forward(compiled(made) if way.compile else made, resolved.config.precision, device)


def _name(way: Execution) -> str:
    return ("channels-last" if way.channels_last is not False else "contiguous") + (", compiled" if way.compile else "")
