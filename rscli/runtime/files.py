"""Files that are whole or not there: written beside their place, flushed to disk, and renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rscli.config.decode import LARGEST_JSON, check_size, decode_json
from rscli.errors import InputError, RscliError
from rscli.text import json_text

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when there is no room: on the disk, for this user, or for so large a file."""

UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EROFS)
"""What file systems answer (object stores, CIFS, exFAT) that do not know modes, or cannot wait for the disk."""

ADVICE = {
    errno.EACCES: "Ask its owner for permission, or choose another path (`ls -ld` shows who may do what).",
    errno.EPERM: "Ask its owner for permission, or choose another path (`ls -ld` shows who may do what).",
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "A part of that path is a file, not a folder: check the path.",
    errno.EISDIR: "Name a file, not a folder.",
    errno.ENAMETOOLONG: "A name has 255 bytes at most. If these are several paths, give each as an argument of its own.",
    errno.ELOOP: "Symbolic links lead in a circle there (`ls -l` shows them): name the file itself.",
    errno.ESTALE: "The file server has lost it: try again, or remount the folder.",
    errno.EIO: "The disk or the file server failed: try again, and look at the system's log.",
    errno.EROFS: "The file system is read-only: choose another place.",
    errno.EMFILE: "Too many files are open: use fewer --workers, or raise the limit with `ulimit -n`.",
    errno.ENFILE: "Too many files are open on this machine: end other programs.",
    **dict.fromkeys(FULL, "Make room, and run the same command again; a run that has begun goes on with --resume."),
}
"""What to do about an error of the system, by its number."""

LONGEST = 240
"""Bytes of a name to which two dots, a token of eight and `.part` can be added: file systems allow 255."""

OLD_SECONDS = 3600.0
"""A file that another machine was writing is taken for abandoned after this time without a change."""


def explained(cause: OSError, text: str | None = None, hint: str | None = None) -> RscliError:
    """`cause` in words: `text`, what the system said, the path, and what to do (`hint`, where the number says nothing).

    An `RscliError` (exit code 1) if there is no room, which will pass; an `InputError` (2) for anything else.
    """
    paths = [os.fsdecode(each) for each in (cause.filename, cause.filename2) if isinstance(each, str | bytes)]
    if text is None:
        text = f"cannot access {paths[0]}" if paths else "the operating system refused"
    named = [path for path in paths if path not in text]
    said = f"{text}: {cause.strerror or cause}" + (f" ({', '.join(named)})" if named else "")
    kind = RscliError if cause.errno in FULL else InputError
    return kind(said, ADVICE.get(cause.errno or 0, hint or "Check the path, and the disk that it is on."))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While the body writes to `path`, what the system refuses becomes an error in words.

    Raises `RscliError` if there is no room, which will pass, and `InputError` if the place is not one to write to.
    """
    try:
        yield
    except OSError as cause:
        if cause.filename is not None and str(cause.filename).endswith(".part"):
            cause.filename = None  # the file beside it, which nobody named
        hint = "Choose a place that is a folder, or can become one, and that you may write to."
        raise explained(cause, f"cannot write {path}", hint) from cause


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Makes the folder of `path`; while the body opens a file there, raises as `writing` does."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield


def check_regular(path: Path) -> None:
    """Raises `InputError` if `path` is a folder, a device or a pipe (which may never end), and `OSError` if it is not there."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is {_kind(mode)}, not a file", "Name a file.")


@contextmanager
def open_regular(path: Path) -> Iterator[Path]:
    """While the body runs, the file `path` is open; gives a path to it for libraries that take only UTF-8.

    Raises `InputError` if it is a folder, a device or a pipe, and `OSError` if the system refuses.
    """
    check_regular(path)
    with path.open("rb") as file:
        try:
            str(path).encode("utf-8")
        except UnicodeEncodeError:
            yield Path(f"/dev/fd/{file.fileno()}")
        else:
            yield path


def sync(descriptor: int) -> None:
    """Waits until the disk has the file; not where the file system cannot say. Raises `OSError` if the disk refuses."""
    try:
        os.fsync(descriptor)
    except OSError as cause:
        if cause.errno not in UNSUPPORTED:
            raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; renames it to `path` at the end, or removes it if the body raises.

    A link at `path` stays, and the file that it leads to is replaced. A new file has the mode that the umask says, one that
    is replaced keeps its own. What killed processes left beside it is removed.

    Raises as `writing` does; what was at `path` before is then still there. Only files are replaced: `InputError` for others.
    """
    with opening(path):
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        mode = _mode(path)
        if mode is not None and not stat.S_ISREG(
            mode
        ):  # renaming would put a file in the place of a device: /dev/null, for root
            raise InputError(f"{path} is {_kind(mode)}, not a file to write to", "Name a file.")
        remove_abandoned(target)
        beside = target.with_name(f"{_begin(target)}{_token(os.getpid())}.part")
        beside.unlink(missing_ok=True)  # of a process that had our number before us, as in a container
        os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        with writing(path):
            yield beside
            if mode is not None and stat.S_IMODE(mode) != stat.S_IMODE(beside.stat().st_mode):
                with suppress(OSError):
                    beside.chmod(stat.S_IMODE(mode))
            with beside.open("rb+") as file:
                sync(file.fileno())
            beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def remove_abandoned(path: Path) -> None:
    """Removes what processes that were killed while they replaced `path` left beside it; not what a live one is writing."""
    begin, end = _begin(path), ".part"
    with suppress(OSError):
        for beside in path.parent.iterdir():
            token = beside.name[len(begin) : -len(end)]
            if beside.name == f"{begin}{token}{end}" and len(token) == 8 and _abandoned(beside, token):
                beside.unlink(missing_ok=True)


def _begin(path: Path) -> str:
    """How the name of a file beside `path` begins; a name too long to be added to stands there as its digest."""
    name = os.fsencode(path.name)
    return f".{path.name}." if len(name) <= LONGEST else f".{hashlib.sha256(name).hexdigest()[:32]}."


def _abandoned(beside: Path, token: str) -> bool:
    if token[:3] != _machine():
        return time.time() - beside.stat().st_mtime > OLD_SECONDS
    try:
        os.kill(int(token[3:], 36), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):  # it is there, and somebody else's; or no token of ours
        return False
    return False


def _token(process: int) -> str:
    """Eight characters for a process: of its machine three, of its number five."""
    digits = ""
    while process:
        process, digit = divmod(process, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return _machine() + digits.rjust(5, "0")


def _machine() -> str:
    """Where process numbers mean the same: the machine, and the container on it."""
    space = ""
    with suppress(OSError):  # only Linux has it
        space = str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode("utf-8", "backslashreplace")).hexdigest()[:3]


def _mode(path: Path) -> int | None:
    """The mode of what `path` leads to; None if there is nothing. Raises `OSError` if the system refuses to say."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically (UTF-8, line feeds)."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")


def write_answer(path: Path, text: str) -> None:
    """As `write_text`; but to a device, a pipe, or whatever stdout or stderr goes to, `text` is written as it stands."""
    with writing(path):
        through = _leads_out(path)
        if through:
            with path.open("ab", buffering=0) as file:
                file.write(text.encode())
    if not through:
        write_text(path, text)


def _leads_out(path: Path) -> bool:
    mode = _mode(path)
    if mode is None or stat.S_ISDIR(mode):
        return False
    if not stat.S_ISREG(mode):
        return True
    here = path.stat()
    for stream in (1, 2):
        with suppress(OSError):
            if os.path.samestat(here, os.fstat(stream)):
                return True
    return False


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON to `path` atomically."""
    write_text(path, json_text(value) + "\n")


def read_json(path: Path, what: str) -> Any:
    """The JSON value in `path`. Raises `InputError`, calling the file `what`, if it is missing or broken."""
    return _reading(path, what, lambda: _bounded_json(path))


def _bounded_json(path: Path) -> Any:
    check_regular(path)
    check_size(path, LARGEST_JSON)
    return decode_json(path.read_text(encoding="utf-8-sig"))


def _reading(path: Path, what: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except FileNotFoundError as cause:
        raise InputError(f"there is no {what} {path}") from cause
    except OSError as cause:
        raise explained(cause, f"the {what} {path} cannot be read") from cause
    except ValueError as cause:
        raise InputError(f"the {what} {path} cannot be read: {cause}") from cause
