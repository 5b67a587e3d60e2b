"""How the engine tells what it is doing: it reports to this protocol, and never prints."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A listener. The command line has one that draws bars, one that writes plain lines, and one that is silent."""

    def start(self, task: str, total: int, done: int, unit: str) -> None:
        """A task of `total` units begins, of which `done` are finished already."""

    def update(self, done: int, figures: dict[str, str]) -> None:
        """`done` units are finished; `figures` are named values worth showing beside the bar."""

    def finish(self) -> None:
        """The task that began last is over, finished or not."""

    def note(self, text: str) -> None:
        """A line worth keeping on the screen."""

    def warn(self, text: str) -> None:
        """A line that the user should not miss."""


class Silent:
    """Reports nothing."""

    def start(self, task: str, total: int, done: int, unit: str) -> None:
        """Does nothing."""

    def update(self, done: int, figures: dict[str, str]) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""

    def warn(self, text: str) -> None:
        """Does nothing."""
