"""Says so when training collapses, which a falling loss hides."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic import Field

from rscli.api import Callback, Run


class Collapse(Callback):
    """Warns, once, when training collapses: accuracy at chance while a regulariser has fallen.

    Too large a weight of a regulariser (lbd of consistency, say) is easiest to satisfy by a model that answers the same
    whatever it sees. Training is taken to have collapsed if, in `patience` epochs in a row,

    - the accuracy under noise of the training images, as they were trained on, is at chance: at most q + 3 sqrt(q (1 - q) / k),
      where q is the share of the most frequent class among the k training images; and
    - one of the terms that regularise (all terms of the loss but the first) is below half of the largest mean that an epoch
      so far has had of it.

    A loss of one term, or one that does not look at noisy logits, is not judged.
    """

    looks_on: ClassVar[bool] = True

    patience: int = Field(2, ge=1, description="epochs in a row that look collapsed before it is said")

    def after_epoch(self, run: Run, state: dict[str, Any]) -> None:
        """Looks at the epoch's figures."""
        names = list(run.figures)
        if state.get("said") or "accuracy" not in names:
            return
        terms = {name: run.figures[name] for name in names[names.index("loss") + 1 : names.index("accuracy")][1:]}
        largest = state.setdefault("largest", {})
        for name, value in terms.items():
            largest[name] = max(value, largest.get(name, value))
        fallen = [name for name, value in terms.items() if value < largest[name] / 2]
        looks_so = bool(fallen) and run.figures["accuracy"] <= _chance(run)
        state["collapsed"] = state.get("collapsed", 0) + 1 if looks_so else 0
        if state["collapsed"] >= self.patience:
            state["said"] = True
            run.note(
                f"training seems to have collapsed: after epoch {run.epoch} the accuracy under noise is at chance "
                f"({100 * run.figures['accuracy']:.1f}%), and {fallen[0]} has fallen from {largest[fallen[0]]:.3g} to "
                f"{terms[fallen[0]]:.3g}. A smaller weight of that term, or a ramp that starts it at 0, often helps"
            )


def _chance(run: Run) -> float:
    """What an accuracy at chance does not exceed."""
    import numpy as np

    labels = run.labels("train")
    most = float(np.bincount(labels).max()) / len(labels)
    return most + 3 * math.sqrt(most * (1 - most) / len(labels))
