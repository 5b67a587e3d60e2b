"""Lengths and directions of perturbations, image by image, for the L2 attacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def norms(d: Tensor) -> Tensor:
    """The L2 lengths (batch, 1, 1, 1) of `d` (batch, channel, height, width)."""
    from torch.linalg import vector_norm

    lengths: Tensor = vector_norm(d, dim=(1, 2, 3), keepdim=True)
    return lengths


def direction(d: Tensor) -> Tensor:
    """d / (|d| + 1e-8), image by image: length 1, but for a `d` near zero; zero stays zero."""
    return d / (norms(d) + 1e-8)


def within(images: Tensor, moved: Tensor, epsilon: float) -> Tensor:
    """`moved` brought back into [0, 1], then to at most `epsilon` from `images` (all (batch, channel, height, width)).

    The second can not undo the first: it moves a point straight towards its image, which lies in the box.
    """
    d = moved.clamp(0, 1) - images
    return images + d * (epsilon / norms(d)).clamp(max=1)
