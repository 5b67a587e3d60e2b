"""What the operating system refuses, in words: the path, what the system said, and what to do; and which files are opened."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rscli.errors import InputError, RscliError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when there is no room: on the disk, for this user, or for so large a file."""

UNSUPPORTED = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENOTTY)
"""What a file system says that cannot do something (chmod on an object store, fsync on a pipe), and can be done without."""

ROOM = "Make room, and run the same command again; a run that has begun goes on with --resume."

HINTS = {
    errno.EACCES: "You lack the permission. Ask the owner for it (`ls -ld` shows who that is), or use a copy of your own.",
    errno.EPERM: "You lack the permission, or the file system does not allow it. Try another place.",
    errno.ENAMETOOLONG: "A name may have 255 bytes. If these are several names, give each in quotation marks of its own.",
    errno.ELOOP: "Symbolic links lead in a circle here; `ls -l` shows where they lead.",
    errno.ESTALE: "The network drive no longer knows this file. Mount it again, or wait, and run the same command again.",
    errno.ENOTDIR: "A part of the path is a file, not a folder.",
    errno.EISDIR: "This is a folder. Name a file.",
    errno.ENOENT: "Check the path.",
    errno.EROFS: "The file system is read-only. Choose another place.",
    errno.EIO: "The disk or the network drive fails. Check it, or use another one.",
    errno.EMFILE: "Too many files are open at once: raise the limit (`ulimit -n 4096`), or use fewer --workers.",
    errno.ENXIO: "This is a pipe or a device that nobody serves. Name a file.",
}
"""What to do, by what the system said."""

_PIPES = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")


def system_error(cause: OSError, path: Path | str | None = None, doing: str = "use", hint: str | None = None) -> RscliError:
    """The error that says what the system refused: `cannot read PATH: Permission denied`, and what to do.

    `path` is what the user named (None: as `cause` says). An `InputError` (exit code 2), but for a disk without room (1), which
    is no fault of the input.
    """
    named = None if cause.filename is None or isinstance(cause.filename, int) else os.fsdecode(cause.filename)
    shown = named if path is None else os.fspath(path)
    reason = cause.strerror or str(cause) or type(cause).__name__
    text = f"cannot {doing} {shown}: {reason}" if shown else f"the system refused: {reason}"
    if named is not None and shown != named:
        text += f" ({named})"
    if cause.errno in FULL:
        return RscliError(text, ROOM)
    return InputError(
        text, HINTS.get(cause.errno or 0) or hint or "Check the path, and what the system allows you to do there."
    )


def check_regular(path: Path, what: str, missing: str | None = None) -> None:
    """Raises `InputError`, calling the file `what`, unless `path` is a regular file, perhaps behind links.

    A pipe or a device may never end, or never begin. What this process was given as a pipe (`/dev/fd/63`, as a shell's
    `<(command)` makes it) is read all the same. `missing` is what to do where there is no such file.
    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - Path.stat would do the same
    except FileNotFoundError as cause:
        raise InputError(f"there is no {what} {path}", missing) from cause
    except OSError as cause:
        raise system_error(cause, path, f"read the {what}") from cause
    if stat.S_ISDIR(mode):
        raise InputError(f"the {what} {path} is a folder, not a file", "Name the file.")
    if not stat.S_ISREG(mode) and not os.path.abspath(path).startswith(_PIPES):  # noqa: PTH100 - links are left as they are
        raise InputError(f"the {what} {path} is not a file, but a pipe or a device", "Name a regular file.")


@contextmanager
def utf8_name(path: Path) -> Iterator[str]:
    """A name of the file `path` for a library that takes UTF-8 alone: its own, or that of a descriptor on which it is open."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield os.fspath(path)


def open_regular(path: Path, what: str, missing: str | None = None) -> BinaryIO:
    """Opens a regular file for reading. Raises as `check_regular` does, and if it cannot be opened."""
    check_regular(path, what, missing)
    try:
        return path.open("rb")
    except OSError as cause:
        raise system_error(cause, path, f"read the {what}") from cause
