"""Stopping when asked, at a moment that can be resumed from."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Set by the first SIGTERM or Ctrl-C; whoever works looks at `requested` between two steps."""

    def __init__(self) -> None:
        self.requested = False
        self.exit_code = 75

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Remembers the signal; a second Ctrl-C interrupts at once."""
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        self.exit_code = 130 if number == signal.SIGINT else 75


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While the body runs, SIGTERM and Ctrl-C become a request. Outside the main thread, signals are left alone."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
