"""Resizing as a part of a network: behind the noise, so that noise and radii stay those of the images as they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class Resized:
    """A forward hook that resizes the images of a network to `size` x `size` (bilinear, antialiased where it shrinks them).

    A hook, so that the tensors keep the names that they have in other code.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, _network: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the network is given: images (batch, channel, height, width), now (batch, channel, size, size)."""
        images: Tensor = given[0]
        size, shrinks = (self.size, self.size), max(images.shape[-2:]) > self.size
        return (F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=shrinks), *given[1:])
