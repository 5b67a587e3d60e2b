"""DnCNN, the denoiser of denoised smoothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rscli.api import Architecture, DataSpec, unit

if TYPE_CHECKING:
    from torch import nn


class DnCNN(Architecture):
    """A residual denoiser: D(x) = x - R(x), where R has `depth` 3x3 convolutions; a part of `denoised`.

    Zhang et al. 2017, "Beyond a Gaussian Denoiser: Residual Learning of Deep CNN for Image Denoising", sections III A and B:
    convolution and ReLU, then convolution, batch normalisation and ReLU, and a last convolution. Salman et al. 2020 use depth
    17 and 64 channels: 558,400 parameters for RGB.
    """

    gives: ClassVar[Literal["logits", "images"]] = "images"

    depth: int = Field(17, ge=3, le=1000, description="convolutions", json_schema_extra=unit("layers"))
    width: int = Field(64, ge=1, le=4096, description="channels between them", json_schema_extra=unit("channels"))

    def build(self, spec: DataSpec, *, weights: bool = True) -> nn.Module:
        """A fresh network from images `spec.shape` (channel, height, width) to images of that shape."""
        from rscli_core.architectures._dncnn import Network

        return Network(spec.shape[0], self.depth, self.width)
