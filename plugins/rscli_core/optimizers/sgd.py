"""Stochastic gradient descent with momentum, as all published code of this field trains with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, ValidationInfo, field_validator

from rscli.api import Optimizer, unit

if TYPE_CHECKING:
    import torch
    from torch import nn


class Sgd(Optimizer):
    """Stochastic gradient descent with momentum; weight decay on every parameter."""

    momentum: float = Field(0.9, ge=0, lt=1, description="momentum", json_schema_extra=unit("1"))
    weight_decay: float = Field(1e-4, ge=0, description="L2 penalty on all parameters", json_schema_extra=unit("1"))
    nesterov: bool = Field(False, description="Nesterov's form of the momentum")

    @field_validator("nesterov")
    @classmethod
    def _needs_momentum(cls, nesterov: bool, info: ValidationInfo) -> bool:
        if nesterov and info.data.get("momentum") == 0:
            raise ValueError("needs optimizer.momentum > 0")
        return nesterov

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """torch's SGD of all parameters of `model`."""
        from torch.optim import SGD

        return SGD(
            model.parameters(),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )
