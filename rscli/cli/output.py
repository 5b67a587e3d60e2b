"""Where output goes: answers to stdout, everything for the eye to stderr; bars on a terminal, plain lines elsewhere.

Consoles show text as it is: no markup, no emoji for `:words:`, and what an eye cannot see escaped.
"""

from __future__ import annotations

import sys
import time
from functools import cache
from typing import TYPE_CHECKING, Any

from rscli.text import one_line, plain, to_json, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID
    from rich.text import Text

    from rscli.runtime.progress import Progress

PIPE_WIDTH = 100_000
"""Columns of an answer that no terminal shows: rich would cut the cells of a table at fewer."""

AS_IT_IS: dict[str, Any] = {"markup": False, "emoji": False}
"""How every console of ours takes text."""

LINE_SECONDS = 10.0
"""Without a terminal: seconds between two lines of progress."""


def stdout() -> Console:
    """The console for answers. Not cut to a width when piped; NO_COLOR is honoured."""
    piped = not sys.stdout.isatty()
    return _console()(file=_styled(sys.stdout), soft_wrap=piped, width=PIPE_WIDTH if piped else None, **AS_IT_IS)


def stderr() -> Console:
    """The console for messages and progress."""
    return _console()(file=_styled(sys.stderr), stderr=True, soft_wrap=True, highlight=False, **AS_IT_IS)


def cell(text: str, style: str = "") -> Text:
    """`text` for one cell of a table: on one line, and as wide as it will be shown."""
    from rich.text import Text

    return Text(plain(one_line(text), sys.stdout.encoding or "utf-8"), style=style)


def emit_json(value: Any) -> None:
    """One JSON document on stdout, in ASCII where that is not UTF-8."""
    sys.stdout.write(to_json(value, ascii_only=not _unicode(), indent=2, default=str) + "\n")


def emit_json_line(value: Any) -> None:
    """One JSON line on stdout, at once, in ASCII where that is not UTF-8."""
    sys.stdout.write(to_json(value, ascii_only=not _unicode(), default=str) + "\n")
    sys.stdout.flush()


def _unicode() -> bool:
    return (sys.stdout.encoding or "utf-8").lower().replace("_", "-") in ("utf-8", "utf8", "utf-8-sig")


@cache
def _console() -> type[Console]:
    """Rich's console, but what it shows is escaped; where it moves the cursor it does so. Imported when used."""
    from collections.abc import Iterator

    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class SafeConsole(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(visible(segment.text), segment.style)

    return SafeConsole


def _styled(stream: Any) -> Any:
    """The way past the escaping of `rscli.cli.streams`, for a console that escapes by itself; None where there is none."""
    return _Styled(stream) if hasattr(stream, "write_styled") else None


class _Styled:
    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.write = stream.write_styled

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def listener(quiet: bool) -> Progress:
    """The listener for the engine: silent, a bar, or plain lines."""
    if quiet:
        return QuietProgress()
    return BarProgress() if sys.stderr.isatty() else LineProgress()


def _say(text: str) -> None:
    """A line on stderr, at once."""
    print(visible(text), file=sys.stderr, flush=True)


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
        _say(f"warning: {text}")


class LineProgress:
    """Progress as plain lines on stderr, one every few seconds: for logs."""

    def __init__(self, seconds: float = LINE_SECONDS) -> None:
        self._seconds = seconds
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
        if time.monotonic() - self._said >= self._seconds:
            self._line(done, figures)

    def finish(self) -> None:
        """The last state, if there was one."""
        if self._last is not None:
            self._line(*self._last)

    def note(self, text: str) -> None:
        """A line."""
        _say(text)

    def warn(self, text: str) -> None:
        """A line marked as a warning."""
        _say(f"warning: {text}")

    def _line(self, done: int, figures: dict[str, str]) -> None:
        now = time.monotonic()
        self._said = now
        fresh = done - self._before
        left = (now - self._began) / fresh * (self._total - done) if fresh else None
        eta = "" if left is None else f", {_clock(left)} left"
        shown = "".join(f", {name} {value}" for name, value in figures.items())
        _say(f"{self._task} {done}/{self._total} {self._unit}{shown}{eta}")


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


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"
