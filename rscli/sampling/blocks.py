"""The noise of certification, block by block: that of image i, sample j depends on (seed, i, j) alone.

It comes in blocks of `BLOCK` samples, each from a generator of its own, keyed by (seed, image, block). A block is drawn when
its first sample is classified, by whichever worker thread does that, and kept until its last one is handed out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rscli.api import Noise
from rscli.runtime.guard import broken, calling, draw_noise
from rscli.runtime.seeds import block_generator

BLOCK = 64
"""Samples per block of noise; part of the protocol, since another size draws other noise."""


class Block:
    """One block of an image's noise, drawn once, when it is first asked for; `smoothing` puts it on the image."""

    def __init__(self, draw: Callable[[], Tensor], smoothing: Noise) -> None:
        self._draw, self.smoothing = draw, smoothing
        self._lock = threading.Lock()
        self._noise: Tensor | None = None

    def noise(self) -> Tensor:
        """The noise (BLOCK, channel, height, width); a thread that asks while another draws waits for it."""
        with self._lock:
            if self._noise is None:
                self._noise = self._draw()
            return self._noise


@dataclass(frozen=True)
class Piece:
    """Consecutive samples of one image: the image (channel, height, width) under the noise `first` to `last` of a block."""

    image: Tensor
    block: Block
    first: int
    last: int

    @property
    def samples(self) -> int:
        """How many."""
        return self.last - self.first

    def into(self, out: Tensor) -> None:
        """Writes the noisy images to `out` (samples, channel, height, width)."""
        noise = self.block.noise()[self.first : self.last]
        with calling(self.block.smoothing, "apply"):
            made = self.block.smoothing.apply(self.image, noise, out=out)
        if not isinstance(made, Tensor) or made.shape != out.shape:
            found = tuple(made.shape) if isinstance(made, Tensor) else f"{made!r:.80}"
            raise broken(self.block.smoothing, "apply", f"returned {found} where {tuple(out.shape)} is expected")
        if made is not out:  # a distribution that does not know how to write to a place
            out.copy_(made)

    def split_at(self, samples: int) -> tuple[Piece, Piece]:
        """The first `samples` of it, and the others."""
        middle = self.first + samples
        return Piece(self.image, self.block, self.first, middle), Piece(self.image, self.block, middle, self.last)


def cut(pieces: list[Piece], most: int) -> list[list[Piece]]:
    """`pieces` in groups of at most `most` samples, in the same order."""
    groups: list[list[Piece]] = [[]]
    room = most
    for piece in pieces:
        rest = piece
        while rest.samples > room:
            if room:
                part, rest = rest.split_at(room)
                groups[-1].append(part)
            groups.append([])
            room = most
        groups[-1].append(rest)
        room -= rest.samples
    return groups


class NoiseBlocks:
    """Hands out the noise of images in order, and keeps the blocks that are not used up: their other samples come soon.

    `most` blocks are kept at most; one that was dropped is drawn again. Used by one thread; the blocks may be drawn by any.
    """

    def __init__(self, noise: Noise, seed: int, device: torch.device, most: int) -> None:
        self.noise, self.seed, self.device, self.most = noise, seed, device, most
        self._kept: dict[tuple[int, int], Block] = {}  # (image's key, number of the block)

    def __len__(self) -> int:
        return len(self._kept)

    def pieces(self, key: int, image: Tensor, start: int, take: int) -> list[Piece]:
        """Samples `start` to `start + take` of the image (channel, height, width) whose noise has the key `key`."""
        end = start + take
        found = []
        for number in range(start // BLOCK, (end - 1) // BLOCK + 1):
            begin = number * BLOCK
            drawing = self._drawing(key, number, tuple(image.shape))
            block = self._kept.pop((key, number), None) or Block(drawing, self.noise)
            if end < begin + BLOCK:
                self._kept[key, number] = block
                if len(self._kept) > self.most:
                    self._kept.pop(next(iter(self._kept)))  # the one that has waited longest
            found.append(Piece(image, block, max(start - begin, 0), min(end - begin, BLOCK)))
        return found

    def forget(self, key: int, drawn: int) -> None:
        """No more than the `drawn` samples of that image are wanted."""
        self._kept.pop((key, (drawn - 1) // BLOCK), None)

    def _drawing(self, key: int, number: int, shape: tuple[int, ...]) -> Callable[[], Tensor]:
        def draw() -> Tensor:
            random = block_generator(self.device, self.seed, key, number)
            return draw_noise(self.noise, (BLOCK, *shape), random, self.device)

        return draw
