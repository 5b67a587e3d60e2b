"""The cross-entropy that the core losses share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from rscli.api import unit

if TYPE_CHECKING:
    from torch import Tensor


def label_smoothing_field() -> Any:
    """The hyper-parameter of the losses that smooth labels."""
    return Field(0.0, ge=0, lt=1, description="share of the label that is spread over all classes", json_schema_extra=unit("1"))


def cross_entropy(log_p: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean cross-entropy of `log_p` to the labels, a scalar in nats: `log_p` (..., batch, classes), `labels` (batch,).

    Every leading dimension (the noisy copies) has the same labels. With `label_smoothing` s in [0, 1), the label of K classes
    is 1 - s + s/K, and s/K for every other class (Szegedy et al., CVPR 2016, section 7). A label that is no class is torch's
    error (on a CPU RuntimeError); the engine has checked those of the data.
    """
    return cross_entropies(log_p, labels, label_smoothing).mean()


def cross_entropies(log_p: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """What `cross_entropy` is the mean of: (..., batch, 1), in nats."""
    answers = labels.expand(log_p.shape[:-1]).unsqueeze(-1)
    plain = -log_p.gather(-1, answers)
    if label_smoothing == 0:
        return plain
    return (1 - label_smoothing) * plain - label_smoothing * log_p.mean(-1, keepdim=True)
