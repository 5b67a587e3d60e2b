"""The standard streams, whatever the program was started with: closed, on a full disk, or read by nobody.

An answer that cannot be written is an error, said once; a message that cannot be written is left out, since a run of hours
is worth more than its log.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from rscli.errors import RscliError
from rscli.text import encodable, visible

COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")
"""What rich writes to colour text, and the only escape that passes to a stream that is not a terminal."""

CONTROL = re.compile(r"(\x1b\[\??[0-9;]*[A-HJKSThlm]|\r)")
"""On a terminal also what moves the cursor, erases and scrolls: rich's bars live on it."""


def secure() -> None:
    """Gives closed streams a place, and replaces stdout and stderr by `_Answers` and `_Messages`.

    A closed stream would leave its number to the next file that is opened, and what is printed would land in that file.
    Writing to the place of a closed stdout fails, as it must: nobody would get the answer.
    """
    for name, flags, mode in (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, flags)  # the lowest that is free: the one that was closed
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    sys.stdout = cast(TextIO, _Answers(sys.stdout))
    sys.stderr = cast(TextIO, _Messages(sys.stderr))


_answers: list[TextIO] = []
"""The stdout of the command that runs, while everybody else's is stderr."""


@contextmanager
def diverted() -> Iterator[None]:
    """While the body runs, what anybody prints goes to stderr; only `answers` still leads to stdout.

    So nothing that a plugin or a library prints gets into an answer that a program reads.
    """
    _answers.append(sys.stdout)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = _answers.pop()


def answers() -> TextIO:
    """Where answers go: the stdout that the program was started with."""
    return _answers[0] if _answers else sys.stdout


class _Stream:
    """A text stream that is asked what to do when the system refuses to write.

    It never refuses a character: what its encoding lacks is spelled in ASCII, what a terminal would obey is escaped. The
    strings of our own consoles are escaped before they are coloured (`rscli.cli.console`); here come those of libraries.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._passing = CONTROL if stream.isatty() else COLOUR

    def write(self, text: str) -> int:
        """Writes `text`; see the class for what happens if it cannot be written."""
        if text == "":  # click tries this on, and would take no notice of a refusal
            return 0
        try:
            self._stream.write(self._shown(text))
        except OSError as cause:
            self.refused(cause)
        return len(text)

    def flush(self) -> None:
        """Hands everything to the system."""
        try:
            self._stream.flush()
        except OSError as cause:
            self.refused(cause)

    def _shown(self, text: str) -> str:
        pieces = self._passing.split(text)  # every second one is an escape that may pass
        shown = "".join(piece if place % 2 else visible(piece) for place, piece in enumerate(pieces))
        return encodable(shown, self._stream.encoding or "utf-8")

    def refused(self, cause: OSError) -> None:
        """What to do about it."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Messages(_Stream):
    """stderr: what cannot be written is left out."""

    def refused(self, cause: OSError) -> None:
        """Nothing: there is nobody to tell."""


class _Answers(_Stream):
    """stdout: a reader who has seen enough (`| head`) ends the program quietly, anything else is an error."""

    def refused(self, cause: OSError) -> None:
        """Raises `SystemExit` or `RscliError`; what is left in the buffer goes nowhere, and is not reported again."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        if isinstance(cause, BrokenPipeError):
            raise SystemExit(0) from None  # as SIGPIPE would end a program in C, but for the exit code
        reason = "it is closed" if cause.errno == errno.EBADF else cause.strerror or str(cause)
        hint = "Redirect stdout to a place that can be written to."
        raise RscliError(f"cannot write the answer to stdout: {reason}", hint) from cause
