"""RandAugment (Cubuk, Zoph, Shlens & Le, NeurIPS 2020, arXiv 1909.13719): n operations out of fourteen, of one magnitude.

The operations and their ranges are torchvision's (`transforms.v2.RandAugment`): every operation is as likely as the others,
the sign of those that have one is random, geometry is to the nearest pixel, and what comes in from outside is black. They run
on a whole batch at once, on its device: the images that have the same operation go through it together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def rand_augment(images: Tensor, operations: Tensor, amounts: Tensor) -> Tensor:
    """uint8 `images` (batch, 1 or 3, height, width), each after its operations, one after the other; same shape and dtype.

    `operations` (batch, n) int64 are places in `OPERATIONS`; `amounts` (batch, n) are magnitudes in [-1, 1], whose sign counts
    where an operation has two directions. What happens to an image does not depend on the others.
    """
    known = tuple(OPERATIONS.values())
    out = images.clone(memory_format=torch.contiguous_format)
    for chosen, strength in zip(operations.cpu().T, amounts.cpu().T, strict=True):
        pairs = torch.stack([chosen.double(), strength.double()], 1)
        for place, amount in torch.unique(pairs, dim=0).tolist():
            rows = ((chosen == place) & (pairs[:, 1] == amount)).nonzero()[:, 0].to(out.device, non_blocking=True)
            out[rows] = known[int(place)](out[rows], amount)
    return out


def _tv(name: str, images: Tensor, *arguments: Any, **named: Any) -> Tensor:
    from torchvision.transforms.v2 import functional  # a second to import, and wanted by few runs

    changed: Tensor = getattr(functional, name)(images, *arguments, **named)
    return changed


def _shifted(images: Tensor, across: float = 0.0, down: float = 0.0) -> Tensor:
    """Moved by shares of the width and the height, to whole pixels."""
    by = [int(across * images.shape[-1]), int(down * images.shape[-2])]
    return _tv("affine", images, angle=0.0, translate=by, scale=1.0, shear=[0.0, 0.0])


def _sheared(images: Tensor, across: float = 0.0, down: float = 0.0) -> Tensor:
    """Rows moved to the left by a share of their distance to the top, or columns up by one of that to the left edge."""
    by = [math.degrees(math.atan(across)), math.degrees(math.atan(down))]
    return _tv("affine", images, angle=0.0, translate=[0, 0], scale=1.0, shear=by, center=[0, 0])


OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda images, _: images,
    "shear-x": lambda images, amount: _sheared(images, across=0.3 * amount),
    "shear-y": lambda images, amount: _sheared(images, down=0.3 * amount),
    "translate-x": lambda images, amount: _shifted(images, across=150 / 331 * amount),
    "translate-y": lambda images, amount: _shifted(images, down=150 / 331 * amount),
    "rotate": lambda images, amount: _tv("rotate", images, 30 * amount),
    "brightness": lambda images, amount: _tv("adjust_brightness", images, 1 + 0.9 * amount),
    "saturation": lambda images, amount: _tv("adjust_saturation", images, 1 + 0.9 * amount),
    "contrast": lambda images, amount: _tv("adjust_contrast", images, 1 + 0.9 * amount),
    "sharpness": lambda images, amount: _tv("adjust_sharpness", images, 1 + 0.9 * amount),
    "posterize": lambda images, amount: _tv("posterize", images, 8 - round(4 * abs(amount))),
    "solarize": lambda images, amount: _tv("solarize", images, 255 * (1 - abs(amount))),
    "autocontrast": lambda images, _: _tv("autocontrast", images),
    "equalize": lambda images, _: _tv("equalize", images),
}
"""The operations, whose places are drawn: each takes uint8 images (batch, 1 or 3, height, width) and an amount in [-1, 1]."""
