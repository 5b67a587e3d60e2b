"""The images of a split as the engine wants them: one by one for certification, in batches on a device for training.

A batch depends on the seed, the epoch and its number alone: not on the device, on the number of workers or processes, or on
where a resumed run starts. (Augmentations are drawn on the CPU for that reason; they are three numbers an image.)
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import data as torch_data

from rscli.api import Augmentation, Dataset, DataSpec, FileImages, MemoryImages, Transform
from rscli.data.transforms import Moves, apply_moves, augment, draw_moves, load_image, load_resized_crop, moves_images
from rscli.errors import InputError
from rscli.runtime.files import explained
from rscli.runtime.guard import broken, calling
from rscli.runtime.readers import read, stay_in_the_background
from rscli.runtime.seeds import derive, generator

SAMPLED = 1024
"""Files whose bytes are looked at, to see whether the images are still the same."""
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
    files = FileSplit(found.paths, found.labels, spec, workers=workers)
    cache = found.cache and not spec.augmentation.resized_crop
    opened: Split = files.in_memory() if cache else files
    opened.note = found.note
    return opened


class Batch(NamedTuple):
    """Images of a training batch: float32 (b, channel, height, width) in [0, 1]; their labels, int64 (b,); and their places in
    the split, int64 (b,), on the CPU.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


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
    def fingerprint(self) -> str:
        """A SHA-256 (hex) that tells this split from another: the same images in the same order have the same one."""

    @abstractmethod
    def content(self) -> str:
        """A SHA-256 (hex) of the pixels; of a split that stays in files, of `SAMPLED` of them, evenly spread, or of all."""

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
        self, *, seed: int, epoch: int, batch: int, device: torch.device | str, start: int = 0, rank: int = 0, world: int = 1
    ) -> Generator[Batch]:
        """The augmented training batches of an epoch, on `device`.

        Every image comes once, in an order that depends on `seed` and `epoch` alone. The first `start` batches are skipped
        without being read. Each of `world` processes gets its `rank`-th slice of every batch of `batch` images: slices differ
        by one image at most, and may be empty when fewer images than processes are left for the last batch.
        """

    def _parts(self, *, seed: int, epoch: int, batch: int, start: int, rank: int, world: int) -> list[_Part]:
        """What one process reads of each batch, from batch `start` on."""
        order = torch.randperm(len(self), generator=generator("cpu", seed, "order", epoch))
        parts = []
        for number in range(start, self.steps(batch)):
            whole = order[number * batch : (number + 1) * batch]
            rows = slice(rank * len(whole) // world, (rank + 1) * len(whole) // world)
            parts.append(_Part(number, len(whole), rows, whole[rows]))
        return parts


@dataclass(frozen=True)
class _Part:
    """One process's slice of a batch: the batch's number and size, the rows of the slice, and the images in it."""

    number: int
    size: int
    rows: slice
    indices: Tensor


class MemorySplit(Split):
    """Images held as uint8, moved to the device once."""

    def __init__(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64], spec: DataSpec, *, fingerprint: str | None = None
    ) -> None:
        super().__init__(labels, spec)
        self._images = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        self._moved = (self._images, torch.from_numpy(np.require(labels, requirements=["C", "W"])))
        self._known_fingerprint = fingerprint

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """uint8 (n, channel, height, width)"""
        return self._images.numpy()

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
        """See `Split.in_order`."""
        for start in range(0, len(self), batch):
            indices = torch.arange(start, min(start + batch, len(self)))
            yield indices, to_unit(self._images[indices])

    def batches(
        self, *, seed: int, epoch: int, batch: int, device: torch.device | str, start: int = 0, rank: int = 0, world: int = 1
    ) -> Generator[Batch]:
        """See `Split.batches`. Augmentations are keyed by the batch's number."""
        images, labels = self._on(torch.device(device))
        change = self.spec.augmentation
        for part in self._parts(seed=seed, epoch=epoch, batch=batch, start=start, rank=rank, world=world):
            indices = part.indices.to(images.device, non_blocking=True)
            taken = images[indices]
            if moves_images(change):
                # Drawn for the whole batch, so that an image is moved alike however many processes share the batch.
                moves = draw_moves(part.size, change, generator("cpu", seed, "augment", epoch, part.number))
                taken = apply_moves(taken, change.padding, Moves(*(each[part.rows] for each in moves)))
            yield Batch(to_unit(taken), labels[indices], part.indices)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._moved[0].device != device:
            images, labels = (each.to(device) for each in self._moved)
            self._moved = (images, labels)
        return self._moved


class FileSplit(Split):
    """Images read from disk whenever they are wanted, by `workers` processes (0: by this one)."""

    def __init__(self, paths: Sequence[Path], labels: NDArray[np.int64], spec: DataSpec, *, workers: int = 0) -> None:
        super().__init__(labels, spec)
        # One block of bytes: worker processes share it, while a million Path objects would be copied into each of them.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.workers = workers

    def path(self, index: int) -> Path:
        """Where image `index` is."""
        return _path(self._paths, index)

    def fingerprint(self) -> str:
        """The hash of the labels, sizes and paths of the files, the paths below their common folder (so that it can move)."""
        return self._file_fingerprint

    def content(self) -> str:
        """The hash of the bytes of evenly spaced files. Raises `InputError`, naming the file, if one cannot be read."""
        return self._content

    @cached_property
    def _content(self) -> str:
        return _digest(
            *(_bytes_digest(self.path(i)) for i in np.linspace(0, len(self) - 1, min(SAMPLED, len(self))).astype(int))
        )

    @cached_property
    def _file_fingerprint(self) -> str:
        paths = [self.path(i) for i in range(len(self))]
        common = os.path.commonpath({path.parent for path in paths})
        lines = (os.fsencode(path.relative_to(common).as_posix()) + f"\t{_size(path)}\n".encode() for path in paths)
        return _digest(*lines, _label_bytes(self.labels))

    def image(self, index: int) -> Tensor:
        """Image `index` (channel, height, width) under the test transform.

        Raises `InputError`, naming the file, if it cannot be read.
        """
        return to_unit(load_image(self.path(index), self.spec.test_transform))

    def batches(
        self, *, seed: int, epoch: int, batch: int, device: torch.device | str, start: int = 0, rank: int = 0, world: int = 1
    ) -> Generator[Batch]:
        """See `Split.batches`. Augmentations are keyed by the image's index."""
        device = torch.device(device)
        parts = self._parts(seed=seed, epoch=epoch, batch=batch, start=start, rank=rank, world=world)
        reader = _Reader(self._paths, self.spec.test_transform, self.spec.augmentation, (seed, "augment", epoch))
        wanted = [part.indices.numpy() for part in parts]
        with closing(self._read(reader, wanted, pin=device.type == "cuda")) as pixels:
            for part, images in zip(parts, pixels, strict=True):
                labels = torch.from_numpy(self.labels[part.indices.numpy()])
                yield Batch(to_unit(images.to(device, non_blocking=True)), labels.to(device), part.indices)

    def in_order(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split.in_order`; read by the workers."""
        chunks = [np.arange(at, min(at + batch, len(self))) for at in range(0, len(self), batch)]
        with closing(self._read(_Reader(self._paths, self.spec.test_transform), chunks)) as decoded:
            for rows, pixels in zip(chunks, decoded, strict=True):
                yield torch.from_numpy(rows), to_unit(pixels)

    def in_memory(self) -> MemorySplit:
        """The same split, every file decoded now with the test transform. Raises `InputError`, naming one that is broken."""
        images = np.empty((len(self), *self.spec.shape), np.uint8)
        chunks = [np.arange(at, min(at + CACHE_CHUNK, len(self))) for at in range(0, len(self), CACHE_CHUNK)]
        with closing(self._read(_Reader(self._paths, self.spec.test_transform), chunks)) as decoded:
            for rows, pixels in zip(chunks, decoded, strict=True):
                images[rows] = pixels.numpy()
        return MemorySplit(images, self.labels, self.spec, fingerprint=self.fingerprint())

    def _read(self, reader: _Reader, wanted: list[NDArray[np.int64]], *, pin: bool = False) -> Generator[Tensor]:
        loader = torch_data.DataLoader(
            reader,
            sampler=wanted,  # every item is a whole batch: its images' indices
            batch_size=None,
            num_workers=self.workers,
            pin_memory=pin,
            worker_init_fn=stay_in_the_background,
            generator=torch.Generator(),  # the loader draws a seed for its workers: not from the global generator
        )
        with closing(read(loader)) as found:
            for images in found:
                if isinstance(images, InputError):
                    raise images
                yield images


def to_unit(images: Tensor) -> Tensor:
    """uint8 pixels of any shape as float32 in [0, 1], of that shape and on the same device."""
    # A tensor as divisor: CUDA multiplies by the reciprocal of a number, which is off by one bit for some pixels.
    return images.float() / torch.full((), 255.0, device=images.device)


# --- reading files, perhaps in worker processes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader(torch_data.Dataset[Tensor | InputError]):
    """Reads the images with given indices; with a `key`, augmented by draws that are keyed by the image's index."""

    paths: NDArray[np.bytes_]
    transform: Transform
    augmentation: Augmentation = field(default_factory=Augmentation)
    key: tuple[int, str, int] | None = None

    def __getitem__(self, indices: NDArray[np.int64]) -> Tensor | InputError:
        """uint8 (b, channel, height, width); or the error, as a value: raised in a worker, it would arrive as a traceback."""
        out = torch.empty(len(indices), self.transform.channels, *self.transform.crop, dtype=torch.uint8)
        try:
            for row, index in enumerate(indices.tolist()):
                out[row] = self._one(index)
        except InputError as error:
            return error
        return out

    def _one(self, index: int) -> Tensor:
        path = _path(self.paths, index)
        if self.key is None:
            return load_image(path, self.transform)
        seed, purpose, epoch = self.key
        if self.augmentation.resized_crop:
            rng = np.random.default_rng(derive(seed, purpose, epoch, index))
            image = load_resized_crop(path, self.transform, rng)
        else:
            image = load_image(path, self.transform)
        return augment(image[None], self.augmentation, generator("cpu", seed, purpose, epoch, index))[0]


def _path(paths: NDArray[np.bytes_], index: int) -> Path:
    return Path(os.fsdecode(bytes(paths[index])))


def _size(path: Path) -> int:
    with _reading(path):
        return path.stat().st_size


def _bytes_digest(path: Path) -> bytes:
    with _reading(path):
        return hashlib.sha256(path.read_bytes()).digest()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        raise explained(cause, f"cannot read the image {path}", "Restore the file.") from cause


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
    return f"returned {type(found).__name__}, neither MemoryImages nor FileImages"


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
