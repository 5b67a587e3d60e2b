"""LeNet, the network of the MNIST experiments."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rscli.api import Architecture
from rscli_core.architectures._sizes import check_size

if TYPE_CHECKING:
    from torch import nn


class LeNet(Architecture):
    """LeNet: two 5x5 convolutions and two linear layers, for small images.

    After LeCun et al. 1998, in the form that the code of Jeong & Shin 2020 uses for MNIST: 431,080 parameters for (1, 28, 28)
    and ten classes.
    """

    field_names: ClassVar = {"lenet": {}}

    def build(self, classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
        """A fresh network for images `input_shape` (channel, height, width). Raises `InputError` below 16x16 pixels."""
        check_size("lenet", input_shape, smallest=16)
        from rscli_core.architectures._lenet import Network

        return Network(classes, input_shape)
