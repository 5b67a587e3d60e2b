"""Small runs on the digits for tests: how they are trained, listened to, interrupted, and compared without their times."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rscli.config.layers import Resolved, resolve
from rscli.results.rows import HEADER, Row
from rscli.results.writer import ResultWriter
from rscli.runtime.progress import Silent
from rscli.training.train import TrainOptions, train

SIGMA = 0.5
QUICK = ("epochs=1", "batch=32", "optimizer.lr=0.05", f"noise.sigma={SIGMA}")
"""An epoch that leaves some images safe, some near a tie, and some wrong."""

TIME = HEADER.split("\t").index("time")
COLUMNS = tuple(name for name in HEADER.split() if name != "time")
"""Of a result file, as `rows` gives them."""


def train_options(folder: Path, **changes: Any) -> TrainOptions:
    """On the CPU, in one process; data would be looked for beside the run folder."""
    return TrainOptions(out=folder, data_dir=folder.parent, device="cpu", workers=0, **changes)


def trained(folder: Path, *sets: str) -> Path:
    """The model file of a LeNet trained with `QUICK` and `sets`."""
    return train(resolve("digits-gaussian-0.25", sets=[*QUICK, *sets]), train_options(folder), Silent())


def settings(defaults: Mapping[str, str], *sets: str, **changes: str) -> Resolved:
    """`defaults` changed by `changes` (`loss__m="3"` for `loss.m`; an empty text leaves one out), then by `sets`."""
    values = {**defaults, **{key.replace("__", "."): value for key, value in changes.items()}}
    return resolve(sets=[*(f"{key}={value}" for key, value in values.items() if value), *sets])


def rows(path: Path) -> list[tuple[str, ...]]:
    """The cells of a result file of ours, without its header and without the column `time`."""
    header, *lines = path.read_text().splitlines(keepends=True)
    assert header == HEADER
    return [(*cells[:TIME], *cells[TIME + 1 :]) for cells in (line.rstrip("\n").split("\t") for line in lines)]


PROTOCOL = {
    "format": 1,
    "dataset": "digits",
    "split": "test",
    "noise": {"name": "gaussian", "sigma": 0.5},
    "sigma": 0.5,
    "certifier": {"name": "cohen"},
    "n0": 100,
    "n": 1000,
    "alpha": 0.001,
    "labels": False,
    "info": {},
}
"""Of a result that a test makes up."""


def finished(path: Path, rows: Iterable[Row], **protocol: Any) -> Path:
    """A finished result file of ours that holds `rows`, under `PROTOCOL` as changed by `protocol`."""
    with ResultWriter.create(path, {**PROTOCOL, **protocol}) as writer:
        writer.rows = list(rows)  # at once: there may be thousands
        writer.finish()
    return path


class Listening(Silent):
    """Keeps what the user would read, and (total, done) of each task."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.began: list[tuple[int, int]] = []

    def start(self, task: str, total: int, done: int, unit: str) -> None:
        self.began.append((total, done))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class After(Silent):
    """Does something when so many batches are through."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def update(self, done: int, figures: dict[str, str]) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()

    def act(self) -> None:
        raise NotImplementedError


class Interrupting(After):
    """Asks the run to stop, by a signal, after so many batches."""

    def __init__(self, batches: int, number: int = signal.SIGTERM) -> None:
        super().__init__(batches)
        self.number = number

    def act(self) -> None:
        os.kill(os.getpid(), self.number)


class Killed(After):
    """Ends the run at once after so many batches: nothing is saved."""

    def act(self) -> None:
        raise KeyboardInterrupt
