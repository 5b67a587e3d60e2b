"""What callbacks that look at held-out images share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rscli.api import Run

SPLIT = "holdout"
AT_ONCE = 100
"""Images that are read, and held in memory, at a time."""


def accuracies(run: Run, count: int, copies: int, seed: int) -> tuple[Sequence[float], Sequence[float]]:
    """Whether each of the first `count` held-out images is classified rightly: without noise (0 or 1), and under noise.

    Under noise it is the share of `copies` noisy copies, whose noise depends on `seed` and the image's place alone: it is the
    same in every epoch. The model is used in eval mode, and left as it was.
    """
    import torch

    clean: list[float] = []
    noisy: list[float] = []
    device = next(run.model.parameters()).device
    with torch.no_grad(), _evaluated(run.model):
        for start in range(0, count, AT_ONCE):
            images, numbers = run.images(SPLIT, range(start, min(start + AT_ONCE, count)))
            images, labels = images.to(device), torch.from_numpy(numbers).to(device)
            generator = torch.Generator(device).manual_seed(seed * 2**20 + start)
            hits = torch.zeros(len(images), device=device)
            for _ in range(copies):
                noise = run.noise.sample(images.shape, generator=generator, device=device)
                hits += _right(run.model, run.noise.apply(images, noise), labels)
            clean += _right(run.model, images, labels).tolist()
            noisy += (hits / copies).tolist()
    return clean, noisy


def mean_figures(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean of `values`, one an image, and its standard error over the images, as figures `name` and `name_se`.

    The standard error is sqrt(sum (v - mean)^2) / k of k images: sqrt(p (1 - p) / k) where values are 0 or 1.
    """
    count = len(values)
    mean = math.fsum(values) / count
    return {name: mean, f"{name}_se": math.sqrt(math.fsum((value - mean) ** 2 for value in values)) / count}


def _right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    right: Tensor = model(images).argmax(-1) == labels
    return right.float()


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """While the body runs, the model is in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
