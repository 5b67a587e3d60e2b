"""The residual networks of the CIFAR-10 experiments."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from rscli.api import Architecture, DataSpec, unit
from rscli_core.architectures._sizes import check_size

if TYPE_CHECKING:
    from torch import nn


class CifarResNet(Architecture):
    """ResNet for small images: basic blocks in three stages of 16, 32 and 64 channels.

    He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2, with a 1x1 convolution and batch normalisation
    on the shortcut where the shape changes, as in the code of Cohen et al. 2019. For (3, 32, 32) and ten classes ResNet-110
    has 1,730,714 parameters and ResNet-20 has 272,474.
    """

    field_names: ClassVar = {"cifar_resnet20": {"depth": 20}, "cifar_resnet110": {"depth": 110}}

    depth: int = Field(
        110, ge=8, le=10_000, description="weighted layers: 6 n + 2 for n blocks per stage", json_schema_extra=unit("layers")
    )

    @field_validator("depth")
    @classmethod
    def _whole_blocks(cls, depth: int) -> int:
        below = depth - (depth - 2) % 6
        if depth != below:
            raise ValueError(
                f"depth must be 6 n + 2, such as 20, 56 or 110; the nearest to {depth} are {below} and {below + 6}"
            )
        return depth

    def build(self, spec: DataSpec, *, weights: bool = True) -> nn.Module:
        """A fresh network for images `spec.shape` (channel, height, width). Raises `InputError` below 4x4 pixels."""
        check_size("cifar-resnet", spec.shape, smallest=4)
        from rscli_core.architectures._resnet import Network

        return Network(len(spec.class_names), spec.shape[0], blocks=(self.depth - 2) // 6)
