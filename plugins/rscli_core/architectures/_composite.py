"""Networks made of networks; each takes pixels in [0, 1] and has its normalisation inside."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Mean(nn.Module):
    """The mean of the members' logits, or, of their `probabilities`, its logarithm: (batch, classes)."""

    def __init__(self, members: Iterable[nn.Module], *, probabilities: bool) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.probabilities = probabilities

    def forward(self, images: Tensor) -> Tensor:
        """The logits (batch, classes) of `images` (batch, channel, height, width)."""
        logits = torch.stack([member(images) for member in self.members])
        if self.probabilities:
            return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))
        return logits.mean(0)


class InFront(nn.Module):
    """A classifier of what a denoiser makes of an image."""

    def __init__(self, denoiser: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.denoiser, self.classifier = denoiser, classifier

    def forward(self, images: Tensor) -> Tensor:
        """The logits (batch, classes) of `images` (batch, channel, height, width)."""
        logits: Tensor = self.classifier(self.denoiser(images))
        return logits
