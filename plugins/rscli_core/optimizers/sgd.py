"""Stochastic gradient descent with momentum, as all published code of this field trains with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, field_validator

from rscli.api import Optimizer, unit
from rscli.errors import InputError
from rscli_core.optimizers._trainable import trainable

if TYPE_CHECKING:
    import torch
    from torch import nn


class Sgd(Optimizer):
    """Stochastic gradient descent with momentum; weight decay on every parameter.

    How a step is computed (`implementation`) changes its speed, and at most the last bits of the weights. As `torch` chooses,
    it is a loop over the tensors on a CPU, and many tensors at once (foreach) on a GPU.
    """

    momentum: float = Field(0.9, ge=0, lt=1, description="momentum", json_schema_extra=unit("1"))
    weight_decay: float = Field(1e-4, ge=0, description="L2 penalty on all parameters", json_schema_extra=unit("1"))
    nesterov: bool = Field(False, description="Nesterov's form of the momentum")
    implementation: Literal["torch", "loop", "foreach", "fused"] = Field(
        "torch", description="how a step is computed: as torch chooses, or one of its ways"
    )

    @field_validator("nesterov")
    @classmethod
    def _needs_momentum(cls, nesterov: bool, info: ValidationInfo) -> bool:
        if nesterov and info.data.get("momentum") == 0:
            raise ValueError("needs optimizer.momentum > 0")
        return nesterov

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """torch's SGD of the parameters of `model` that are trained.

        Raises `InputError` if there are none, or if torch cannot compute a step in the chosen way on their device.
        """
        from torch.optim import SGD

        ways: dict[str, dict[str, bool]] = {"torch": {}, "loop": {"foreach": False}}
        try:
            return SGD(
                trainable(model),
                lr=self.lr,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                nesterov=self.nesterov,
                **ways.get(self.implementation, {self.implementation: True}),
            )
        except RuntimeError as cause:  # fused, on a device that has no such kernel
            hint = "Leave optimizer.implementation out."
            raise InputError(f"SGD cannot be {self.implementation} on this device: {cause}", hint) from cause
