"""What the data sets share: finding images in class folders, and saying what is wrong or missing."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TypeVar

from rscli.api import FileImages
from rscli.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""What counts as an image, in any case of letters."""

T = TypeVar("T")


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in `folder`, sorted as torchvision's `ImageFolder` does; hidden ones are left out."""
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir())


def image_names(folder: Path) -> list[str]:
    """The names of the image files directly in `folder`, sorted; hidden ones are left out (macOS leaves `._name.jpg`)."""
    return sorted(_image_names(folder))


def has_images(folder: Path) -> bool:
    """Whether there is an image file directly in `folder`; stops at the first."""
    return next(_image_names(folder), None) is not None


def list_images(folder: Path, classes: Sequence[str]) -> FileImages:
    """The files of `folder`/class/name, by class in the order of `classes`, then by name; a class may have no folder."""
    import numpy as np

    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = [folder / name / file for file in image_names(folder / name)]
        paths += files
        labels += [label] * len(files)
    return FileImages(paths, np.array(labels, np.int64))


def same_name(name: str) -> str:
    """What two names have in common that look the same (Unicode's form NFC): macOS writes an accent as a sign of its own."""
    return unicodedata.normalize("NFC", name)


def legible(name: str) -> str:
    """The name of a class: that of its folder, with bytes that are not UTF-8 escaped, since a model file holds text."""
    return name.encode("utf-8", "backslashreplace").decode()


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    if folder.is_dir():
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))


def _image_names(folder: Path) -> Iterator[str]:
    return (e.name for e in _entries(folder) if e.name.lower().endswith(SUFFIXES) and not e.is_dir())


# --- messages ----------------------------------------------------------------------------------------------------------------


def name_some(names: Iterable[str], most: int = 5) -> str:
    """The first few of `names`, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def count(number: int, singular: str, plural: str | None = None) -> str:
    """`1 image`, `2 images`; `1 class`, `2 classes`."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def unknown_split(dataset: str, split: str, known: Sequence[str] = ("train", "test")) -> InputError:
    """The error for a split that a data set does not have."""
    return InputError(f"{dataset} has no split {split!r}", f"Its splits are: {', '.join(known)}.")


# --- torchvision -------------------------------------------------------------------------------------------------------------


def fetching(name: str, where: Path, fetch: Callable[[], T], hint: str) -> T:
    """What `fetch` returns; a download that fails is an `InputError` with its cause. torchvision's chatter goes to stderr."""
    try:
        with redirect_stdout(sys.stderr):
            return fetch()
    except (OSError, RuntimeError, EOFError) as cause:  # no network, no right to write, a file that is not the published one
        raise InputError(f"cannot download {name} to {where}: {str(cause).strip()}", hint) from cause
