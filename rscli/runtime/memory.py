"""Running out of a device's memory: how it is told from other errors, and what the user reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rscli.errors import RscliError

_SIGNS = (
    "DefaultCPUAllocator",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "bad_alloc",
)
"""What torch, and the libraries below it, say in errors that have no class of their own."""


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a device's way of saying that it has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)


@contextmanager
def enough_memory(device: torch.device, what: str, hint: str) -> Iterator[None]:
    """While the body runs: raises `RscliError`, naming `what` did not fit, and the `hint`, if `device` is out of memory."""
    try:
        yield
    except RuntimeError as cause:
        if not out_of_memory(cause):
            raise
        raise RscliError(f"the device {device} does not have enough memory for {what}", hint) from cause
