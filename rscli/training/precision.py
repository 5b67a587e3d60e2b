"""The network as it runs in training: in the precision of the run, perhaps compiled, its logits in fp32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from rscli.errors import InputError
from rscli.runtime.devices import check_precision

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
TRAINING_PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


class Forward(nn.Module):
    """Images (batch, channel, height, width) in [0, 1] to logits (batch, classes), float32, through `network` in `precision`.

    Attacks and losses call this, so that all of a step is in one precision; what they compute from logits is in fp32.
    """

    def __init__(self, network: nn.Module, precision: str, device: torch.device) -> None:
        super().__init__()
        check_precision(precision, device, TRAINING_PRECISIONS)
        self.network = network
        self._precision, self._device = precision, device.type

    def forward(self, images: Tensor) -> Tensor:
        """The logits (batch, classes) of `images`."""
        with self._autocast():
            logits: Tensor = self.network(images)
        return logits.float()

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = AUTOCAST.get(self._precision)
        return nullcontext() if dtype is None else torch.autocast(self._device, dtype)


def compiled(network: nn.Module) -> nn.Module:
    """`network` compiled by torch: the same weights, other kernels. Raises `InputError` where there is no compiler."""
    try:
        made: nn.Module = torch.compile(network)  # type: ignore[assignment]
    except (RuntimeError, ImportError) as cause:
        reason = " ".join(str(cause).split())
        raise InputError(f"torch.compile does not work here: {reason}", "Leave --compile out.") from cause
    return made


def gradient_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """What keeps gradients of fp16 from vanishing (Micikevicius et al., ICLR 2018, section 3.2); other precisions need none."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None
