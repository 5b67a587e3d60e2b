"""What the core schedules share: a warm-up, a time at the full rate, and then the decay that each of them is."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from rscli.api import Schedule, unit


class WarmUp(Schedule):
    """Linear growth over the first epochs, and then the full rate."""

    warmup: float = Field(0.0, ge=0, le=1e6, description="epochs of linear growth", json_schema_extra=unit("epochs"))
    warmup_from: float = Field(0.01, ge=0, le=1, description="where the growth begins", json_schema_extra=unit("lr"))
    per: Literal["step", "epoch"] = Field("step", description="when the rate changes: with every step, or every epoch")

    def factor(self, epoch: float, epochs: int) -> float:
        """warmup_from + (1 - warmup_from) * epoch / warmup during the warm-up, and then what `_after` says."""
        now = math.floor(epoch) if self.per == "epoch" else epoch
        if now < self.warmup:
            return self.warmup_from + (1 - self.warmup_from) * now / self.warmup
        return self._after(now, epochs)

    def _after(self, epoch: float, epochs: int) -> float:
        return 1.0


class Decay(WarmUp):
    """After the warm-up the full rate for `hold` epochs, and then a decay to the floor at the end of the run."""

    hold: float = Field(0.0, ge=0, le=1e6, description="epochs at the full rate after that", json_schema_extra=unit("epochs"))
    floor: float = Field(0.0, ge=0, le=1, description="what the decay ends at", json_schema_extra=unit("lr"))

    def _after(self, epoch: float, epochs: int) -> float:
        begin = self.warmup + self.hold
        if epoch <= begin:
            return 1.0
        return self.floor + (1 - self.floor) * self._shape(min((epoch - begin) / (epochs - begin), 1.0))

    def _shape(self, share: float) -> float:
        """The decay from 1 to 0, at a share in [0, 1] of its time."""
        raise NotImplementedError
