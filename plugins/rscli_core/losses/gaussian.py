"""Gaussian data augmentation: Cohen, Rosenfeld & Kolter, ICML 2019 (arXiv 1902.02918), section 3.3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rscli.api import NoisyLoss
from rscli_core.losses._cross_entropy import cross_entropy, label_smoothing_field

if TYPE_CHECKING:
    from torch import Tensor


class GaussianLoss(NoisyLoss):
    """Cross-entropy under noise, averaged over the noisy copies.

        L = 1/(mB) sum_B sum_i CE(f(x + delta_i), y)

    Cohen et al. train with one copy (m = 1). With an attack and m > 1 this is the training objective of SmoothAdv (Salman et
    al., NeurIPS 2019, arXiv 1906.04584): the loss of each copy, not the loss of their mean probability.
    """

    label_smoothing: float = label_smoothing_field()

    def terms(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`ce`, a scalar in nats, from `logits` (m, batch, classes) and `labels` (batch,); raises nothing of its own.

        The formula of the class: Cohen et al., section 3.3, with m copies.
        """
        return {"ce": cross_entropy(logits.log_softmax(-1), labels, self.label_smoothing)}
