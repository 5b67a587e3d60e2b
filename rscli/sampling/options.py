"""How samples are drawn: the options that certification and prediction share, and the sampler made of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rscli.errors import InputError, RscliError
from rscli.models.smoothed import Smoothed
from rscli.runtime.devices import check_precision, emulated, memory_layout, pick_device
from rscli.runtime.memory import enough_memory
from rscli.runtime.progress import Progress
from rscli.sampling.autotune import Choice, Make, Stop, speed_of, try_compiled, tune
from rscli.sampling.certifiable import check_certifiable
from rscli.sampling.sampler import Sampler
from rscli.sampling.threads import parallel_batches

BATCH = 256
"""The batch size of runs too short for a trial."""

COMPILE_SECONDS = 600.0
"""Runs that would take longer than this also try torch.compile, which itself takes up to a minute."""


@dataclass(frozen=True)
class Work:
    """What is to be sampled: so many samples by this process, at most.

    `early`: a sequential test may need far fewer. `long`: worth a trial.
    """

    samples: int
    early: bool = False
    long: bool = False


@dataclass(frozen=True)
class SamplingOptions:
    """How samples are drawn. Only `precision`, `seed` and the kind of device change what a certificate rests on.

    `batch`, `channels_last` and `compile` are kept if given; if not, they are those of the run that is resumed, or found by a
    trial (`autotune`; None: for long runs), or the usual ones. How many batches run in parallel is found likewise,
    and never more than torch has threads.
    """

    device: str = "auto"
    batch: int | None = None
    precision: str = "fp32"
    channels_last: bool | None = None
    seed: int = 0
    autotune: bool | None = None
    compile: bool | None = None

    def sampler(
        self, model: Smoothed, work: Work, before: Mapping[str, Any], progress: Progress, stop: Stop
    ) -> tuple[Sampler, Choice]:
        """A sampler of `model`, whose network is moved to the device, and how it was chosen.

        `before` is the `info` of a run that is continued; `stop` is asked during a trial, which it ends. Raises `InputError`
        for a device or precision that is unavailable, if the images' shape is unknown, or if a trial finds that the network
        cannot be certified; `RscliError` if torch.compile was asked for and cannot compile.
        """
        device = pick_device(self.device)
        check_precision(self.precision, device)
        if emulated(self.precision, device):
            progress.warn("this CPU has no instructions for bf16: it is emulated, several times slower than --precision fp32")
        shape = model.shape
        if shape is None:
            raise InputError("the shape of the images is unknown", "Give input_shape=(channel, height, width).")
        check_certifiable(model.network.to(device), shape, device)
        make = self._maker(model, device)
        batch = self.batch or before.get("batch")
        channels_last = self.channels_last if self.channels_last is not None else before.get("channels_last")
        compiled = self.compile if self.compile is not None else before.get("compile")
        parallel = parallel_batches(device)
        if before.get("trial") is not False and (before.get("lanes") or 1) < (before.get("threads") or 1):
            parallel = min(parallel, before["lanes"])  # a trial found that fewer are faster
        if self.autotune or (self.autotune is None and work.long and batch is None):
            choice = tune(make, device, shape, batch=batch, channels_last=channels_last, parallel=parallel, stop=stop)
        else:
            batch = batch or BATCH
            parallel = max(1, min(parallel, work.samples // batch))  # each with a batch of its own
            choice = Choice(batch, True if channels_last is None else channels_last, parallel)
            if work.long and not before:  # worth knowing what it will cost
                choice = replace(choice, speed=speed_of(make, choice, shape, stop))
        if compiled:
            choice = _compiled(make, choice, shape, stop)
        elif compiled is None and self._may_compile(work, choice):
            choice = _compiled_if_faster(make, choice, shape, progress, stop)
        with enough_memory(device, f"batches of {choice.batch:,} images", "Use smaller ones (--batch)."):
            return make(choice), choice

    def _may_compile(self, work: Work, choice: Choice) -> bool:
        """Whether a run is worth a trial of torch.compile, which in bf16 would change more than last bits."""
        long = choice.speed is not None and work.samples > COMPILE_SECONDS * choice.speed
        return long and not work.early and self.precision != "bf16" and self.autotune is not False

    def _maker(self, model: Smoothed, device: torch.device) -> Make:
        """What makes the sampler of a choice. All samplers share the network; it is moved to the layout of the latest."""
        network: nn.Module = model.network.to(device).eval()

        @cache
        def compiled() -> Callable[[Tensor], Tensor]:
            # one static shape; on CUDA, "reduce-overhead" replays the forward as a CUDA graph
            mode = "reduce-overhead" if device.type == "cuda" else "default"
            return OnceCompiled(torch.compile(network, mode=mode, dynamic=False))

        def make(choice: Choice) -> Sampler:
            network.to(memory_format=memory_layout(choice.channels_last))
            return Sampler(
                compiled() if choice.compiled else network,
                model.noise,
                model.classes,
                seed=self.seed,
                batch=choice.batch,
                device=device,
                precision=self.precision,
                channels_last=choice.channels_last,
                parallel=choice.parallel,
            )

        return make


class OnceCompiled:
    """A network by torch.compile that several threads call: one compiles each kind of batch, while the others wait.

    Without that, every thread that meets a new kind of batch before the first has compiled it compiles it again, one after the
    other.
    """

    def __init__(self, network: Callable[[Tensor], Tensor]) -> None:
        self._network = network
        self._lock = threading.Lock()
        self._known: set[tuple[object, ...]] = set()

    def __call__(self, images: Tensor) -> Tensor:
        """The logits (batch, classes) of `images` (batch, channel, height, width)."""
        kind = (images.shape, images.stride(), torch.get_num_threads())  # what a compiled network is good for
        if kind in self._known:
            return self._network(images)
        with self._lock:
            logits = self._network(images)
            self._known.add(kind)
        return logits


def _compiled_if_faster(make: Make, choice: Choice, shape: tuple[int, int, int], progress: Progress, stop: Stop) -> Choice:
    """Tries torch.compile; where it does not work (no compiler, an operation that it does not know), the run does without."""
    try:
        return try_compiled(make, choice, shape, stop)
    except Exception as cause:  # it fails in many ways, none of which matters here
        progress.note(f"trial: torch.compile does not work here and is left out ({_first_line(cause)})")
        return choice


def _compiled(make: Make, choice: Choice, shape: tuple[int, int, int], stop: Stop) -> Choice:
    """`choice`, compiled, with its speed. Raises `RscliError` where that does not work."""
    choice = replace(choice, compiled=True)
    try:
        return replace(choice, speed=speed_of(make, choice, shape, stop))
    except RscliError:
        raise
    except Exception as cause:
        hint = "Use --no-compile: it changes no vote, except where two logits are equal up to the last bits."
        raise RscliError(f"torch.compile cannot compile this model here: {_first_line(cause)}", hint) from cause


def _first_line(cause: Exception) -> str:
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)
