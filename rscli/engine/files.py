"""Files that are whole or not there: written beside their place, flushed to disk, and renamed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rscli.errors import InputError


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Makes the folder of `path`; while the body opens a file there, what the system refuses becomes an `InputError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as cause:
        hint = "Choose a place that is a folder, or can become one, and that you may write to."
        raise InputError(f"cannot write {path}: {cause.strerror} ({cause.filename})", hint) from cause


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; renames it to `path` at the end, or removes it if the body raises.

    Raises `InputError` if nothing can be written there.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a file to write to", "Name a file.")
    with opening(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
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
    return _reading(path, what, lambda: json.loads(path.read_text(encoding="utf-8")))


def _reading(path: Path, what: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except FileNotFoundError as cause:
        raise InputError(f"there is no {what} {path}") from cause
    except (OSError, ValueError) as cause:
        raise InputError(f"the {what} {path} cannot be read: {cause}") from cause
