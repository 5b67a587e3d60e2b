"""Where output goes: answers to stdout, everything for the eye to stderr; bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rscli.cli.streams import answers
from rscli.text import json_text, visible

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from rscli.cli.console import Console
    from rscli.runtime.progress import Progress

PIPE_WIDTH = 100_000
"""Columns of an answer that no terminal shows: rich would cut the cells of a table at fewer."""

LINE_SECONDS = 10.0
"""Without a terminal: seconds between two lines of progress."""


def stdout() -> Console:
    """The console for answers. Not cut to a width when piped; NO_COLOR is honoured."""
    from rscli.cli.console import Console

    out = answers()
    return Console(file=out, soft_wrap=not out.isatty(), width=None if out.isatty() else PIPE_WIDTH)


def stderr() -> Console:
    """The console for messages and progress."""
    from rscli.cli.console import Console

    return Console(stderr=True, soft_wrap=True, highlight=False)


def emit_json(value: Any) -> None:
    """One JSON document on stdout, in ASCII: valid whatever the stream's encoding, and whatever bytes a file's name has."""
    answers().write(json_text(value, ascii_only=True, default=str) + "\n")


def emit_json_line(value: Any) -> None:
    """One JSON line on stdout, in ASCII, at once."""
    answers().write(json_text(value, indent=None, ascii_only=True, default=str) + "\n")
    answers().flush()


def say(text: str) -> None:
    """A plain line on stderr, at once, escaped for the eye."""
    print(visible(text), file=sys.stderr, flush=True)


def room_for_blocks() -> int:
    """Columns of the terminal behind stderr for a picture of block characters; 0 if there is none, or it has no such."""
    if not sys.stderr.isatty():
        return 0
    try:
        "▁█".encode(sys.stderr.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return 0
    return shutil.get_terminal_size().columns


def listener(quiet: bool) -> Progress:
    """The listener for the engine: silent, a bar, or plain lines."""
    if quiet:
        return QuietProgress()
    return BarProgress() if sys.stderr.isatty() else LineProgress()


class QuietProgress:
    """No progress and no notes; warnings all the same."""

    def start(self, task: str, total: int, done: int, unit: str) -> None:
        """Nothing."""

    def update(self, done: int, figures: dict[str, str]) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """A line on stderr."""
        say(f"warning: {text}")


class LineProgress:
    """Progress as plain lines on stderr, one every few seconds: for logs."""

    def __init__(self) -> None:
        self._task, self._unit, self._total, self._before = "", "", 0, 0
        self._began = self._said = 0.0
        self._last: tuple[int, dict[str, str]] | None = None

    def start(self, task: str, total: int, done: int, unit: str) -> None:
        """Remembers the task; the first line comes after some seconds."""
        self._task, self._unit, self._total, self._before = task, unit, total, done
        self._began = self._said = time.monotonic()
        self._last = None

    def update(self, done: int, figures: dict[str, str]) -> None:
        """A line, if the last one is old enough."""
        self._last = (done, figures)
        if time.monotonic() - self._said >= LINE_SECONDS:
            self._say(done, figures)
            self._last = None

    def finish(self) -> None:
        """The last state, unless it is said already."""
        if self._last is not None:
            self._say(*self._last)

    def note(self, text: str) -> None:
        """A line."""
        say(text)

    def warn(self, text: str) -> None:
        """A line marked as a warning."""
        say(f"warning: {text}")

    def _say(self, done: int, figures: dict[str, str]) -> None:
        now = time.monotonic()
        self._said = now
        fresh = done - self._before
        left = (now - self._began) / fresh * (self._total - done) if fresh else None
        eta = "" if left is None else f", {timedelta(seconds=int(left))} left"
        shown = "".join(f", {name} {value}" for name, value in figures.items())
        say(f"{self._task} {done}/{self._total} {self._unit}{shown}{eta}")


class BarProgress:
    """Progress as a bar on a terminal, with the figures beside it."""

    def __init__(self) -> None:
        self._console = stderr()
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def start(self, task: str, total: int, done: int, unit: str) -> None:
        """Shows a bar."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(unit, markup=False),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, transient=False)
        self._bar.start()
        self._task = self._bar.add_task(task, total=total, completed=done, figures="")

    def update(self, done: int, figures: dict[str, str]) -> None:
        """Moves the bar; the bar itself redraws a few times a second."""
        if self._bar is not None and self._task is not None:
            shown = "  ".join(f"{name} {value}" for name, value in figures.items())
            self._bar.update(self._task, completed=done, figures=shown)

    def finish(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text)

    def warn(self, text: str) -> None:
        """A yellow line above the bar."""
        self._console.print(f"warning: {text}", style="yellow")
