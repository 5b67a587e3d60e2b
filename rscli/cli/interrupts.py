"""Ctrl-C and SIGTERM outside a run. (A run that can be stopped and resumed listens itself: `rscli.runtime.signals`.)"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Never

SAID = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "stopped: the same command begins again, or with --resume goes on where a run had come to",
}
CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}


class Terminated(BaseException):
    """SIGTERM. No `Exception`, so that nobody takes it for an error of their own, and files half written are removed."""


@contextmanager
def heard() -> Iterator[None]:
    """While the body runs, Ctrl-C and SIGTERM unwind it, are said in a line, and end the process with 130 or 75.

    A signal that the process was started to ignore (by nohup, say) stays ignored.
    """
    before = {number: signal.getsignal(number) for number in SAID}
    try:
        for number, handler in before.items():
            if handler not in (signal.SIG_IGN, None):
                signal.signal(number, _receive)
        yield
    except (KeyboardInterrupt, Terminated) as cause:
        number = signal.SIGINT if isinstance(cause, KeyboardInterrupt) else signal.SIGTERM
        print(SAID[number], file=sys.stderr)
        sys.exit(CODES[number])
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _receive(number: int, frame: FrameType | None) -> Never:
    """Raises; but where a module is being read, ends the process on the spot.

    There an exception would come out as an import that failed, or not at all: modules catch it, and go on without a part of
    themselves. And nothing is lost: what is being written is written without reading modules.
    """
    signum = signal.Signals(number)
    if _imports(frame):
        with suppress(OSError):
            os.write(2, f"{SAID[signum]}\n".encode())
        os._exit(CODES[signum])
    raise KeyboardInterrupt if signum is signal.SIGINT else Terminated


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being read in `frame`, or where it was called from."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
