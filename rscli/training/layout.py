"""The memory layout of a training run, which keeps clear of a fault in native code.

In channels_last on a CPU, oneDNN's gradient of a convolution's weights writes beyond its buffer where the kernel is 1x1, the
stride is above 1 and a pixel has fewer channels than a vector register has floats (16 with AVX-512, 8 with AVX2): the process
crashes ("double free or corruption", exit code 134 or 139), or goes on with a wrong gradient or a torn heap. It is reported as
https://github.com/uxlfoundation/oneDNN/issues/6035, and torch 2.14.1 has it. The forward and the gradient of the input are
right, as are grouped convolutions and the contiguous layout.
"""

from __future__ import annotations

import torch
from torch import nn

from rscli.errors import InputError
from rscli.runtime.devices import memory_layout

VECTOR_FLOATS = 16
"""Floats in the widest vector register that oneDNN works with."""


def unsafe_in_channels_last(network: nn.Module) -> str | None:
    """The name of the first convolution in `network` that must not be trained in channels_last on a CPU; None if all may."""
    for name, module in network.named_modules():
        if not isinstance(module, nn.Conv2d) or module.groups > 1 or module.in_channels >= VECTOR_FLOATS:
            continue
        if set(module.kernel_size) == {1} and max(module.stride) > 1:
            return name or type(module).__name__
    return None


def training_layout(network: nn.Module, device: torch.device, channels_last: bool | None) -> torch.memory_format:
    """The layout to train `network` in on `device`: as asked; or channels_last (None), unless that is not safe there.

    Raises `InputError` if channels_last is asked for where it is not safe.
    """
    unsafe = unsafe_in_channels_last(network) if device.type == "cpu" and channels_last is not False else None
    if unsafe is not None and channels_last:
        raise InputError(
            f"--channels-last is not safe on a CPU for this network: the gradient of {unsafe}, a 1x1 convolution with a stride "
            f"above 1 and fewer than {VECTOR_FLOATS} input channels, can crash or be wrong there (oneDNN issue 6035)",
            "Leave the option out, or write --contiguous.",
        )
    return memory_layout(channels_last is not False and unsafe is None)
