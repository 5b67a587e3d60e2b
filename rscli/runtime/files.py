"""Files that are whole or not there: written beside their place, flushed to disk, and renamed."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rscli.config.decode import LARGEST_JSON, check_size, decode_json
from rscli.errors import InputError, RscliError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when there is no room: on the disk, for this user, or for so large a file."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While the body writes to `path`, what the system refuses becomes an error in words.

    Raises `RscliError` if there is no room, which will pass, and `InputError` if the place is not one to write to.
    """
    try:
        yield
    except OSError as cause:
        text = f"cannot write {path}: {cause.strerror or cause}"
        if cause.errno in FULL:
            hint = "Make room, and run the same command again; a run that has begun goes on with --resume."
            raise RscliError(text, hint) from cause
        hint = "Choose a place that is a folder, or can become one, and that you may write to."
        raise InputError(text if cause.filename is None else f"{text} ({cause.filename})", hint) from cause


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Makes the folder of `path`; while the body opens a file there, raises as `writing` does."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; renames it to `path` at the end, or removes it if the body raises.

    Raises as `writing` does; what was at `path` before is then still there.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a file to write to", "Name a file.")
    if path.exists() and not path.is_file():  # renaming would put a file in the place of a device: /dev/null, for root
        raise InputError(f"{path} is a device or a pipe, not a file to write to", "Name a file.")
    with opening(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        with writing(path):
            yield beside
            beside.chmod(0o644)
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
            beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically (UTF-8, line feeds)."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """The JSON value in `path`. Raises `InputError`, calling the file `what`, if it is missing or broken."""
    return _reading(path, what, lambda: _bounded_json(path))


def _bounded_json(path: Path) -> Any:
    check_size(path, LARGEST_JSON)
    return decode_json(path.read_text(encoding="utf-8-sig"))


def _reading(path: Path, what: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except FileNotFoundError as cause:
        raise InputError(f"there is no {what} {path}") from cause
    except (OSError, ValueError) as cause:
        raise InputError(f"the {what} {path} cannot be read: {cause}") from cause
