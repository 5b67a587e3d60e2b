"""Stability training with noise: Li, Chen, Wang & Carin, NeurIPS 2019 (arXiv 1809.03113), their training objective."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from rscli.api import Loss, Passes, TrainStep
from rscli_core.losses._cross_entropy import cross_entropy

if TYPE_CHECKING:
    from torch import Tensor


class Stability(Loss):
    """Cross-entropy on the clean image, plus the cross-entropy from its prediction to the noisy one.

        L = 1/B sum_B [ CE(f(x), y) + lbd * -sum_c softmax(f(x))_c log softmax(f(x + delta))_c ]

    The target softmax(f(x)) is not detached: the gradient flows through both sides. The clean and the noisy images are two
    forwards in train mode, so batch-norm statistics are updated twice a step. The paper has one copy of the noise; with
    m > 1 we take the mean of the second term over the copies.
    """

    chunked: ClassVar[bool] = False

    lbd: float = Field(2.0, ge=0, description="weight of the stability term")

    @property
    def passes(self) -> Passes:
        """The noisy copies, and the clean image."""
        return Passes(trained=self.m + 1)

    def step(self, step: TrainStep) -> dict[str, Tensor]:
        """`ce` and `stability`, scalars in nats, the latter multiplied by lbd already; raises nothing of its own.

        The two terms of the training objective of Li et al., each the mean over the batch, from the step's clean logits
        (batch, classes) and noisy ones (m, batch, classes).
        """
        log_clean = step.clean_logits.log_softmax(-1)
        log_noisy = step.noisy_logits.log_softmax(-1)
        stability = -(log_clean.exp() * log_noisy.mean(0)).sum(-1).mean()
        return {"ce": cross_entropy(log_clean, step.labels), "stability": self.lbd * stability}
