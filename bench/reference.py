"""The usual way to sample, written from its description, as the baseline of our benchmarks.

Cohen et al. 2019 (arXiv 1902.02918), section 3.2: one image at a time, in contiguous batches of 1,000 noisy copies,
predictions brought to the host after every batch, and counted there in a Python loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BATCH = 1000


def sample_counts(
    model: Callable[[Tensor], Tensor], image: Tensor, samples: int, sigma: float, classes: int
) -> NDArray[np.int64]:
    """The class counts (classes,) of `samples` noisy copies of `image` (channel, height, width), on the image's device."""
    counts = np.zeros(classes, np.int64)
    with torch.no_grad():
        while samples > 0:
            size = min(BATCH, samples)
            samples -= size
            batch = image.repeat((size, 1, 1, 1))
            batch = batch + torch.randn_like(batch) * sigma
            for prediction in model(batch).argmax(1).cpu().numpy():
                counts[prediction] += 1
    return counts


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes, with everything it left on a GPU."""
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
