"""Lanes: how many batches are classified side by side.

On a CPU, one batch a processor beats all processors on one batch: nobody waits for the others at the end of every layer, and
what is not parallel inside torch (drawing random numbers, above all) is done on every processor at once. A GPU has one lane:
its own queue keeps it busy.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


def lanes_of(device: torch.device) -> int:
    """As many lanes as torch has threads on a CPU; one elsewhere."""
    return torch.get_num_threads() if device.type == "cpu" else 1


@contextmanager
def lanes(count: int) -> Iterator[ThreadPoolExecutor | None]:
    """`count` threads that share torch's threads between them; None for a single lane, which needs no thread of its own."""
    if count == 1:
        yield None
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "lane", torch.set_num_threads, (max(1, threads // count),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # each lane set its own number, but also that of threads yet to come
