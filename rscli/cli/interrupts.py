"""Ctrl-C, SIGTERM and their like outside a run. (One that can be resumed listens itself: `rscli.runtime.signals`.)"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Never

INTERRUPTED = "interrupted"
STOPPED = "stopped: run the same command again, with --resume to continue a run that has begun"


_speaks = True
"""Whether this process says why it ends: the first one does, of several that a launcher started, and ends together."""


class Terminated(BaseException):
    """A signal other than Ctrl-C. No `Exception`, so that nobody takes it for an error of their own, and half files go."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def heard() -> Iterator[None]:
    """While the body runs, the signals `STOPPING` unwind it, are said in a line, and end the process with 130 or 75.

    A signal that the process was started to ignore (by nohup, say) stays ignored.
    """
    from rscli.runtime.signals import STOPPING
    from rscli.runtime.torchrun import is_first

    global _speaks
    _speaks = is_first()
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        for number, handler in before.items():
            if handler not in (signal.SIG_IGN, None):
                signal.signal(number, _receive)
        yield
    except (KeyboardInterrupt, Terminated) as cause:
        stopped_by: int = signal.SIGINT if isinstance(cause, KeyboardInterrupt) else cause.number
        if _speaks:
            print(_said(stopped_by), file=sys.stderr)
        sys.exit(_code(stopped_by))
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _said(number: int) -> str:
    return INTERRUPTED if number == signal.SIGINT else STOPPED


def _code(number: int) -> int:
    return 130 if number == signal.SIGINT else 75


def _receive(number: int, frame: FrameType | None) -> Never:
    """Raises; but while a module is being imported, ends the process on the spot.

    During an import an exception would come out as an import that failed, or not at all: modules catch it, and go on without a
    part of themselves. Nothing is lost by the end there: no file is written while a module is imported. Everywhere else the
    stack must unwind, or half-written files, child processes and a hidden cursor would be left behind.

    Whether a module is being imported, only the frames tell: commands import what they need when they run, so no moment is free
    of imports; and Python's global import lock is not held while a module's code runs.
    """
    if _imports(frame):
        with suppress(OSError):
            if _speaks:
                os.write(2, f"{_said(number)}\n".encode())
        os._exit(_code(number))
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported in `frame`, or where that was called from."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
