"""The parameters that an optimiser is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rscli.errors import InputError

if TYPE_CHECKING:
    from torch import nn


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of `model` that are not frozen. Raises `InputError` if there are none."""
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise InputError("every parameter of the network is frozen: there is nothing to train", "Leave some of it free.")
    return found
