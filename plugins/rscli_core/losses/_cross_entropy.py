"""The cross-entropy that the core losses share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def cross_entropy(log_p: Tensor, labels: Tensor) -> Tensor:
    """The mean of -log_p at the labels, a scalar in nats: `log_p` (..., batch, classes) log-probabilities, `labels` (batch,).

    Every leading dimension (the noisy copies) has the same labels. A label that is no class is torch's error (on a CPU
    RuntimeError); the engine has checked those of the data.
    """
    answers = labels.expand(log_p.shape[:-1]).unsqueeze(-1)
    return -log_p.gather(-1, answers).mean()
