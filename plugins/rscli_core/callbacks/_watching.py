"""What callbacks share that watch one figure of the log."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from rscli.api import Callback, Run


class Watching(Callback):
    """Follows one figure from epoch to epoch."""

    figure: str = Field(min_length=1, max_length=200, description="the figure of the log, such as certified_0.5 or loss")
    mode: Literal["max", "min"] = Field("max", description="whether larger or smaller is better")
    min_delta: float = Field(0.0, ge=0, description="what counts as better than the best so far: by more than this")

    def better(self, run: Run, state: dict[str, Any]) -> bool | None:
        """Whether this epoch has the best figure so far, which is then kept in `state`; None if it has none.

        A figure that is not finite is never better. What was kept of another figure is forgotten.
        """
        watched = {"figure": self.figure, "mode": self.mode}
        if {key: state.get(key) for key in watched} != watched:
            state.clear()
            state.update(watched)
        value = run.figures.get(self.figure)
        if not isinstance(value, int | float):
            self._say_once(run, state)
            return None
        gained = (value - state.get("best", value)) * (1 if self.mode == "max" else -1)
        if not math.isfinite(value) or ("best" in state and gained <= self.min_delta):
            return False
        state.update(best=float(value), epoch=run.epoch)
        return True

    def _say_once(self, run: Run, state: dict[str, Any]) -> None:
        if not state.get("said") and "best" not in state:
            state["said"] = True
            known = ", ".join(name for name, value in run.figures.items() if isinstance(value, int | float))
            run.note(
                f"{type(self).__name__} waits for the figure {self.figure}, which the log does not have yet; it has: {known}"
            )
