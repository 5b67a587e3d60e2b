"""LeNet, the network of the MNIST experiments."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rscli.api import Architecture, DataSpec
from rscli_core.architectures._sizes import check_size

if TYPE_CHECKING:
    from torch import nn


class LeNet(Architecture):
    """LeNet: two 5x5 convolutions and two linear layers, for small images.

    After LeCun et al. 1998, in the form that the code of Jeong & Shin 2020 uses for MNIST: 431,080 parameters for (1, 28, 28)
    and ten classes.
    """

    field_names: ClassVar = {"lenet": {}}

    def build(self, spec: DataSpec, *, weights: bool = True) -> nn.Module:
        """A fresh network for images `spec.shape` (channel, height, width). Raises `InputError` below 16x16 pixels."""
        check_size("lenet", spec.shape, smallest=16)
        from rscli_core.architectures._lenet import Network

        return Network(len(spec.class_names), spec.shape)
