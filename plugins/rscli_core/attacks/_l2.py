"""Lengths and directions of perturbations, image by image, for the L2 attacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def norms(d: Tensor) -> Tensor:
    """The L2 lengths (batch, 1, 1, 1) of `d` (batch, channel, height, width), in its units."""
    from torch.linalg import vector_norm

    lengths: Tensor = vector_norm(d, dim=(1, 2, 3), keepdim=True)
    return lengths


def direction(d: Tensor) -> Tensor:
    """d / (|d| + 1e-8), image by image, as `d` (batch, channel, height, width).

    Its length is |d| / (|d| + 1e-8): 1 but for a short `d`, a half at |d| = 1e-8, and zero stays zero. The published code of
    the attacks divides by |d|, which gives length 1 to however short a `d`.
    """
    return d / (norms(d) + 1e-8)


def within(images: Tensor, moved: Tensor, epsilon: float) -> Tensor:
    """`moved` brought back into [0, 1], then to at most `epsilon` (in pixels of [0, 1], L2) from `images`.

    Both are (batch, channel, height, width), as is the answer. The second cannot undo the first: it moves a point straight
    towards its image, which lies in the box.
    """
    return near(images, moved.clamp(0, 1), epsilon)


def near(images: Tensor, moved: Tensor, epsilon: float) -> Tensor:
    """`moved` brought to at most `epsilon` (L2, the units of the pixels) from `images`; all (batch, channel, height, width)."""
    d = moved - images
    return images + d * (epsilon / norms(d)).clamp(max=1)
