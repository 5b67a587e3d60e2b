"""Batch normalisation over all processes: the statistics of a step are those of all its images, as if there were one process.

torch's `SyncBatchNorm` replaces modules, knows its own classes only, and refuses CPUs. Here the call that all of them end in,
`torch.nn.functional.batch_norm`, is answered while an objective runs: any network is synchronised, timm's too, with nothing
replaced. On CUDA torch's own function does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional
from torch.nn.modules import _functions
from torch.overrides import TorchFunctionMode

_TORCHS = functional.batch_norm
_BACKWARD = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
"""In which checkpointed layers run once more, where no mode is active, and on CUDA in a thread of autograd's."""


class SharedStatistics(TorchFunctionMode):
    """While the body runs, batch normalisation in training takes its means and variances over all processes.

    Every process must call the same layers in the same order. Running statistics end up the same in all of them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answers `batch_norm` in training; every other function as always."""
        if func is _TORCHS:
            return _answer(*args, **(kwargs or {}))
        if func in _BACKWARD:
            with _in_every_thread():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def _in_every_thread() -> Iterator[None]:
    """While the body runs, `functional.batch_norm` is answered whoever calls it."""
    functional.batch_norm = _answer
    try:
        yield
    finally:
        functional.batch_norm = _TORCHS


def _answer(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return _TORCHS(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if input.device.type == "cuda":
        world, group = distributed.get_world_size(), distributed.group.WORLD
        out: Tensor = _functions.SyncBatchNorm.apply(
            input, weight, bias, running_mean, running_var, eps, momentum, group, world
        )
        return out
    count, mean, variance = shared_moments(input)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (count / (count - 1).clamp(min=1))).to(running_var.dtype), momentum)
    shape = (1, -1, *[1] * (input.ndim - 2))
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return (input * scale.view(shape) + shift.view(shape)).to(input.dtype)


def shared_moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The count (scalar), mean and variance (channels,), float32 or wider, of `values` (batch, channel, ...) of all processes.

    The variance is divided by the count. Gradients flow to the values of every process. Combined as by Chan, Golub & LeVeque
    (1983): means first, then squares about the common mean, so that nothing cancels.
    """
    rest = [0, *range(2, values.ndim)]
    wide = values if values.dtype == torch.float64 else values.float()
    count = wide.new_tensor(float(values.numel() // values.shape[1]))
    sums = _Sum.apply(torch.cat([wide.sum(rest), count.view(1)]))
    total = sums[-1].detach()
    mean = sums[:-1] / total
    centred = wide - mean.view(1, -1, *[1] * (values.ndim - 2))
    variance = _Sum.apply(centred.square().sum(rest)) / total
    return total, mean, variance


class _Sum(torch.autograd.Function):
    """The sum of a tensor of any shape over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # noqa: ARG004  # torch hands it over
        value = value.clone()
        distributed.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(grad)
        return grad
