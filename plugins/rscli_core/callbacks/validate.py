"""Cheap accuracy of held-out images while training."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from rscli.api import Callback, Run, unit
from rscli_core.callbacks._held_out import SPLIT, accuracies, mean_figures


class Validate(Callback):
    """Logs the accuracy of held-out training images, clean and under noise; needs holdout.

    `holdout_clean` is that without noise, `holdout_noisy` that under noise, averaged over noisy copies; each comes with its
    standard error (`_se`). The noise is the same in every epoch, so that figures differ by the weights alone.
    """

    looks_on: ClassVar[bool] = True
    needs_holdout: ClassVar[bool] = True

    every: int = Field(1, ge=1, description="epochs between two looks", json_schema_extra=unit("epochs"))
    images: int = Field(1000, ge=1, description="held-out images, at most", json_schema_extra=unit("images"))
    copies: int = Field(1, ge=1, le=10_000, description="noisy copies of an image")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the noise")

    def after_epoch(self, run: Run, state: dict[str, Any]) -> None:
        """Logs, if it is time, and after the last epoch."""
        if run.epoch % self.every and run.epoch != run.epochs:
            return
        clean, noisy = accuracies(run, min(self.images, len(run.labels(SPLIT))), self.copies, self.seed)
        run.log({**mean_figures("holdout_clean", clean), **mean_figures("holdout_noisy", noisy)})
