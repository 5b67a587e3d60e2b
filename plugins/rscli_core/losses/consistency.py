"""Consistency regularization: Jeong & Shin, NeurIPS 2020 (arXiv 2006.04062)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from rscli.api import NoisyLoss
from rscli_core.losses._cross_entropy import cross_entropy, label_smoothing_field

if TYPE_CHECKING:
    from torch import Tensor


class Consistency(NoisyLoss):
    """Cross-entropy under noise, plus a penalty on noisy copies that disagree, plus the entropy of their mean.

    With p_i = softmax f(x + delta_i) and pbar the mean of the m copies' p_i, the objective of the paper (its section 3) is

        L = 1/(mB) sum_B sum_i CE(f(x + delta_i), y) + 1/B sum_B [ lbd * 1/m sum_i KL(pbar || p_i) + eta * H(pbar) ]

    The other forms replace the bracket:

        xent   lbd * 1/m sum_i CE(pbar, p_i), which is lbd * (KL + H)      no separate entropy: eta is not used
        kl     lbd * 1/m sum_i KL(pbar || p_i)                             no entropy: eta is not used
        mse    lbd * |p_1 - p_2|^2, of the first two copies                no entropy: eta is not used; needs m >= 2

    pbar is not detached: the gradient flows through both sides of the KL. With m = 1 the KL is zero, and of the default form
    only eta * H(pbar) remains. Too large a lbd collapses the model to few classes.

    Where we differ from the authors' code: there log pbar is the logarithm of the mean probability, cut off below in the
    entropy, and the gradient is NaN once a mean probability underflows (a gap of about 104 between two logits in float32).
    We compute log pbar = logsumexp_i(log p_i) - log m, which is finite, with its gradient, whenever the logits are.
    """

    m: int = Field(2, ge=1, description="noisy copies per image")
    lbd: float = Field(ge=0, description="weight of the consistency term")
    eta: float = Field(0.5, ge=0, description="weight of the entropy (default form only)")
    form: Literal["default", "xent", "kl", "mse"] = Field("default", description="which consistency term")
    label_smoothing: float = label_smoothing_field()

    @model_validator(mode="after")
    def _two_copies_for_mse(self) -> Consistency:
        if self.form == "mse" and self.m < 2:
            raise ValueError("form = mse compares the first two noisy copies, but m = 1: set m to 2 or more")
        return self

    def terms(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`ce` and the terms of the form, from `logits` (m, batch, classes) and `labels` (batch,).

        They are `kl` and `entropy` (default), `xent`, `kl` or `mse`, each multiplied by its weight already: the engine sums
        the terms as they are, and logs them. Scalars, in nats but for `mse`; Jeong & Shin, section 3, as in the docstring of
        the class. Raises IndexError if form = mse is given the logits of one copy only.
        """
        log_p = logits.log_softmax(-1)
        return {"ce": cross_entropy(log_p, labels, self.label_smoothing), **self._penalty(log_p)}

    def _penalty(self, log_p: Tensor) -> dict[str, Tensor]:
        if self.form == "mse":
            p = log_p[:2].exp()
            return {"mse": self.lbd * (p[0] - p[1]).square().sum(-1).mean()}
        log_pbar = log_p.logsumexp(0) - math.log(len(log_p))
        pbar = log_pbar.exp()  # where this underflows to 0, every factor below and its gradient is still finite
        if self.form == "xent":
            return {"xent": self.lbd * -(pbar * log_p.mean(0)).sum(-1).mean()}
        kl = {"kl": self.lbd * (pbar * (log_pbar - log_p.mean(0))).sum(-1).mean()}
        if self.form == "kl":
            return kl
        return {**kl, "entropy": self.eta * -(pbar * log_pbar).sum(-1).mean()}
