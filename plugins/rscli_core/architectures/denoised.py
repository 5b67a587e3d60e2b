"""A denoiser in front of a classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from rscli.api import Composite, DataSpec, Part, Parts

if TYPE_CHECKING:
    from torch import nn


class Denoised(Composite):
    """A denoiser in front of a classifier: x -> f(D(x)).

    Salman et al., NeurIPS 2020, "Denoised Smoothing: A Provable Defense for Pretrained Classifiers" (arXiv 2003.01908). The
    denoiser takes noisy pixels as they are and gives pixels, which are not clipped; the classifier's normalisation comes
    between the two.
    """

    denoiser: Part = Field(description="the architecture of the denoiser D: it gives images of the same shape")
    classifier: Part = Field(description="the architecture of the classifier f")

    def compose(self, spec: DataSpec, parts: Parts) -> nn.Module:
        """The network from images `spec.shape` (channel, height, width) to logits. Raises what the parts' `build` does."""
        from rscli_core.architectures._composite import InFront

        return InFront(parts.build(self.denoiser, spec, gives="images"), parts.build(self.classifier, spec))
