"""Stopping when asked, at a moment that can be resumed from."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
STOPPING = tuple(signal.Signals[name] for name in _NAMES if hasattr(signal, name))
"""What asks a run to stop: schedulers (TERM, and before it USR1, USR2 or XCPU), Ctrl-C, and a terminal that is closed."""

INTERRUPTED, COME_BACK = 130, 75
"""The exit codes after Ctrl-C, and after everything else that asks to stop (EX_TEMPFAIL: the same command goes on)."""


def exit_code(number: int) -> int:
    """What a process answers that the signal `number` stopped."""
    return INTERRUPTED if number == signal.SIGINT else COME_BACK


class StopRequest:
    """Set by the first of the signals `STOPPING`; whoever works looks at `requested` between two steps."""

    def __init__(self) -> None:
        self.requested = False
        self.exit_code = COME_BACK

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Remembers the signal; a second Ctrl-C interrupts at once."""
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        self.exit_code = exit_code(number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While the body runs, the signals `STOPPING` become a request. Outside the main thread, signals are left alone.

    One that the process was started to ignore stays ignored (SIGHUP under nohup), but for Ctrl-C and SIGTERM.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    always = (signal.SIGTERM, signal.SIGINT)
    heard = [number for number in STOPPING if number in always or signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, request.receive) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
