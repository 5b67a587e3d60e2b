"""Worker threads: how many batches are classified in parallel.

On a CPU, one batch per core beats all cores on one batch: no core waits for the others at the end of every layer, and what
torch does not parallelise (drawing random numbers, above all) runs on every core at once. A GPU gets one batch at a time: its
own queue keeps it busy.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


def parallel_batches(device: torch.device) -> int:
    """How many batches `device` classifies in parallel at most: as many as torch has threads on a CPU; one elsewhere."""
    return torch.get_num_threads() if device.type == "cpu" else 1


@contextmanager
def worker_threads(count: int) -> Iterator[ThreadPoolExecutor | None]:
    """`count` worker threads that share torch's threads between them; None for a single one, which is this thread itself."""
    if count == 1:
        yield None
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "sampler", torch.set_num_threads, (max(1, threads // count),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # each worker set its own number, but also that of threads yet to come
