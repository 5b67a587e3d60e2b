"""Saves a run every so many epochs, and perhaps in between."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from pydantic import Field, PrivateAttr

from rscli.api import Callback, Run, unit


class Checkpoint(Callback):
    """Replaces checkpoint.pt after every so many epochs; a run that is asked to stop saves itself without it."""

    looks_on: ClassVar[bool] = True

    every: int = Field(1, ge=1, description="epochs between two checkpoints", json_schema_extra=unit("epochs"))
    steps: int | None = Field(
        None, ge=1, description="optimiser steps between two checkpoints, also within an epoch", json_schema_extra=unit("steps")
    )
    minutes: float | None = Field(
        None, gt=0, description="time between two checkpoints, also within an epoch", json_schema_extra=unit("minutes")
    )
    _saved: float = PrivateAttr(0.0)

    def begin(self, run: Run, state: dict[str, Any]) -> None:
        """The time counts from now on."""
        self._saved = time.monotonic()

    def after_step(self, run: Run, state: dict[str, Any]) -> None:
        """Saves within an epoch, if it is time: at the end of this batch."""
        if self.steps is not None:
            state["steps"] = state.get("steps", 0) + 1
            if state["steps"] >= self.steps:
                self._save(run, state)
        if self.minutes is not None and time.monotonic() - self._saved >= 60 * self.minutes:
            self._save(run, state)

    def after_epoch(self, run: Run, state: dict[str, Any]) -> None:
        """Saves, if it is time, and after the last epoch."""
        if run.epoch % self.every == 0 or run.epoch == run.epochs:
            self._save(run, state)

    def _save(self, run: Run, state: dict[str, Any]) -> None:
        """Steps and minutes count from here."""
        self._saved = time.monotonic()
        if self.steps is not None:
            state["steps"] = 0
        run.save()
