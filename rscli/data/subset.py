"""A part of a split as a split of its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rscli.data.splits import Split


def limited(split: Split, images: int | None) -> Split:
    """At most `images` of `split` (None: all), for a quick look; see `first_of_every_class` for which."""
    if images is None or images >= len(split):
        return split
    return split.part(first_of_every_class(split.labels, images))


def first_of_every_class(labels: NDArray[np.int64], images: int) -> NDArray[np.int64]:
    """The places (images,), increasing, of the first images of every class, as many of each as there are.

    Classes take turns: first the first image of each, then the second, and so on; so class counts differ by one at most, but
    for classes that have no more. Nothing is drawn: every seed has the same images. `images` <= len(labels), labels (n,).
    """
    order = np.argsort(labels, kind="stable")
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    turn = np.empty_like(order)
    turn[order] = np.arange(len(order)) - np.repeat(first, counts)
    return np.sort(np.lexsort((labels, turn))[:images])
