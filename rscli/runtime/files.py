"""Files that are whole or not there: written beside their place, flushed to disk, and renamed.

Links are followed: what is behind them is replaced, not they. Only regular files are replaced and read. What the file system
cannot do (permissions, fsync) is done without. What a kill leaves behind (`.NAME.????????.part`) is removed by the next write.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape as glob_escape
from pathlib import Path
from typing import Any

from rscli import text as texts
from rscli.errors import InputError
from rscli.system import FULL, UNSUPPORTED, check_regular, open_regular, system_error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["FULL", "check_regular", "open_regular", "opening", "read_json", "replacing", "write_json", "write_text", "writing"]

STREAMS = ("/dev/stdin", "/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")
"""Paths that stand for what a process has open already: a file behind them belongs to whoever opened it."""

LEFT_BEHIND_SECONDS = 3600.0
"""Where files cannot be locked, a `.part` of this age is nobody's any more."""

LONGEST = 239
"""Bytes of a name to which `.` and `.????????.part` can be added within the 255 of most file systems."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While the body writes to `path`, what the system refuses becomes an error in words.

    Raises `RscliError` if there is no room, which will pass, and `InputError` if the place is not one to write to.
    """
    try:
        yield
    except OSError as cause:
        hint = "Choose a place that is a folder, or can become one, and that you may write to."
        raise system_error(cause, path, "write", hint) from cause


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Makes the folder of `path`; while the body opens a file there, raises as `writing` does."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield


def behind_links(path: Path) -> Path:
    """The file that writing to `path` writes to: where its links lead, whether or not that is there."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to; renames it to `path`, or to the file behind that link, or removes it if the body raises.

    A new file has the permissions that the umask leaves, one that is replaced keeps its own. Raises as `writing` does, and
    `InputError` for what is not a regular file; what was at `path` before is then still there.
    """
    with writing(path):
        target, before = behind_links(path), _regular(path)
    with opening(path):
        sweep(target)
        beside, lock = _beside(target)
    try:
        with writing(path):
            yield beside
            if before is not None:
                with _without(UNSUPPORTED):
                    beside.chmod(stat.S_IMODE(before.st_mode))
            with beside.open("rb+") as file, _without(UNSUPPORTED):
                os.fsync(file.fileno())
            if fcntl is None:  # Windows renames no open file
                os.close(lock)
            beside.replace(target)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    finally:
        with suppress(OSError):
            os.close(lock)


def sweep(path: Path) -> None:
    """Removes what writers of `path` left behind when they were killed; what a live process is writing is left alone."""
    for torn in path.parent.glob(f"{glob_escape(_stem(path))}.????????.part"):
        with suppress(OSError):
            if not _being_written(torn):
                torn.unlink()


def _regular(path: Path) -> os.stat_result | None:
    """What is at `path`, behind links; None if nothing is. Raises `InputError` for anything but a regular file."""
    hint = "Name a file. Without --out, tables go to stdout."
    if os.path.abspath(path).startswith(STREAMS):  # noqa: PTH100 - links are left as they are
        raise InputError(f"{path} is a device or a pipe, not a file to write to", hint)
    try:
        found = os.stat(path)  # noqa: PTH116 - Path.stat would do the same
    except (FileNotFoundError, NotADirectoryError):
        return None  # making the folder says what is wrong
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path} is a folder, not a file to write to", "Name a file.")
    if not stat.S_ISREG(found.st_mode):  # renaming would put a file in the place of a device: /dev/null, for root
        raise InputError(f"{path} is a device or a pipe, not a file to write to", hint)
    return found


def _stem(path: Path) -> str:
    """How the names of files beside `path` begin; a long name is shortened to its digest."""
    name = os.fsencode(path.name)
    return f".{path.name}" if len(name) <= LONGEST else f".{hashlib.sha256(name).hexdigest()[:32]}"


def _beside(target: Path) -> tuple[Path, int]:
    """A new file beside `target`, and a descriptor that holds the lock which says that its writer lives."""
    while True:
        beside = target.with_name(f"{_stem(target)}.{secrets.token_hex(4)}.part")
        lock = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        with suppress(OSError):
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
        if beside.exists():  # else somebody swept it away before it was locked
            return beside, lock
        os.close(lock)


def _being_written(torn: Path) -> bool:
    """Whether a live process holds the lock on a `.part` file; where there are no locks, whether it is young."""
    if fcntl is not None:
        handle = os.open(torn, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        except OSError:
            pass
        finally:
            os.close(handle)
    return time.time() - torn.stat().st_mtime < LEFT_BEHIND_SECONDS


@contextmanager
def _without(numbers: tuple[int, ...]) -> Iterator[None]:
    """Goes on where the system refuses what the body asks for with one of these error numbers."""
    try:
        yield
    except OSError as cause:
        if cause.errno not in numbers:
            raise


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically (UTF-8, line feeds; bytes of a name that are not UTF-8 are escaped)."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", errors=texts.ERRORS, newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON to `path` atomically."""
    write_text(path, texts.to_json(value, indent=2) + "\n")


def read_json(path: Path, what: str) -> Any:
    """The JSON value in `path`. Raises `InputError`, calling the file `what`, if it is missing or broken."""
    check_regular(path, what)
    return _reading(path, what, lambda: json.loads(path.read_text(encoding="utf-8-sig")))


def _reading(path: Path, what: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except OSError as cause:
        raise system_error(cause, path, f"read the {what}") from cause
    except ValueError as cause:
        raise InputError(f"the {what} {path} cannot be read: {cause}") from cause
