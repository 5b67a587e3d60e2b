"""Several networks as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from rscli.api import Composite, DataSpec, Part, Parts

if TYPE_CHECKING:
    from torch import nn


class Ensemble(Composite):
    """The mean of its members' logits: networks that were trained on the same data, from different seeds say.

    Horváth et al., ICLR 2022, "Boosting Randomized Smoothing with Variance Reduced Classifiers" (arXiv 2106.06946): the
    variance of the logits under noise falls with the number of members. With `average = "probabilities"` it is the logarithm
    of the mean of their softmax instead.
    """

    members: tuple[Part, ...] = Field(description="the architectures of the members")
    average: Literal["logits", "probabilities"] = Field("logits", description="what the mean is taken of")

    @field_validator("members")
    @classmethod
    def _some(cls, members: tuple[Part, ...]) -> tuple[Part, ...]:
        if not members:
            raise ValueError("must hold one architecture or more")
        return members

    def compose(self, spec: DataSpec, parts: Parts) -> nn.Module:
        """The network from images `spec.shape` (channel, height, width) to logits. Raises what the members' `build` does."""
        from rscli_core.architectures._composite import Mean

        return Mean([parts.build(member, spec) for member in self.members], probabilities=self.average == "probabilities")
