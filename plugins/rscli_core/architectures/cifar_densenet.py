"""The densely connected network of the CIFAR-10 experiments."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from rscli.api import Architecture, DataSpec, unit
from rscli_core.architectures._sizes import check_size

if TYPE_CHECKING:
    from torch import nn


_LAYER = re.compile(r"features\.block(\d+)\.layer(\d+)\.brc_(\d)\.(norm|conv)\.")
_REST = re.compile(r"(features\.conv0|features\.norm_last|classifier)\.(?=[^.]+$)")
_OURS = {"features.conv0": "conv1", "features.norm_last": "bn", "classifier": "fc", "norm": "bn", "conv": "conv"}


class CifarDenseNet(Architecture):
    """DenseNet for small images: three blocks of bottleneck layers, without compression between them.

    Huang et al. 2017, "Densely Connected Convolutional Networks", section 3. As in the code of Jeong & Shin 2020, "without
    compression" leaves out the 1x1 convolution of a transition: it only pools. Depth 40 and growth 12 have three blocks of six
    layers and, for (3, 32, 32) and ten classes, 211,978 parameters.
    """

    field_names: ClassVar = {"cifar_densenet40": {"depth": 40, "growth": 12}}

    depth: int = Field(40, ge=10, le=1000, description="6 n + 4 for n layers per block", json_schema_extra=unit("layers"))
    growth: int = Field(12, ge=1, le=1000, description="channels that each layer adds", json_schema_extra=unit("channels"))

    @field_validator("depth")
    @classmethod
    def _whole_layers(cls, depth: int) -> int:
        below = depth - (depth - 4) % 6
        if depth != below:
            raise ValueError(
                f"depth must be 6 n + 4, such as 22, 40 or 100; the nearest to {depth} are {below} and {below + 6}"
            )
        return depth

    @classmethod
    def rename(cls, name: str) -> str:
        """The name of a tensor of `cifar_densenet40` in Jeong & Shin's code, which counts its layers from 1."""
        name = _REST.sub(lambda m: f"{_OURS[m[1]]}.", name)
        return _LAYER.sub(lambda m: f"dense{m[1]}.{int(m[2]) - 1}.{_OURS[m[4]]}{m[3]}.", name)

    def build(self, spec: DataSpec, *, weights: bool = True) -> nn.Module:
        """A fresh network for images `spec.shape` (channel, height, width). Raises `InputError` below 4x4 pixels."""
        check_size("cifar-densenet", spec.shape, smallest=4)
        from rscli_core.architectures._densenet import Network

        return Network(len(spec.class_names), spec.shape[0], layers=(self.depth - 4) // 6, growth=self.growth)
