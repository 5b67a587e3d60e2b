"""What the data sets share: finding images in class folders, and saying what is wrong or missing."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TypeVar

from rscli.api import FileImages, class_folder, list_images, skipped_text
from rscli.errors import InputError

T = TypeVar("T")


def labelled_images(folder: Path, classes: Sequence[str]) -> FileImages:
    """The files of `folder`/class and the folders below, by class in the order of `classes`; a class may have no folder.

    The note counts what was skipped. Raises `InputError` for a folder that cannot be read.
    """
    import numpy as np

    listings = [list_images(class_folder(folder, name)) for name in classes]
    skipped = sum((listing.skipped for listing in listings), Counter[str]())
    text = skipped_text(skipped)
    return FileImages(
        [path for listing in listings for path in listing.paths],
        np.repeat(np.arange(len(classes), dtype=np.int64), [len(listing.paths) for listing in listings]),
        note=f"{folder}: {text}" if text else "",
    )


# --- messages ----------------------------------------------------------------------------------------------------------------


def name_some(names: Iterable[str], most: int = 5) -> str:
    """The first few of `names`, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def count(number: int, singular: str, plural: str | None = None) -> str:
    """`1 image`, `2 images`; `1 class`, `2 classes`."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def unknown_split(dataset: str, split: str) -> InputError:
    """The error for a split that is neither train nor test."""
    return InputError(f"{dataset} has no split {split!r}", "Its splits are: train, test.")


# --- torchvision -------------------------------------------------------------------------------------------------------------


def fetching(name: str, where: Path, fetch: Callable[[], T], hint: str) -> T:
    """What `fetch` returns; a download that fails is an `InputError` with its cause. torchvision's chatter goes to stderr."""
    try:
        with redirect_stdout(sys.stderr):
            return fetch()
    except (OSError, RuntimeError, EOFError) as cause:  # no network, no right to write, a file that is not the published one
        raise InputError(f"cannot download {name} to {where}: {str(cause).strip()}", hint) from cause
