"""The images of a split as the engine wants them: one by one for certification, in batches on a device for training.

A batch depends on the seed, the epoch and its number alone: not on the device, on the number of workers or processes, or on
where a resumed run starts. (Augmentations are drawn on the CPU for that reason; they are a few numbers an image. What
RandAugment computes from them may differ by a grey level from one device to another.)
"""

from __future__ import annotations

import hashlib
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rscli.api import Dataset, DataSpec, EncodedImages, FileImages, MemoryImages
from rscli.data.pieces import Order, Piece, PieceReader, Wanted, joined, one_ahead, piece_size, pieces_ahead, read_pieces
from rscli.data.sources import EncodedFiles, ImageFiles, PathFiles
from rscli.data.transforms import Moves, apply_moves, draw_moves, load_image, moves_images
from rscli.errors import InputError
from rscli.runtime.guard import broken, calling
from rscli.runtime.seeds import generator

HOLDOUT = "holdout"
"""What the training images are called that a run sets aside."""
CACHE_CHUNK = 256
"""Images that a worker decodes at a time when a split of files is brought into memory."""


def spec_of(dataset: Dataset, root: Path) -> DataSpec:
    """What a model must know of `dataset`. Raises `PluginError` if the plugin fails, or says anything but a `DataSpec`."""
    with calling(dataset, "spec"):
        spec = dataset.spec(root)
    if not isinstance(spec, DataSpec):
        raise broken(dataset, "spec", f"returned {spec!r:.80}, which is no DataSpec")
    return spec


def open_split(dataset: Dataset, spec: DataSpec, split: str, root: Path, *, download: bool = False, workers: int = 0) -> Split:
    """The images of `split` of `dataset` under the data folder `root`; `workers` processes decode files (0: this one does).

    Raises `InputError` if the split or its files are missing, `PluginError` if the plugin returns anything but what its
    contract promises.
    """
    with calling(dataset, "load"):
        found = dataset.load(split, root, download=download)
    problem = _images_problem(found, spec)
    if problem:
        raise broken(dataset, "load", problem)
    if isinstance(found, MemoryImages):
        return MemorySplit(found.images, found.labels, spec)
    files = FileSplit(_files_of(found), found.labels, spec, workers=workers)
    cache = found.cache and not spec.augmentation.resized_crop
    opened: Split = files.in_memory() if cache else files
    opened.note = found.note
    return opened


def check_holdout(count: int, images: int) -> None:
    """Raises `InputError` unless `count` of so many training `images` can be set aside, with some left to train on."""
    if count >= images:
        raise InputError(
            f"holdout is {count:,}, but there are only {images:,} training images, and some must be left to train on",
            "Set aside fewer: --set holdout=N.",
        )


def set_aside(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """What is left of a training split, in its order, and the `count` images that `seed` sets aside, in random order.

    Any first few of those are thus a random sample, too. Each is a split of its own, numbered from 0. Raises `InputError` if
    nothing would be left.
    """
    check_holdout(count, len(split))
    order = torch.randperm(len(split), generator=generator("cpu", seed, HOLDOUT)).numpy()
    return split.part(np.sort(order[count:])), split.part(order[:count])


def _files_of(found: FileImages | EncodedImages) -> ImageFiles:
    return PathFiles(found.paths) if isinstance(found, FileImages) else EncodedFiles(found)


class Batch(NamedTuple):
    """One process's images of an optimiser step: float32 (b, channel, height, width) in [0, 1]; their labels, int64 (b,); and
    their places in the split, int64 (b,), on the CPU.

    The step is chunk `chunk` of batch `number` of the epoch, both from 0, and has `size` images over all processes, of which
    these are those from place `first` on.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    number: int
    chunk: int
    first: int
    size: int

    def part(self, begin: int, end: int) -> Batch:
        """The images from row `begin` of these to row `end`."""
        images, labels, indices = (each[begin:end] for each in (self.images, self.labels, self.indices))
        return self._replace(images=images, labels=labels, indices=indices, first=self.first + begin)


# --- splits ------------------------------------------------------------------------------------------------------------------


class Split(ABC):
    """The images of one split, in a fixed order."""

    def __init__(self, labels: NDArray[np.int64], spec: DataSpec) -> None:
        self.labels = labels
        """int64 (n,)"""
        self.spec = spec
        self.note = ""
        """What the data set has to say of the split, for the user to read once."""

    def __len__(self) -> int:
        return len(self.labels)

    def steps(self, batch: int) -> int:
        """Batches in an epoch; the last may be short."""
        return -(-len(self) // batch)

    @abstractmethod
    def part(self, places: NDArray[np.int64]) -> Split:
        """The images at `places` (n,), in that order, as a split of their own, with a fingerprint of its own."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A SHA-256 (hex) that tells this split from another: the same images in the same order have the same one."""

    @abstractmethod
    def content(self) -> str:
        """A SHA-256 (hex) of the pixels; of a split that stays in files, of 1,024 of them, evenly spread, or of all."""

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """Image `index` under the test transform: float32 (channel, height, width) in [0, 1], on the CPU."""

    @abstractmethod
    def in_order(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once under the test transform, in batches: indices, int64 (b,), and images, float32 (b, channel, height,
        width) in [0, 1], on the CPU.
        """

    @abstractmethod
    def batches(
        self,
        *,
        seed: int,
        epoch: int,
        batch: int,
        device: torch.device | str,
        start: int = 0,
        chunks: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> Generator[Batch]:
        """The augmented training images of an epoch, on `device`: an item for each optimiser step.

        Every image comes once, in an order that depends on `seed` and `epoch` alone, in batches of `batch`, each in at most
        `chunks` chunks of equal size (the last possibly smaller: `torch.chunk`). The first `start` batches are skipped without
        being read. Each of `world` processes gets its `rank`-th slice of every chunk; slices differ by one image at
        most. Where a chunk has fewer images than there are processes, each gets the whole of it: nobody goes without.
        """

    def close(self) -> None:  # noqa: B027
        """Ends the processes that read for this split, if there are any; more batches start them again."""

    def _parts(self, *, seed: int, epoch: int, batch: int, start: int, chunks: int, rank: int, world: int) -> list[_Part]:
        """What one process reads of each optimiser step, from batch `start` on."""
        order = torch.randperm(len(self), generator=generator("cpu", seed, "order", epoch))
        parts = []
        for number in range(start, self.steps(batch)):
            whole = order[number * batch : (number + 1) * batch]
            at = 0
            for chunk, indices in enumerate(whole.chunk(chunks)):
                size = len(indices)
                first, end = (0, size) if size < world else (rank * size // world, (rank + 1) * size // world)
                parts.append(_Part(number, chunk, len(whole), at, size, first, indices[first:end]))
                at += size
        return parts


@dataclass(frozen=True)
class _Part:
    """What one process reads for an optimiser step: chunk `chunk` of batch `number`, which has `batch` images.

    The chunk begins at row `begin` of the batch and has `size` images; `indices` are those from place `first` of the chunk on.
    """

    number: int
    chunk: int
    batch: int
    begin: int
    size: int
    first: int
    indices: Tensor

    @property
    def rows(self) -> slice:
        """The rows of the batch that `indices` are."""
        begin = self.begin + self.first
        return slice(begin, begin + len(self.indices))

    def of(self, images: Tensor, labels: Tensor) -> Batch:
        """The item with these `images` (b, channel, height, width) and `labels` (b,)."""
        return Batch(images, labels, self.indices, self.number, self.chunk, self.first, self.size)


class MemorySplit(Split):
    """Images held as uint8, moved to the device once."""

    def __init__(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64], spec: DataSpec, *, fingerprint: str | None = None
    ) -> None:
        super().__init__(labels, spec)
        self._images = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        self._moved = (self._images, torch.from_numpy(np.require(labels, requirements=["C", "W"])))
        self._known_fingerprint = fingerprint

    def part(self, places: NDArray[np.int64]) -> MemorySplit:
        """See `Split.part`: the images at `places` (n,), copied."""
        known = self._known_fingerprint and _digest(self._known_fingerprint.encode(), places.astype("<i8").tobytes())
        return MemorySplit(self._images.numpy()[places], self.labels[places], self.spec, fingerprint=known)

    def fingerprint(self) -> str:
        """The hash of the shape, the pixels and the labels; of the files, where they came from files."""
        return self._known_fingerprint or self._pixel_fingerprint

    def content(self) -> str:
        """The hash of the shape, the pixels and the labels."""
        return self._pixel_fingerprint

    @cached_property
    def _pixel_fingerprint(self) -> str:
        return _digest(str(tuple(self._images.shape)).encode(), self._images.numpy().data, _label_bytes(self.labels))

    def image(self, index: int) -> Tensor:
        """Image `index`: float32 (channel, height, width) in [0, 1], on the CPU."""
        return to_unit(self._images[index])

    def in_order(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split.in_order`: indices (b,) and images (b, channel, height, width)."""
        for start in range(0, len(self), batch):
            indices = torch.arange(start, min(start + batch, len(self)))
            yield indices, to_unit(self._images[indices])

    def batches(
        self,
        *,
        seed: int,
        epoch: int,
        batch: int,
        device: torch.device | str,
        start: int = 0,
        chunks: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> Generator[Batch]:
        """See `Split.batches`. Augmentations are keyed by the batch's number."""
        images, labels = self._on(torch.device(device))
        change = self.spec.augmentation
        for part in self._parts(seed=seed, epoch=epoch, batch=batch, start=start, chunks=chunks, rank=rank, world=world):
            indices = part.indices.to(images.device, non_blocking=True)
            taken = images[indices]
            if moves_images(change):
                # Drawn for the whole batch, so that an image is moved alike however many processes share the batch.
                moves = draw_moves(part.batch, change, generator("cpu", seed, "augment", epoch, part.number))
                taken = apply_moves(taken, change.padding, Moves(*(each[part.rows] for each in moves)))
            yield part.of(to_unit(taken), labels[indices])

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._moved[0].device != device:
            images, labels = (each.to(device) for each in self._moved)
            self._moved = (images, labels)
        return self._moved


class FileSplit(Split):
    """Images read from disk whenever they are wanted, by `workers` processes (0: by this one).

    The first batch of training starts the workers. They go on from epoch to epoch, reading ahead, and end with `close`, when an
    epoch is left before its end, when the split is forgotten, and in any case with this process.
    """

    def __init__(
        self, files: Sequence[Path] | ImageFiles, labels: NDArray[np.int64], spec: DataSpec, *, workers: int = 0
    ) -> None:
        super().__init__(labels, spec)
        self._files = files if isinstance(files, ImageFiles) else PathFiles(files)
        self._workers = workers
        self._reading: _Reading | None = None

    def part(self, places: NDArray[np.int64]) -> FileSplit:
        """See `Split.part`: the images at `places` (n,)."""
        return FileSplit(self._files.part(places), self.labels[places], self.spec, workers=self._workers)

    def fingerprint(self) -> str:
        """The hash of the labels, sizes and paths of the files, the paths below their common folder (so that it can move).

        Of files inside others: of the labels, their names, and the bytes of evenly spaced files.
        """
        return self._file_fingerprint

    def content(self) -> str:
        """The hash of the bytes of evenly spaced files. Raises `InputError`, naming the file, if one cannot be read."""
        return self._content

    @cached_property
    def _content(self) -> str:
        return _digest(*self._files.sampled())

    @cached_property
    def _file_fingerprint(self) -> str:
        return _digest(*self._files.identity(), _label_bytes(self.labels))

    def image(self, index: int) -> Tensor:
        """Image `index` (channel, height, width) under the test transform.

        Raises `InputError`, naming the file, if it cannot be read.
        """
        return to_unit(load_image(self._files[index], self.spec.test_transform))

    def batches(
        self,
        *,
        seed: int,
        epoch: int,
        batch: int,
        device: torch.device | str,
        start: int = 0,
        chunks: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> Generator[Batch]:
        """See `Split.batches`. Augmentations are keyed by the image's index."""
        device = torch.device(device)
        mine = weakref.proxy(self)  # a split that is forgotten is gone at once, and its workers with it

        def parts(epoch: int, start: int) -> list[_Part]:
            found: list[_Part] = mine._parts(
                seed=seed, epoch=epoch, batch=batch, start=start, chunks=chunks, rank=rank, world=world
            )
            return found

        wanted = parts(epoch, start)
        if not wanted:
            return
        images = max(len(part.indices) for part in wanted)
        reading = self._going_on((seed, batch, chunks, rank, world, device.type), (epoch, start), parts, images)
        try:
            with closing(one_ahead((self._batch(part, reading.pieces, device) for part in wanted), device)) as ready:
                yield from ready
        except BaseException:  # of the caller, too: nobody wants the rest
            reading.pieces.close()
            raise
        self.close()
        self._reading = reading._replace(place=(epoch + 1, 0))

    def close(self) -> None:
        """See `Split.close`."""
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.pieces.close()

    def _going_on(
        self, what: tuple[int | str, ...], place: tuple[int, int], parts: Callable[[int, int], list[_Part]], images: int
    ) -> _Reading:
        """The reading of the epoch before, if it is at that `place`; else a new one, of parts with so many `images`."""
        reading, self._reading = self._reading, None
        if reading is not None and (reading.what, reading.place) == (what, place):
            return reading
        if reading is not None:
            reading.pieces.close()
        size = piece_size(images, *self.spec.shape[1:])
        reader = PieceReader(self._files, self.spec.test_transform, self.spec.augmentation, (int(what[0]), "augment"))
        prefetch = pieces_ahead(images, size, self._workers)
        order = Order(parts, *place, size)
        return _Reading(what, place, read_pieces(reader, order, self._workers, pin=what[-1] == "cuda", prefetch=prefetch))

    def _batch(self, part: _Part, pieces: Iterator[Piece], device: torch.device) -> Batch:
        """The next batch, put together and augmented on the `device`."""
        images, moves = joined(pieces, len(part.indices), self.spec.shape, device)
        if moves is not None:
            images = apply_moves(images, self.spec.augmentation.padding, moves)
        labels = torch.from_numpy(self.labels[part.indices.numpy()])
        if device.type == "cuda":
            labels = labels.pin_memory()
        return part.of(to_unit(images), labels.to(device, non_blocking=True))

    def in_order(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split.in_order`: indices (b,) and images (b, channel, height, width), read by the workers."""
        for rows, pixels in self._decoded(batch):
            yield torch.from_numpy(rows), to_unit(pixels)

    def in_memory(self) -> MemorySplit:
        """The same split, every file decoded now with the test transform. Raises `InputError`, naming one that is broken."""
        images = np.empty((len(self), *self.spec.shape), np.uint8)
        for rows, pixels in self._decoded(CACHE_CHUNK):
            images[rows] = pixels.numpy()
        return MemorySplit(images, self.labels, self.spec, fingerprint=self.fingerprint())

    def _decoded(self, batch: int) -> Generator[tuple[NDArray[np.int64], Tensor]]:
        """Every image once under the test transform, uint8, after its index; in batches."""
        chunks = [np.arange(at, min(at + batch, len(self))) for at in range(0, len(self), batch)]
        reader = PieceReader(self._files, self.spec.test_transform)
        with closing(read_pieces(reader, [Wanted(0, chunk) for chunk in chunks], self._workers)) as pieces:
            for rows, piece in zip(chunks, pieces, strict=True):
                yield rows, piece.pixels


class _Reading(NamedTuple):
    """Pieces that are read from epoch to epoch: what of (seed, batch, ...), and the (epoch, batch) that comes next."""

    what: tuple[int | str, ...]
    place: tuple[int, int]
    pieces: Generator[Piece]


def to_unit(images: Tensor) -> Tensor:
    """uint8 pixels of any shape as float32 in [0, 1], of that shape and on the same device."""
    # A tensor as divisor: CUDA multiplies by the reciprocal of a number, which is off by one bit for some pixels.
    return images.float() / torch.full((), 255.0, device=images.device)


def _digest(*blocks: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _label_bytes(labels: NDArray[np.int64]) -> bytes:
    return labels.astype("<i8").tobytes()


# --- what a plugin returned --------------------------------------------------------------------------------------------------


def _images_problem(found: object, spec: DataSpec) -> str | None:
    classes = len(spec.class_names)
    if isinstance(found, MemoryImages):
        return _pixels_problem(found, spec) or _labels_problem(found.labels, len(found.images), classes)
    if isinstance(found, FileImages):
        return _paths_problem(found) or _labels_problem(found.labels, len(found.paths), classes)
    if isinstance(found, EncodedImages):
        return _encoded_problem(found) or _labels_problem(found.labels, len(found.encoded), classes)
    return f"returned {type(found).__name__}, neither MemoryImages nor FileImages nor EncodedImages"


def _encoded_problem(found: EncodedImages) -> str | None:
    for each in (found.encoded, found.names):
        if not all(hasattr(each, method) for method in ("__len__", "__getitem__")):
            return f"gave images or names that are no sequence: {each!r:.80}"
    if len(found.encoded) != len(found.names):
        return f"gave {len(found.encoded)} images and {len(found.names)} names"
    return None


def _paths_problem(found: FileImages) -> str | None:
    if not isinstance(found.paths, Sequence) or not all(isinstance(path, str | os.PathLike) for path in found.paths):
        return f"gave paths that are no sequence of paths: {found.paths!r:.80}"
    return None


def _pixels_problem(found: MemoryImages, spec: DataSpec) -> str | None:
    images = found.images
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        return f"its images are {getattr(images, 'dtype', type(images).__name__)}, not a uint8 array"
    if images.shape[1:] != spec.shape:
        return f"its images have shape {images.shape[1:]}, its spec says {spec.shape}"
    return "only images in files can have a random resized crop" if spec.augmentation.resized_crop else None


def _labels_problem(labels: object, count: int, classes: int) -> str | None:
    if not isinstance(labels, np.ndarray) or labels.dtype != np.int64 or labels.ndim != 1:
        return "its labels are not an int64 array with one dimension"
    if len(labels) != count:
        return f"it has {count} images and {len(labels)} labels"
    if not count:
        return "it has no images"
    if labels.min() < 0 or labels.max() >= classes:
        return f"its labels go from {labels.min()} to {labels.max()}, for {classes} classes"
    return None
