"""The running means of an epoch, kept on the device and read by the host now and then."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rscli.errors import RscliError

INTERVAL = 16
"""Steps between two readings: the host waits for the device once in so many steps."""


class Diverged(RscliError):
    """The loss is no longer finite: all processes find it at the same step, as each has the sum over all."""

    said_by = "first"


class Meter:
    """Sums of the loss, its terms and the accuracy under noise, weighted by images; stops the run when they are not finite.

    `over_processes` gives the sum of a table of scalars over all processes; each adds its part of a step's figures.
    """

    def __init__(
        self,
        state: dict[str, Any] | None = None,
        on_figures: Callable[[Mapping[str, Any]], None] | None = None,
        over_processes: Callable[[Tensor], Tensor] = lambda table: table,
    ) -> None:
        state = state or {"sums": {}, "images": 0}
        self._on_figures, self._over_processes = on_figures, over_processes
        self.sums: dict[str, float] = dict(state["sums"])
        self.images: int = state["images"]
        self._counted: int = state["images"]
        self._waiting: list[tuple[dict[str, Any], int, list[str], Tensor]] = []

    def add(self, values: Mapping[str, Tensor], images: int, *, where: dict[str, Any]) -> None:
        """Remembers this process's part of the figures of a step on `images` in all, scalars by name, and `where` it was:
        epoch, batch, chunk (from 1) and lr.

        Raises `RscliError` (at a reading) with the first step that was not finite.
        """
        self.images += images
        self._waiting.append((where, images, list(values), torch.stack(list(values.values()))))
        if len(self._waiting) >= INTERVAL:
            self.flush()

    def flush(self) -> None:
        """Reads what waits on the device. Raises `RscliError` with the step, the terms and the learning rate if not finite."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        table = self._over_processes(torch.cat([row for *_, row in waiting])).tolist()
        position = 0
        for where, images, names, row in waiting:
            values = dict(zip(names, table[position : position + len(row)], strict=True))
            position += len(row)
            if not all(math.isfinite(value) for value in values.values()):
                shown = ", ".join(f"{name} = {value:g}" for name, value in values.items())
                hint = "The last checkpoint is untouched. A smaller optimizer.lr, or a smaller weight of the term, often helps."
                at = "epoch {epoch}, batch {batch}, chunk {chunk}".format(**where)
                raise Diverged(f"the loss is no longer finite at {at}: {shown} (learning rate {where['lr']:g})", hint)
            if self._on_figures is not None:
                self._on_figures({**where, **values})
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value * images
            self._counted += images

    def means(self) -> dict[str, float]:
        """The means so far, by name."""
        self.flush()
        return {name: value / max(self._counted, 1) for name, value in self.sums.items()}

    def figures(self) -> dict[str, str]:
        """Loss and accuracy of what has been read, for the eye; waits for nothing."""
        if not self._counted:
            return {}
        shown = {"loss": f"{self.sums['loss'] / self._counted:.4f}"}
        if "accuracy" in self.sums:
            shown["accuracy"] = f"{100 * self.sums['accuracy'] / self._counted:.1f}%"
        return shown

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        self.flush()
        return {"sums": self.sums, "images": self.images}
