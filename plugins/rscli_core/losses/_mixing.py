"""Mixed pairs: mixup (Zhang et al., ICLR 2018, arXiv 1710.09412) and CutMix (Yun et al., ICCV 2019, arXiv 1905.04899)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def partner(values: Tensor) -> Tensor:
    """What each image is mixed with: `values` (batch, ...) of the image before it; of the last one for the first."""
    return values.roll(1, 0)


def beta(u: Tensor, v: Tensor, alpha: float) -> Tensor:
    """Numbers in [0, 1] with the distribution Beta(alpha, alpha), from two independent uniform ones of the same shape.

    With w = u^(1/alpha) and c = cos(2 pi v), 1/2 + c/2 sqrt((1 - w) / (w + (1 - w) c^2)): a t variate with 2 alpha degrees of
    freedom (Bailey, Math. Comp. 1994), carried to the beta distribution (Devroye 1996, "in one line of code"). Exact for every
    alpha > 0.
    """
    w, c = u ** (1 / alpha), (2 * math.pi * v).cos()
    half = c / 2 * ((1 - w) / (w + (1 - w) * c.square()).clamp_min(1e-30)).sqrt()
    return (0.5 + half).clamp(0, 1)  # which rounding may leave


def mixup(images: Tensor, share: Tensor) -> Tensor:
    """share * image + (1 - share) * partner: `images` (batch, channel, height, width), `share` (batch,) in [0, 1]."""
    share = share.view(-1, 1, 1, 1)
    return share * images + (1 - share) * partner(images)


def cutmix(images: Tensor, share: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """The images with a box of their partner's in them, and the share (batch,) of each image that is still its own.

    The box has the image's proportions, the sides times sqrt(1 - share), and its centre at `centre` (batch, 2), both in
    [0, 1); what would be outside the image is cut off (Yun et al., section 3.2 and their algorithm A1).
    """
    height, width = images.shape[-2:]
    rows = _inside(height, share, centre[:, 0])
    columns = _inside(width, share, centre[:, 1])
    box = rows.unsqueeze(-1) & columns.unsqueeze(-2)
    return partner(images).where(box.unsqueeze(1), images), 1 - box.flatten(1).float().mean(1)


def _inside(side: int, share: Tensor, centre: Tensor) -> Tensor:
    """Which of the `side` rows (or columns) are in each image's box: (batch, side)."""
    import torch

    place = torch.arange(side, device=share.device)
    half = ((side * (1 - share).sqrt()).floor() / 2).floor().unsqueeze(-1)
    middle = (side * centre).floor().unsqueeze(-1)
    return (place >= middle - half) & (place < middle + half)
