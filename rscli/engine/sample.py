"""Sampling: the noisy predictions that certifiers ask for, counted on the device, in batches filled across images.

The noise of image i, sample j depends on (seed, i, j) alone: it comes in blocks of `BLOCK` samples, each from a generator of
its own, keyed by (seed, image, block). Batches have one static shape (the last is padded), and hold whatever samples are wanted
next, of however many images. The host waits for the device only when an image has all the samples of its next look, and then
one batch late, so that the device has work meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rscli.api import Certifier, Decision, Noise, Plan, Question
from rscli.engine.devices import memory_layout, precision_scope
from rscli.engine.seeds import block_generator
from rscli.errors import InputError, PluginError, RscliError

BLOCK = 64
"""Samples a block of noise; part of the protocol, since another size draws other noise."""

SPARE = 8
"""How many batches' worth of drawn noise is kept at most: the rest of blocks whose next samples were not wanted yet."""

Counts = NDArray[np.int64]


class Inquiry(Protocol):
    """What is asked about one image; the sampler draws `wanted` samples in all, reports counts, and asks again."""

    @property
    def key(self) -> int:
        """The image's key for its noise."""

    @property
    def wanted(self) -> int:
        """The number of samples, counted from the first, after which `receive` is to be called next."""

    def image(self) -> Tensor:
        """The image (channel, height, width), float32 in [0, 1]."""

    def receive(self, counts: Counts) -> bool:
        """Takes the `counts` (classes,) of the samples since the last reset; True when nothing more is wanted."""

    @property
    def fresh(self) -> bool:
        """Whether the counts are to start again at zero: asked after each `receive`."""


@dataclass
class CertifierInquiry:
    """A certifier's conversation about one image: selection samples, then look after look at fresh ones."""

    certifier: Certifier
    question: Question
    key: int
    load: Callable[[], Tensor]
    n0: int = field(init=False)
    plan: Plan | None = None
    decision: Decision | None = None
    n: int = 0
    counts: Counts | None = None
    fresh: bool = False
    _look: int = 0

    def __post_init__(self) -> None:
        self.n0 = self.certifier.selection(self.question)
        if self.n0 == 0:
            self._begin(np.zeros(self.question.classes, np.int64))

    @property
    def wanted(self) -> int:
        """The selection samples, or the selection samples and those of the next look."""
        return self.n0 if self.plan is None else self.n0 + self.plan.looks[self._look]

    def image(self) -> Tensor:
        """The image, loaded when its first samples are drawn."""
        return self.load()

    def receive(self, counts: Counts) -> bool:
        """Selection counts make the plan; counts at a look make a decision, or lead to the next look."""
        self.fresh = self.plan is None
        if self.plan is None:
            return self._begin(counts)
        self.n, self.counts = self.plan.looks[self._look], counts
        self.decision = self.certifier.decide(counts, self.n, self.plan)
        self._look += 1
        if self.decision is None and self._look == len(self.plan.looks):
            raise PluginError(f"the certifier {type(self.certifier).__name__} did not decide at its last look ({self.n})")
        return self.decision is not None

    def _begin(self, counts: Counts) -> bool:
        self.plan = self.certifier.plan(counts, self.question)
        looks = self.plan.looks
        if any(b <= a for a, b in zip((0, *looks), looks, strict=False)):
            raise PluginError(f"the certifier {type(self.certifier).__name__} wants looks that do not increase: {looks}")
        if not looks and self.n0 == 0:
            raise PluginError(f"the certifier {type(self.certifier).__name__} wants no samples at all")
        if not looks:
            self.counts = np.zeros_like(counts)
            self.decision = self.certifier.decide(self.counts, 0, self.plan)
            if self.decision is None:
                raise PluginError(f"the certifier {type(self.certifier).__name__} wants no more samples, and did not decide")
        return self.decision is not None


@dataclass(eq=False)
class _Active:
    """An image that is being sampled: its slot in the table of counts, and how far its samples have been handed out."""

    inquiry: Inquiry
    slot: int
    image: Tensor
    drawn: int = 0

    @property
    def outstanding(self) -> int:
        return self.inquiry.wanted - self.drawn


_Segment = tuple[_Active, int, int]
"""Samples of one image: the image, the first sample, and how many."""


def _cut(segments: list[_Segment], most: int) -> list[list[_Segment]]:
    """The samples of `segments` in groups of at most `most`, in the same order."""
    groups: list[list[_Segment]] = [[]]
    room = most
    for active, start, take in segments:
        while take:
            if not room:
                groups.append([])
                room = most
            part = min(room, take)
            groups[-1].append((active, start, part))
            start, take, room = start + part, take - part, room - part
    return groups


class Sampler:
    """Draws samples for any number of inquiries in batches of one static shape."""

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        noise: Noise,
        classes: int,
        *,
        seed: int,
        batch: int,
        device: torch.device,
        precision: str = "fp32",
        channels_last: bool = True,
    ) -> None:
        if batch < 1:
            raise InputError(f"the batch size is {batch}, but must be at least 1")
        self.model, self.noise, self.classes, self.seed, self.batch, self.device = model, noise, classes, seed, batch, device
        self.precision = precision
        self.layout = memory_layout(channels_last)
        slots = 2 * batch + 2  # a batch holds at most `batch` images, and those of one batch before wait for their look
        self._counts = torch.zeros(slots + 1, classes, dtype=torch.int64, device=device)
        self._one = torch.ones((), dtype=torch.int64, device=device)
        self._sum = torch.zeros((), device=device)
        self._pattern: list[tuple[int, int]] = []
        self._starts = self._one
        self._free = deque(range(slots))
        self._active: list[_Active] = []
        self._images: Tensor | None = None
        self._spare: dict[tuple[int, int], Tensor] = {}  # (image's key, block) to noise
        self.samples = 0

    def run(self, inquiries: Iterable[Inquiry], stop: Callable[[], bool] = lambda: False) -> Iterator[Inquiry]:
        """Yields each inquiry when it wants no more, in the order in which they end; at most a batch's worth is open at a time.

        `stop` is asked before every batch; once it says True, nothing more is drawn or yielded.
        Raises `RscliError` if the model's logits are not finite, `PluginError` if they have the wrong shape.
        """
        waiting = iter(inquiries)
        late: tuple[list[_Active], Tensor, torch.cuda.Event | None] | None = None
        while not stop():
            segments = self._fill(waiting, wait=late is not None)
            ready = [active for active, *_ in segments if active.outstanding == 0]
            with torch.inference_mode(), precision_scope(self.precision, self.device):
                self._launch(segments)
                snapshot = (ready, *self._snapshot(ready)) if ready else None
                done = self._look(*late) if late else []
            late = snapshot
            yield from done
            if not segments and late is None and not self._active:
                return

    def _fill(self, waiting: Iterator[Inquiry], *, wait: bool) -> list[_Segment]:
        """Segments (image, first sample, samples) for the next batch; opens new images when the open ones want too little.

        With `wait`, a batch that could not be filled is put off: a look that is due may want more samples.
        """
        room = self.batch
        segments: list[_Segment] = []
        position = 0
        while room:
            if position == len(self._active):
                inquiry = next(waiting, None) if self._free else None
                if inquiry is None:
                    break
                self._active.append(_Active(inquiry, self._free.popleft(), self._sent(inquiry.image())))
            active = self._active[position]
            position += 1
            take = min(room, active.outstanding)
            if take:
                segments.append((active, active.drawn, take))
                room -= take
        if room and wait:
            return []
        for active, _, take in segments:
            active.drawn += take
        return segments

    def _launch(self, segments: list[_Segment]) -> None:
        """Runs the model on the noisy images of `segments`, in batches that fit: out of memory halves the batch for good."""
        waiting = [segments] if segments else []
        while waiting:
            try:
                self._forward(waiting[0])
                waiting.pop(0)
            except torch.OutOfMemoryError:
                if self.batch == 1:
                    raise
                self.batch, self._images = (self.batch + 1) // 2, None
                self._spare.clear()
                torch.cuda.empty_cache()
                waiting = [part for group in waiting for part in _cut(group, self.batch)]

    def _forward(self, segments: list[_Segment]) -> None:
        """Runs the model on the noisy images of `segments`, and adds its predictions to the counts."""
        logits = self.model(self._assemble(segments))
        if tuple(logits.shape) != (self.batch, self.classes):
            shape = (self.batch, self.classes)
            raise PluginError(f"the model returned logits of shape {tuple(logits.shape)}, where {shape} was announced")
        self._count(logits, segments)

    def _assemble(self, segments: list[_Segment]) -> Tensor:
        """The noisy images of `segments`, and zeros up to the static shape: (batch, channel, height, width)."""
        if self._images is None:
            self._images = torch.empty(self.batch, *segments[0][0].image.shape, device=self.device)
        place = 0
        for active, start, take in segments:
            for noise in self._noise(active, start, take):
                torch.add(noise, active.image, out=self._images[place : place + len(noise)])
                place += len(noise)
        self._images[place:].zero_()
        return self._images.contiguous(memory_format=self.layout)

    def _noise(self, active: _Active, start: int, take: int) -> Iterator[Tensor]:
        """The noise (k, channel, height, width) of samples `start` to `start + take`, block by block.

        A block that is not used up is kept: its other samples are mostly wanted soon, and it would have to be drawn again.
        """
        end = start + take
        for block in range(start // BLOCK, (end - 1) // BLOCK + 1):
            first = block * BLOCK
            noise = self._spare.pop((active.inquiry.key, block), None)
            if noise is None:
                random = block_generator(self.device, self.seed, active.inquiry.key, block)
                noise = self.noise.sample((BLOCK, *active.image.shape), generator=random, device=self.device)
            if end < first + BLOCK:
                self._spare[active.inquiry.key, block] = noise
                if len(self._spare) * BLOCK > SPARE * self.batch:
                    self._spare.pop(next(iter(self._spare)))  # the one that has waited longest
            yield noise[max(start - first, 0) : end - first]

    def _count(self, logits: Tensor, segments: list[_Segment]) -> None:
        """Adds the predictions to the counts of their images; those of the padding go to the table's last row."""
        used = sum(take for *_, take in segments)
        places = self._rows(segments, used) + logits.argmax(-1)
        total = logits[:used].sum()  # not finite as soon as one logit is not
        ones = self._one.expand_as(places)
        self._counts.view(-1).scatter_add_(0, places, ones)  # nothing after this may fail: the samples count once
        self._sum += total
        self.samples += used

    def _rows(self, segments: list[_Segment], used: int) -> Tensor:
        """For each sample of the batch, where its image's row begins in the flat table of counts.

        An image with many samples fills batch after batch: then the answer is that of the batch before.
        """
        pattern = [(active.slot, take) for active, _, take in segments] + [(len(self._counts) - 1, self.batch - used)]
        if pattern != self._pattern:
            slots, takes = np.array(pattern).T
            self._pattern, self._starts = pattern, self._sent(torch.from_numpy(np.repeat(slots * self.classes, takes)))
        return self._starts

    def _sent(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device; from pinned memory to CUDA, so that the host does not wait."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _snapshot(self, ready: list[_Active]) -> tuple[Tensor, torch.cuda.Event | None]:
        """The counts of images whose look is due, on their way to the host; the last row says if all logits were finite."""
        slots = self._sent(torch.tensor([active.slot for active in ready]))
        table = torch.cat([self._counts[slots], self._sum.isfinite().long().expand(1, self.classes)])
        if self.device.type != "cuda":
            return table.cpu(), None
        host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True).copy_(table, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return host, event

    def _look(self, ready: list[_Active], table: Tensor, event: torch.cuda.Event | None) -> list[Inquiry]:
        """Hands the counts to their inquiries; returns those that are done."""
        if event is not None:
            event.synchronize()
        counts = table.numpy()
        if not counts[-1].all():
            hint = "Such a model cannot be certified."
            raise RscliError("the model returned logits that are not finite (NaN or infinity)", hint)
        done, again = [], []
        for active, row in zip(ready, counts, strict=False):
            finished = active.inquiry.receive(row.copy())
            if finished or active.inquiry.fresh:
                again.append(active.slot)
            if finished:
                done.append(active)
        if again:
            self._counts.index_fill_(0, self._sent(torch.tensor(again)), 0)
        for active in done:
            self._active.remove(active)
            self._free.append(active.slot)
            self._spare.pop((active.inquiry.key, (active.drawn - 1) // BLOCK), None)
        return [active.inquiry for active in done]
