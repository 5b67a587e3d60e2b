"""A power of the time that is left."""

from __future__ import annotations

from pydantic import Field

from rscli.api import unit
from rscli_core.schedules._decay import Decay


class Polynomial(Decay):
    """Linear warm-up, then a power of the time that is left, down to a floor.

    After the warm-up (and `hold`), at the share t of the epochs that are left, the learning rate is multiplied by

        floor + (1 - floor) * (1 - t) ** power

    A run that is no longer than its warm-up only warms up.
    """

    power: float = Field(2.0, gt=0, le=100, description="exponent; 1 is a straight line", json_schema_extra=unit("1"))

    def _shape(self, share: float) -> float:
        return float((1 - share) ** self.power)
