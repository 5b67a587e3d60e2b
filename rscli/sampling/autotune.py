"""How to sample fastest here: a trial of a few seconds, over memory layout, batch size, parallel batches and torch.compile.

The best choice differs by machine and network (bench/README.md has factors of 4 to 6 on one CPU), so it is measured and
reported, not assumed. What is measured is the engine itself, noise and counting included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rscli.runtime.memory import out_of_memory
from rscli.sampling.requests import Counts
from rscli.sampling.sampler import Sampler

BATCHES = {
    "cpu": (8, 16, 32, 64, 128, 256, 512),
    "cuda": (256, 512, 1024, 2048, 4096, 8192),
    "mps": (32, 64, 128, 256, 512, 1024),
}
SPAN = 8
"""The smallest batch size that is tried, but for the first probe, is the largest over this."""

TRIAL_SECONDS = 0.15
"""The least time for one candidate, after its first batches."""

SLOW_SECONDS = 1.0
"""Sizes at which a batch on every worker thread takes longer are not tried: a larger batch has nothing left to gain."""

RIVALS, NEAR, TURNS = 3, 0.9, 2
"""The fastest few, if they are so near to the fastest, are measured so many times more: a single measurement may be off by a
tenth."""

CLEARLY = 1.05
"""By what factor torch.compile must be faster: it costs its own time, and another network in the last bits."""


@dataclass(frozen=True)
class Choice:
    """How batches are classified: their size, memory layout, how many in parallel, and whether by torch.compile.

    `speed`: the samples per second that a trial measured (None: not tried).
    """

    batch: int
    channels_last: bool
    parallel: int = 1
    compiled: bool = False
    speed: float | None = None

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        parallel = "" if self.parallel == 1 else f", {self.parallel} batches in parallel"
        return f"batch size {self.batch}, {layout}{parallel}{', compiled' if self.compiled else ''}"


Make = Callable[[Choice], Sampler]
"""Makes the sampler of a choice."""


Stop = Callable[[], bool]
"""Whether to stop: asked before every chunk of samples."""


def tune(
    make: Make,
    device: torch.device,
    shape: tuple[int, int, int],
    *,
    batch: int | None,
    channels_last: bool | None,
    parallel: int,
    stop: Stop = lambda: False,
) -> Choice:
    """The fastest choice for images `shape` (channel, height, width); what is given is kept, `parallel` is the most.

    A probe of the smallest batch size tells which others are worth trying. Both layouts are tried at the smallest of these,
    then the others in the better layout, until one does not fit; then fewer in parallel, each with more of torch's threads.
    Those that come out on top are measured again.
    """
    layouts = (True, False) if channels_last is None else (channels_last,)
    sizes = (batch,) if batch else BATCHES.get(device.type, BATCHES["cpu"])

    def measured(choice: Choice) -> Choice:
        return replace(choice, speed=speed_of(make, choice, shape, stop))

    best = measured(Choice(sizes[0], layouts[0], parallel))
    sizes = tuple(size for size in sizes if size * parallel <= SLOW_SECONDS * _rank(best)) or sizes[:1]
    first, *others = [size for size in sizes if size * SPAN >= sizes[-1]]
    both = [Choice(first, layout, parallel) for layout in layouts]
    found = [best, *(measured(choice) for choice in both if choice != replace(best, speed=None))]
    best = max(found, key=_rank)
    for size in others:
        found.append(measured(Choice(size, best.channels_last, parallel)))
        if found[-1].speed is None:
            break  # out of memory: larger ones are, too
    best = max(found, key=_rank)
    fewer = {parallel // 4, 1} - {0, parallel}
    return _settled([*found, *(measured(replace(best, parallel=count)) for count in sorted(fewer))], measured)


def _settled(found: list[Choice], measured: Callable[[Choice], Choice]) -> Choice:
    """The fastest of `found`, with those near to it measured again, in turns, if that is a matter of a moment."""
    best = max(found, key=_rank)
    if best.batch * best.parallel > TRIAL_SECONDS * _rank(best):
        return best
    rivals = sorted((choice for choice in found if _rank(choice) > NEAR * _rank(best)), key=_rank)[-RIVALS:]
    if len(rivals) > 1:
        turns = [rivals, *([measured(choice) for choice in rivals] for _ in range(TURNS))]
        rivals = [replace(mine[0], speed=sum(map(_rank, mine)) / len(mine)) for mine in zip(*turns, strict=True)]
    return max(rivals, key=_rank)


def _rank(choice: Choice) -> float:
    return choice.speed or 0.0


def try_compiled(make: Make, choice: Choice, shape: tuple[int, int, int], stop: Stop = lambda: False) -> Choice:
    """`choice`, or the same compiled if that is clearly faster. Raises whatever torch.compile raises."""
    speed = speed_of(make, replace(choice, compiled=True), shape, stop)
    faster = speed is not None and speed > CLEARLY * _rank(choice)
    return replace(choice, compiled=True, speed=speed) if faster else choice


def speed_of(make: Make, choice: Choice, shape: tuple[int, int, int], stop: Stop = lambda: False) -> float | None:
    """Samples per second of the whole engine; None if the batch does not fit into memory, or if it was stopped."""
    if stop():
        return None
    try:
        sampler = make(choice)
        trial = _Trial(sampler, shape, stop)
        for _ in sampler.run((_Endless(trial, key) for key in range(choice.parallel + 2)), trial.over):
            pass
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None
    finally:
        torch.cuda.empty_cache()  # nothing where there is no CUDA
    return trial.speed if sampler.batch == choice.batch else None  # it was halved: out of memory


class _Trial:
    """Counts the samples of endless requests, once every worker thread has done a chunk or two."""

    def __init__(self, sampler: Sampler, shape: tuple[int, int, int], stop: Stop) -> None:
        self.sampler, self.shape, self.stop = sampler, shape, stop
        self.samples = 0
        self.speed: float | None = None
        self._begun = time.perf_counter()
        self._start: tuple[int, float] | None = None

    def over(self) -> bool:
        """Asked before every chunk: whether enough was seen."""
        now, enough = time.perf_counter(), self.sampler.parallel * self.sampler.chunk
        if now - self._begun < SLOW_SECONDS:
            enough *= 2
        if self.stop():
            return True
        if self._start is None:
            if self.samples >= enough:
                self._start = self.samples, now
            return False
        samples, seconds = self.samples - self._start[0], now - self._start[1]
        if samples < enough or seconds < TRIAL_SECONDS:
            return False
        self.speed = samples / seconds
        return True


@dataclass
class _Endless:
    """An image that wants chunk after chunk: the host reads its counts after each, so that no time is measured ahead."""

    trial: _Trial
    key: int
    wanted: int = field(init=False)
    fresh: bool = False

    def __post_init__(self) -> None:
        self.wanted = self.trial.sampler.chunk

    def image(self) -> Tensor:
        return torch.zeros(self.trial.shape)

    def receive(self, counts: Counts) -> bool:
        self.trial.samples += self.trial.sampler.chunk
        self.wanted += self.trial.sampler.chunk
        return False
