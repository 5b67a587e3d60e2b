"""How workers read for training: in pieces of batches, ahead of what is asked for, from epoch to epoch without a pause.

What is random is drawn in the worker, keyed by the image's index, and is done on the device, on uint8 pixels; but for a random
resized crop, which needs the file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import data as torch_data

from rscli.api import Augmentation, Transform
from rscli.data.sources import ImageFiles
from rscli.data.transforms import Moves, draw_moves, jpeg_decoder, load_image, load_resized_crop, moves_images
from rscli.errors import RscliError
from rscli.runtime.readers import read, stay_in_the_background
from rscli.runtime.seeds import derive, generator

T = TypeVar("T", bound=tuple[Any, ...])

PIECE_PIXELS = 2**21
"""Pixels in a piece, at most: 41 images of 224x224. Small enough that all workers share a batch, and that little shared memory
is needed; large enough that sending a piece costs little beside decoding it."""
BATCHES_AHEAD = 2
"""Batches that workers read ahead, in pieces; two pieces a worker at least."""


class Wanted(NamedTuple):
    """The images of a piece, and the epoch that they are augmented for."""

    epoch: int
    indices: NDArray[np.int64]


class Piece(NamedTuple):
    """Decoded images, uint8 (n, channel, height, width), and what is to happen to them (the tensors of `Moves`, as arrays)."""

    pixels: Tensor
    moves: tuple[NDArray[Any], ...] | None


class Part(Protocol):
    """What one process reads of a batch."""

    @property
    def indices(self) -> Tensor:
        """The images, int64 (n,)."""


@dataclass(frozen=True)
class PieceReader(torch_data.Dataset[Piece | RscliError]):
    """Reads pieces; with a `key` (seed, purpose), augmented by draws that are keyed by epoch and the image's index besides."""

    files: ImageFiles
    transform: Transform
    augmentation: Augmentation = field(default_factory=Augmentation)
    key: tuple[int, str] | None = None

    def __getitem__(self, wanted: Wanted) -> Piece | RscliError:
        """The piece; or the error, as a value: raised in a worker, it would arrive as a traceback."""
        out = torch.empty(len(wanted.indices), self.transform.channels, *self.transform.crop, dtype=torch.uint8)
        try:
            for row, index in enumerate(wanted.indices.tolist()):
                out[row] = self._pixels(wanted.epoch, index)
        except RscliError as error:
            return error
        return Piece(out, self._moves(wanted))

    def _pixels(self, epoch: int, index: int) -> Tensor:
        if self.key is None or not self.augmentation.resized_crop:
            return load_image(self.files[index], self.transform)
        rng = np.random.default_rng(derive(*self.key, epoch, index))
        return load_resized_crop(self.files[index], self.transform, rng)

    def _moves(self, wanted: Wanted) -> tuple[NDArray[Any], ...] | None:
        if self.key is None or not moves_images(self.augmentation):
            return None
        seed, purpose = self.key
        drawn = [
            draw_moves(1, self.augmentation, generator("cpu", seed, purpose, wanted.epoch, index))
            for index in wanted.indices.tolist()
        ]
        return tuple(torch.cat(each).numpy() for each in zip(*drawn, strict=True))


@dataclass(frozen=True)
class Order:
    """The pieces of the parts of batches from `start` of `epoch` on, through all later epochs, without end.

    `parts` gives what one process reads of an epoch, from a batch on; each is read in pieces of `size` images.
    """

    parts: Callable[[int, int], Sequence[Part]]
    epoch: int
    start: int
    size: int

    def __iter__(self) -> Iterator[Wanted]:
        for epoch in itertools.count(self.epoch):
            start = self.start if epoch == self.epoch else 0
            every = [part.indices.numpy() for part in self.parts(epoch, start)]
            for indices in every:
                for at in range(0, len(indices), self.size):
                    yield Wanted(epoch, indices[at : at + self.size])
            if start == 0 and not any(map(len, every)):
                return  # nothing, in any epoch


def read_pieces(
    reader: PieceReader, wanted: Iterable[Wanted], workers: int, *, pin: bool = False, prefetch: int = 2
) -> Generator[Piece]:
    """The pieces that are `wanted`, read by `workers` processes (0: by this one), `prefetch` ahead each; pinned with `pin`.

    The workers end when this is closed. Raises what a worker could not read, as `InputError`, and `RscliError` if one dies.
    """
    if reader.augmentation.resized_crop:
        jpeg_decoder()
    loader = torch_data.DataLoader(
        reader,
        sampler=wanted,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_as_it_is,
        pin_memory=pin,
        worker_init_fn=stay_in_the_background,
        generator=torch.Generator(),  # the loader draws a seed for its workers: not from the global generator
    )
    with closing(read(loader)) as found:
        for piece in found:
            if isinstance(piece, RscliError):
                raise piece
            yield piece


def _as_it_is(piece: Any) -> Any:
    return piece


def piece_size(images: int, height: int, width: int) -> int:
    """Images in a piece of a batch of so many `images` of that size."""
    return max(1, min(images, PIECE_PIXELS // (height * width)))


def pieces_ahead(images: int, size: int, workers: int) -> int:
    """Pieces that each worker reads ahead, for batches of so many `images` in pieces of `size`."""
    return max(2, -(-BATCHES_AHEAD * -(-images // size) // max(workers, 1)))


def joined(
    pieces: Iterator[Piece], count: int, shape: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Moves | None]:
    """The next `count` images of `pieces`, uint8 (count, *shape) on the `device`, and their moves on the CPU."""
    images = torch.empty(count, *shape, dtype=torch.uint8, device=device)
    drawn, at = [], 0
    while at < count:
        piece = next(pieces)
        images[at : at + len(piece.pixels)].copy_(piece.pixels, non_blocking=True)
        at += len(piece.pixels)
        if piece.moves is not None:
            drawn.append(piece.moves)
    moves = Moves(*(torch.from_numpy(np.concatenate(each)) for each in zip(*drawn, strict=True))) if drawn else None
    return images, moves


def one_ahead(batches: Iterator[T], device: torch.device) -> Generator[T]:
    """The `batches`, tuples with tensors in them; on CUDA each is begun, on a stream of its own, before the one before it is
    handed out.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin() -> tuple[T | None, torch.cuda.Event]:
        with torch.cuda.stream(side):
            return next(batches, None), side.record_event()

    batch, copied = begin()
    while batch is not None:
        following = begin()
        stream = torch.cuda.current_stream(device)
        stream.wait_event(copied)
        for each in batch:
            if isinstance(each, Tensor) and each.is_cuda:
                each.record_stream(stream)  # its memory is not used again before this stream is done with it
        yield batch
        batch, copied = following
