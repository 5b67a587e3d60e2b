"""The step schedule that the published code of this field uses."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar

from pydantic import Field, field_validator

from rscli.api import Schedule, unit


class Step(Schedule):
    """The learning rate is multiplied by gamma at each milestone."""

    renamed: ClassVar[Mapping[str, str]] = {"drops": "milestones", "factor": "gamma"}

    milestones: tuple[int, ...] = Field(
        (),
        strict=False,
        max_length=10_000,
        description="learning-rate milestones: numbers of finished epochs after which the rate is multiplied by gamma",
        json_schema_extra=unit("epochs"),
    )
    gamma: float = Field(
        0.1, gt=0, le=1, description="what a milestone multiplies the learning rate by", json_schema_extra=unit("1")
    )

    @field_validator("milestones")
    @classmethod
    def _increasing(cls, milestones: tuple[int, ...]) -> tuple[int, ...]:
        if any(epoch < 1 for epoch in milestones) or any(b <= a for a, b in pairwise(milestones)):
            raise ValueError("must be increasing numbers of epochs, the first at least 1")
        return milestones

    def remark(self, epochs: int) -> str | None:
        """Milestones that a run of `epochs` never reaches."""
        beyond = [str(milestone) for milestone in self.milestones if milestone >= epochs]
        if not beyond:
            return None
        them = f"milestone {beyond[0]}" if len(beyond) == 1 else f"milestones {', '.join(beyond[:-1])} and {beyond[-1]}"
        left = "keeps its first value" if len(beyond) == len(self.milestones) else "falls less often"
        never = "never comes" if len(beyond) == 1 else "never come"
        return f"the {them} of the schedule {never} in a run of {epochs} epochs: the learning rate {left}"

    def factor(self, epoch: float, epochs: int) -> float:
        """gamma to the power of the milestones that `epoch` has reached."""
        return float(self.gamma ** sum(milestone <= epoch for milestone in self.milestones))
