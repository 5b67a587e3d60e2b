"""Sampling: the noisy predictions that certifiers ask for, counted on the device, in batches filled across images.

Batches have one static shape (the last is padded), and hold whatever samples are wanted next, of however many images. Several
are under way at a time: one on each worker thread of a CPU, one in the queue of a GPU. They are counted in the order in which
they were filled, so no count depends on which thread is faster. The host waits for the device only when an image has all the
samples of its next look, and then one batch late, so that the device has work meanwhile.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rscli.api import Noise
from rscli.errors import InputError, PluginError, RscliError
from rscli.runtime.devices import memory_layout, precision_scope
from rscli.runtime.memory import enough_memory, out_of_memory
from rscli.sampling.blocks import BLOCK, NoiseBlocks, Piece, cut
from rscli.sampling.requests import Request
from rscli.sampling.threads import worker_threads

TOO_LARGE = "Free memory on it, or use another device (--device)."

SPARE = 4
"""For each batch under way, so many batches' worth of drawn noise are kept at most: the rest of blocks whose next samples were
not wanted yet."""


CHUNK, MOST = 256, 4
"""A worker thread gets so many samples at a time, in at most so many batches: each hand-over costs it a moment."""


@dataclass(eq=False)
class _Active:
    """An image that is being sampled: its slot in the table of counts, and how far its samples have been handed out."""

    request: Request
    slot: int
    image: Tensor
    drawn: int = 0

    @property
    def outstanding(self) -> int:
        return self.request.wanted - self.drawn


_Segment = tuple[_Active, int, int]
"""Samples of one image: the image, the first sample, and how many."""

_Votes = tuple[Tensor, Tensor]
"""The class of each sample (samples,), and a number that is not finite as soon as one logit is not."""

_Snapshot = tuple[Tensor, torch.cuda.Event | None]
"""Counts on their way to the host, and what to wait for."""


class Sampler:
    """Draws samples for any number of requests in batches of one static shape, `parallel` of them at a time.

    With more than one, the model and the noise are called by several threads at once.
    """

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
        parallel: int = 1,
    ) -> None:
        if batch < 1:
            raise InputError(f"the batch size is {batch}, but must be at least 1")
        self.model, self.noise, self.classes, self.seed, self.batch, self.device = model, noise, classes, seed, batch, device
        self.precision, self.parallel = precision, parallel
        self.layout = memory_layout(channels_last)
        self.samples = 0
        self._batches = max(1, min(MOST, CHUNK // batch)) if parallel > 1 else 1
        self._blocks = NoiseBlocks(noise, seed, device, most=SPARE * (parallel + 1) * max(1, self.chunk // BLOCK))
        slots = (parallel + 1) * self.chunk + 2  # of so many images at most; those of one chunk per worker wait for their look
        self._counts = torch.zeros(slots, classes, dtype=torch.int64, device=device)
        self._one = torch.ones((), dtype=torch.int64, device=device)
        self._sum = torch.zeros((), device=device)
        self._pattern: list[tuple[int, int]] = []
        self._starts = self._one
        self._free: deque[int] = deque()
        self._active: list[_Active] = []
        self._own = threading.local()  # each worker's batch of images

    @property
    def chunk(self) -> int:
        """How many samples are handed out at a time: those of one batch, or of several small ones."""
        return self.batch * self._batches

    def run(self, requests: Iterable[Request | None], stop: Callable[[], bool] = lambda: False) -> Iterator[Request]:
        """Yields each request when it wants no more, in the order in which they end; a few batches' worth is open at a time.

        None among `requests` says: no further one now, ask again for the next chunk. It may come only while some are open.
        `stop` is asked before every chunk; once it says True, nothing more is drawn or yielded. Of a run that was stopped or
        failed, the next one knows nothing.
        Raises `RscliError` if the model's logits are not finite or a single image does not fit into memory, `PluginError` if
        the logits have the wrong shape.
        """
        self._active.clear()
        self._free = deque(range(len(self._counts)))
        self._counts.zero_()
        self._sum.zero_()
        waiting = iter(requests)
        under_way: deque[Callable[[], list[Request]]] = deque()
        with worker_threads(self.parallel) as pool:
            while not stop():
                segments = self._fill(waiting, wait=len(under_way) >= self.parallel)
                if segments:
                    under_way.append(self._launch(segments, pool))
                elif not under_way:
                    return
                if len(under_way) > self.parallel or not segments:
                    yield from under_way.popleft()()

    def _fill(self, waiting: Iterator[Request | None], *, wait: bool) -> list[_Segment]:
        """Segments (image, first sample, samples) for the next chunk; opens new images when the open ones want too little.

        With `wait`, a chunk that could not be filled is put off: a look that is due may want more samples.
        """
        room = self.chunk
        segments: list[_Segment] = []
        position = 0
        while room:
            if position == len(self._active):
                request = next(waiting, None) if self._free else None
                if request is None:
                    break
                self._active.append(_Active(request, self._free.popleft(), self._sent(request.image())))
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

    def _launch(self, segments: list[_Segment], pool: ThreadPoolExecutor | None) -> Callable[[], list[Request]]:
        """Has the samples of `segments` classified; what is returned hands the looks that are due to their requests.

        Without a pool everything is queued on the device at once; with one, counting waits for the worker.
        """
        ready = [active for active, *_ in segments if active.outstanding == 0]
        pieces = [
            piece
            for active, start, take in segments
            for piece in self._blocks.pieces(active.request.key, active.image, start, take)
        ]
        if pool is None:
            self._count(segments, self._classify(pieces))
            return partial(self._look, ready, self._snapshot(ready))
        votes = pool.submit(self._classify, pieces)

        def finish() -> list[Request]:
            self._count(segments, votes.result())
            return self._look(ready, self._snapshot(ready))

        return finish

    def _classify(self, pieces: list[Piece]) -> _Votes:
        """Runs the model on the samples of `pieces`, in batches that fit: out of memory halves the batch for good.

        Another worker may have halved it since these samples were handed out: they are cut to what it is now.
        """
        rest, votes = pieces, []
        fits = enough_memory(self.device, "a single image", TOO_LARGE)
        with fits, torch.inference_mode(), precision_scope(self.precision, self.device):
            while rest:
                batch = self.batch
                first, *others = cut(rest, batch)
                try:
                    votes.append(self._forward(first, batch))
                    rest = [piece for part in others for piece in part]
                except RuntimeError as error:
                    if batch == 1 or not out_of_memory(error):
                        raise
                    self.batch = min(self.batch, (batch + 1) // 2)
                    self._own.images = None
                    torch.cuda.empty_cache()
            if len(votes) == 1:
                return votes[0]
            classes, totals = zip(*votes, strict=True)
            return torch.cat(classes), torch.stack(totals).sum()

    def _forward(self, pieces: list[Piece], batch: int) -> _Votes:
        """One forward of `batch` images, of which those of `pieces` count."""
        logits = self.model(self._assemble(pieces, batch))
        if tuple(logits.shape) != (batch, self.classes):
            shape = (batch, self.classes)
            raise PluginError(f"the model returned logits of shape {tuple(logits.shape)}, but {shape} was expected")
        used = sum(piece.samples for piece in pieces)
        return logits[:used].argmax(-1), logits[:used].sum(dtype=torch.float32)  # float16 would overflow

    def _assemble(self, pieces: list[Piece], batch: int) -> Tensor:
        """The noisy images of `pieces`, and zeros up to the static shape: (batch, channel, height, width)."""
        images: Tensor | None = getattr(self._own, "images", None)
        if images is None or len(images) != batch:
            images = self._own.images = torch.empty(batch, *pieces[0].image.shape, device=self.device)
        place = 0
        for piece in pieces:
            piece.into(images[place : place + piece.samples])
            place += piece.samples
        images[place:].zero_()
        return images.contiguous(memory_format=self.layout)

    @torch.inference_mode()
    def _count(self, segments: list[_Segment], votes: _Votes) -> None:
        """Adds the classes of the samples of `segments` to the counts of their images."""
        classes, total = votes
        places = self._rows(segments) + classes
        self._counts.view(-1).scatter_add_(0, places, self._one.expand_as(places))
        self._sum += total
        self.samples += len(classes)

    def _rows(self, segments: list[_Segment]) -> Tensor:
        """For each sample of the batch, where its image's row begins in the flat table of counts.

        An image with many samples fills batch after batch: then the answer is that of the batch before.
        """
        pattern = [(active.slot, take) for active, _, take in segments]
        if pattern != self._pattern:
            slots, takes = np.array(pattern).T
            self._pattern, self._starts = pattern, self._sent(torch.from_numpy(np.repeat(slots * self.classes, takes)))
        return self._starts

    def _sent(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device; from pinned memory to CUDA, so that the host does not wait.

        Elsewhere it waits: MPS would read memory that is free again by then (pytorch/pytorch#189690).
        """
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    @torch.inference_mode()
    def _snapshot(self, ready: list[_Active]) -> _Snapshot | None:
        """The counts of images whose look is due, on their way to the host; the last row says if all logits were finite."""
        if not ready:
            return None
        slots = self._sent(torch.tensor([active.slot for active in ready]))
        table = torch.cat([self._counts[slots], self._sum.isfinite().long().expand(1, self.classes)])
        if self.device.type != "cuda":
            return table.cpu(), None
        host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True).copy_(table, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return host, event

    @torch.inference_mode()
    def _look(self, ready: list[_Active], snapshot: _Snapshot | None) -> list[Request]:
        """Hands the counts to their requests; returns those that are done."""
        if snapshot is None:
            return []
        table, event = snapshot
        if event is not None:
            event.synchronize()
        counts = table.numpy()
        if not counts[-1].all():
            hint = "Such a model cannot be certified."
            raise RscliError("the model returned logits that are not finite (NaN or infinity)", hint)
        done, again = [], []
        for active, row in zip(ready, counts, strict=False):
            finished = active.request.receive(row.copy())
            if finished or active.request.fresh:
                again.append(active.slot)
            if finished:
                done.append(active)
        if again:
            self._counts.index_fill_(0, self._sent(torch.tensor(again)), 0)
        for active in done:
            self._active.remove(active)
            self._free.append(active.slot)
            self._blocks.forget(active.request.key, active.drawn)
        return [active.request for active in done]
