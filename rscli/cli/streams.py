"""The standard streams, whatever the program was started with: closed, on a full disk, read by nobody, or not in UTF-8.

An answer that cannot be written is an error, said once; a message that cannot be written is left out, since a run of hours
is worth more than its log. Here is also the one place where all text goes out, whoever wrote it: what a terminal would obey is
escaped, and what the encoding lacks is written in ASCII (`rscli.text`).
"""

from __future__ import annotations

import errno
import os
import sys
from functools import cached_property
from typing import Any, TextIO, cast

from rscli import text as texts
from rscli.errors import RscliError

FORCED = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS")
"""Variables by which rich and typer are told to write colours into a pipe."""


def secure() -> None:
    """Gives closed streams a place, and replaces stdout and stderr by `_Answers` and `_Messages`.

    A closed stream would leave its number to the next file that is opened, and what is printed would land in that file.
    Writing to the place of a closed stdout fails, as it must: nobody would get the answer.
    """
    for name in ("stdout", "stderr"):
        reconfigure = getattr(getattr(sys, name), "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=texts.ERRORS)
    for name, flags, mode in (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, flags)  # the lowest that is free: the one that was closed
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, closefd=False, errors=texts.ERRORS))
    sys.stdout = cast(TextIO, _Answers(sys.stdout))
    sys.stderr = cast(TextIO, _Messages(sys.stderr))


class _Stream:
    """A text stream that is asked what to do when the system refuses to write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes `text`, with what a terminal would obey escaped; see the class for what happens if it cannot be written."""
        self.write_styled(texts.written(text, colours=self.colours))
        return len(text)

    def write_styled(self, text: str) -> None:
        """Writes `text` as it is: for `rscli.cli.output`, whose consoles move the cursor, and have escaped what they show."""
        if text == "":  # click tries this on, and would take no notice of a refusal
            return
        try:
            self._stream.write(text)
        except OSError as cause:
            self.refused(cause)

    @cached_property
    def colours(self) -> bool:
        """Whether colours are let through: on a terminal, and where somebody asks for them."""
        return any(os.environ.get(name) for name in FORCED) or self._stream.isatty()

    def flush(self) -> None:
        """Hands everything to the system."""
        try:
            self._stream.flush()
        except OSError as cause:
            self.refused(cause)

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
        hint = "Send it to a place that can be written to."
        raise RscliError(f"cannot write the answer to stdout: {reason}", hint) from cause
