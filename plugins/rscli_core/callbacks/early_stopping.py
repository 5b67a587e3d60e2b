"""Ends training when a figure does not get better any more."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rscli.api import Run
from rscli_core.callbacks._watching import Watching


class EarlyStopping(Watching):
    """Ends training when a figure of the log has not got better for a while.

    The model file has the weights of the last epoch, not of the best one: `callbacks.best` keeps those.
    """

    patience: int = Field(
        10, ge=1, description="times in a row that the figure may come without being better; epochs without it do not count"
    )

    def after_figures(self, run: Run, state: dict[str, Any]) -> None:
        """Counts, and ends training."""
        better = self.better(run, state)
        if better is None:
            return
        state["waited"] = 0 if better else state.get("waited", 0) + 1
        if state["waited"] >= self.patience:
            best = f"it was best in epoch {state['epoch']}: {state['best']:g}" if "best" in state else "it was never finite"
            run.stop(f"{self.figure} has not got better {state['waited']} times in a row; {best}")
