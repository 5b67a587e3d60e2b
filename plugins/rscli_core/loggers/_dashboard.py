"""What the loggers that draw curves share: one axis, names of curves, the library, and which run goes on."""

from __future__ import annotations

import importlib
import importlib.util
import uuid
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from rscli.api import Logger, LogWriter, Run
from rscli.errors import InputError

Put = Callable[[dict[str, float], int], None]
"""Takes the points of curves by name, at the number of batches trained since the run began."""


class Dashboard(Logger):
    """A logger that draws curves with a library of its own, in an extra of the same name."""

    library: ClassVar[str]

    every: int = Field(1, ge=0, description="batches from one point of the per-step curves to the next; 0: epochs alone")

    @model_validator(mode="after")
    def _is_there(self) -> Self:
        """Said before the run begins, and not after its folder is made."""
        if importlib.util.find_spec(self.library) is None:
            raise ValueError(_missing(self.library))
        return self

    def imported(self, module: str | None = None) -> Any:
        """The library, or a module of it. Raises `InputError` if it does not load."""
        try:
            return importlib.import_module(module or self.library)
        except ImportError as cause:
            raise InputError(f"{_missing(self.library)} ({cause})") from cause

    def curves(self, run: Run, put: Put, close: Callable[[], object], flush: Callable[[], object] = lambda: None) -> LogWriter:
        """The open log: `flush` is called after each epoch, before the run is saved."""
        kind = _EpochsAndSteps if self.every else _Epochs
        return kind(run.batches, self.every, put, close, flush)


class _Epochs(LogWriter):
    def __init__(self, batches: int, every: int, put: Put, close: Callable[[], object], flush: Callable[[], object]) -> None:
        self.batches, self.every, self.put, self._close, self._flush = batches, every, put, close, flush

    def write(self, line: Mapping[str, Any]) -> None:
        """Points of the curves epoch/loss and so on."""
        self._point("epoch", line, line["epoch"] * self.batches)
        self._flush()

    def _point(self, group: str, line: Mapping[str, Any], done: int) -> None:
        figures = {f"{group}/{name}": float(value) for name, value in line.items() if _is_figure(name, value)}
        self.put({**figures, "epoch": done / self.batches}, done)

    def close(self) -> None:
        """Closes the library's log."""
        self._close()


class _EpochsAndSteps(_Epochs):
    def write_step(self, line: Mapping[str, Any]) -> None:
        """Points of the curves step/loss and so on, if it is time for one."""
        done = (line["epoch"] - 1) * self.batches + line["batch"]
        if done % self.every == 0:
            self._point("step", line, done)


def _is_figure(name: str, value: Any) -> bool:
    return name not in ("epoch", "batch", "chunk") and isinstance(value, int | float) and not isinstance(value, bool)


def _missing(library: str) -> str:
    return f"needs {library}, which is not installed here: pip install 'rscli[{library}]'"


def begins(run: Run) -> bool:
    """Whether this is the beginning of `run`, and not a run that goes on."""
    return (run.epoch, run.batch) == (0, 0)


def name_of(run: Run) -> str:
    """What the run is called: its folder and the one above, `mnist-cons-0.5/seed0`."""
    folder = run.folder.resolve()
    return f"{folder.parent.name}/{folder.name}"


def identity(run: Run, library: str) -> str:
    """Eight hexadecimal digits of this run alone, kept in its folder: new ones when it begins, the same when it is resumed."""
    path = run.folder / f"{library}-id.txt"
    if begins(run) or not path.exists():
        path.write_text(uuid.uuid4().hex[:8] + "\n", encoding="ascii")
    return path.read_text(encoding="ascii").strip()
