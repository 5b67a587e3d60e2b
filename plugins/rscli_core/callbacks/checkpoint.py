"""Saves a run every so many epochs."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from rscli.api import Callback, Run, unit


class Checkpoint(Callback):
    """Replaces checkpoint.pt after every so many epochs; a run that is asked to stop saves itself without it."""

    looks_on: ClassVar[bool] = True

    every: int = Field(1, ge=1, description="epochs between two checkpoints", json_schema_extra=unit("epochs"))

    def after_epoch(self, run: Run, state: dict[str, Any]) -> None:
        """Saves, if it is time, and after the last epoch."""
        if run.epoch % self.every == 0 or run.epoch == run.epochs:
            run.save()
