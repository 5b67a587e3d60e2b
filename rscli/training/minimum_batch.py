"""Steps on a single image, which some networks cannot train on.

The published code keeps the last batch of an epoch, however short it is, and so do we: then its presets are ours. Where one
image is left over, and batch normalisation sees one value per channel (maps of 1x1, one noisy copy), there is no variance to
normalise with, and torch refuses. That is found out here before a run begins, not after its first epoch.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from rscli.api import DataSpec
from rscli.config.layers import Resolved
from rscli.config.schema import smallest_step
from rscli.errors import InputError


def check_single_image_batches(resolved: Resolved, classifier: nn.Module, spec: DataSpec, images: int) -> None:
    """Raises `InputError` if an epoch over `images` images has a step on one, and `classifier` cannot be trained on one.

    Tries its forward, of m noisy copies, on a copy of the network, and only where there is one: `classifier` and the run's
    random numbers stay as they are.
    """
    batch = resolved.config.batch
    m = resolved.loss.m if resolved.chunked else 1
    if smallest_step(images, batch, m) > 1:
        return
    device = next(classifier.parameters()).device
    copies = torch.zeros(resolved.loss.m, *spec.shape, device=device)
    try:
        with torch.no_grad():
            deepcopy(classifier).train()(copies)
    except ValueError as cause:
        if "more than 1 value per channel" not in str(cause):
            raise
        larger = next((size for size in range(batch + 1, images + 1) if smallest_step(images, size, m) > 1), None)
        raise InputError(
            f"batch is {batch}, which leaves a single image of the {images} for one step, but batch normalisation in "
            f"{resolved.config.arch['name']} needs more than one",
            "Choose another architecture." if larger is None else f"Choose another batch: --set batch={larger}, for instance.",
        ) from cause
