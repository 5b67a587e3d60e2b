"""Where the image files of a split are: on the disk, each by itself, or inside other files (shards, tables).

Workers get a copy of what is here, so it is small, and can be pickled.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rscli.api import EncodedImages
from rscli.data.transforms import EncodedFile
from rscli.errors import InputError
from rscli.runtime.files import explained

T = TypeVar("T")
SAMPLED = 1024
"""Files whose bytes are looked at, to see whether the images are still the same."""


class ImageFiles(ABC):
    """Image files in a fixed order."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def __getitem__(self, index: int) -> Path | EncodedFile:
        """File `index`, for `rscli.data.transforms.read_image`. Raises `InputError` if what it is in cannot be read."""

    @abstractmethod
    def identity(self) -> Iterator[bytes]:
        """What tells these files from others, wherever they are. Raises `InputError`, naming a file that cannot be read."""

    @abstractmethod
    def digest(self, index: int) -> bytes:
        """The SHA-256 of the content of file `index`. Raises `InputError`, naming it, if it cannot be read."""

    @abstractmethod
    def part(self, places: NDArray[np.int64]) -> ImageFiles:
        """The files at `places` (n,), in that order."""

    def sampled(self) -> Iterator[bytes]:
        """The digests of `SAMPLED` files, evenly spread, or of all."""
        return (self.digest(i) for i in np.linspace(0, len(self) - 1, min(SAMPLED, len(self))).astype(int).tolist())


class PathFiles(ImageFiles):
    """Files by their paths."""

    def __init__(self, paths: Sequence[Path | str | os.PathLike[str]]) -> None:
        # One block of bytes: worker processes share it, while a million Path objects would be copied into each of them.
        self._paths = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Path:
        return Path(os.fsdecode(bytes(self._paths[index])))

    def identity(self) -> Iterator[bytes]:
        """Paths below their common folder, and sizes."""
        paths = [self[i] for i in range(len(self))]
        common = os.path.commonpath({path.parent for path in paths})
        return (os.fsencode(path.relative_to(common).as_posix()) + f"\t{_size(path)}\n".encode() for path in paths)

    def digest(self, index: int) -> bytes:
        """See `ImageFiles.digest`."""
        with _reading(self[index]):
            return hashlib.sha256(self[index].read_bytes()).digest()

    def part(self, places: NDArray[np.int64]) -> PathFiles:
        """The files at `places` (n,), in that order."""
        chosen = PathFiles(())
        chosen._paths = self._paths[places]
        return chosen


class EncodedFiles(ImageFiles):
    """Files inside other files, as a plugin gives them."""

    def __init__(self, found: EncodedImages) -> None:
        self._encoded, self._names = found.encoded, found.names

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> EncodedFile:
        name = self._names[index]
        with _reading(name):
            content = self._encoded[index]
        if not isinstance(content, bytes):
            raise InputError(f"there is no encoded image at {name}, but {type(content).__name__}", "Check what is there.")
        return EncodedFile(content, name)

    def identity(self) -> Iterator[bytes]:
        """Names, and the content of `SAMPLED` files."""
        yield from (f"{name}\n".encode("utf-8", "surrogateescape") for name in self._names)
        yield from self.sampled()

    def digest(self, index: int) -> bytes:
        """See `ImageFiles.digest`."""
        return hashlib.sha256(self[index].content).digest()

    def part(self, places: NDArray[np.int64]) -> EncodedFiles:
        """The files at `places` (n,), in that order."""
        chosen = copy(self)
        chosen._encoded, chosen._names = _Taken(self._encoded, places), _Taken(self._names, places)
        return chosen


class _Taken(Sequence[T]):
    """The items of a sequence at given places."""

    def __init__(self, items: Sequence[T], places: NDArray[np.int64]) -> None:
        self._items, self._places = items, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        return self._items[int(self._places[index])]


def _size(path: Path) -> int:
    with _reading(path):
        return path.stat().st_size


@contextmanager
def _reading(file: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        raise explained(cause, f"cannot read the image {file}", "Restore the file.") from cause
