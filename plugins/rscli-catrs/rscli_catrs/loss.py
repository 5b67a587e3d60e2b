"""CAT-RS, confidence-aware training: Jeong, Kim & Shin, AAAI 2023 (arXiv 2212.09000)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from rscli.api import Loss, Passes, TrainContext, TrainStep, unit
from rscli_catrs.soft_labels import read_or_make

if TYPE_CHECKING:
    from torch import Tensor


class CatRs(Loss):
    """Easy copies of hard images and, where all copies are right, the worst noise nearby.

    With phat the share of an image's m copies that the network classifies rightly, K ~ Binomial(m, phat), at least 1, and pb
    the soft label of the image,

        L_low  = 1/m times the sum of the K smallest of CE(f(x + delta_i), y)
        L_high = max_i KL(pb || softmax f(x + delta_i*))
        L = 1/B sum_B [ L_low + lbd 1[K = m] L_high ]

    delta_i* is delta_i after `steps` (T) steps of length 2 epsilon / T along the gradient of the mean over i of
    KL(pb || softmax f(x + delta_i)), each brought back to |delta_i* - delta_i| <= epsilon; at the end its mean and standard
    deviation over the pixels are made those of delta_i again. It is found in eval mode; the two forwards update batch-norm
    statistics twice per step.

    pb(x) are the vote shares of a smoothed classifier that was trained with Gaussian noise of sigma 0.25, smoothed at 0.25,
    whatever the sigma of this training. They are made before the first step from the model file `teacher`, and kept in the file
    `soft_labels` for other runs.
    """

    m: int = Field(4, ge=1, le=4096, description="noisy copies per image")
    lbd: float = Field(ge=0, description="weight of the worst-case term")
    epsilon: float = Field(
        1.0, gt=0, description="maximum length of the perturbation of the noise", json_schema_extra=unit("[0, 1] pixels")
    )
    steps: int = Field(4, ge=1, le=1000, description="attack steps, each of length 2 epsilon / steps")
    teacher: Path | None = Field(None, description="model file (or run folder) whose votes are the soft labels")
    votes: int = Field(100, ge=1, le=10**6, description="Monte Carlo samples per training image for its soft label")
    soft_labels: Path | None = Field(
        None, description="file that keeps the soft labels; made from the teacher if it is not there"
    )

    @model_validator(mode="after")
    def _some_source(self) -> CatRs:
        if self.teacher is None and self.soft_labels is None:
            raise ValueError(
                "needs soft labels: write loss.teacher=RUN, a model trained with Gaussian noise of sigma 0.25, "
                "or loss.soft_labels=FILE"
            )
        return self

    def setup(self, context: TrainContext) -> Mapping[str, Tensor]:
        """`soft_labels` (images, classes), float32, read or made. Raises `InputError` for files of other data."""
        return {"soft_labels": read_or_make(context, self.soft_labels, self.teacher, self.votes)}

    @property
    def passes(self) -> Passes:
        """Two forwards with gradients of m copies, and an attack of `steps` on their noise."""
        return Passes(trained=2 * self.m, attacked=self.steps * self.m)

    def step(self, step: TrainStep) -> dict[str, Tensor]:
        """The objective of the class's docstring, from logits (m, batch, classes) under the step's noise and under the worst.

        `low` and `high` are scalars in nats, the latter multiplied by lbd already.
        """
        from torch.nn.functional import cross_entropy

        table = step.state["soft_labels"]
        soft = table[step.indices.to(table.device)]
        with step.frozen():
            worst = self._worst_noise(step, soft)
        logits = step.noisy_logits
        m, batch = logits.shape[:2]
        ce = cross_entropy(logits.flatten(0, 1), step.labels.repeat(m), reduction="none").reshape(m, batch)
        phat = (logits.argmax(-1) == step.labels).float().mean(0)
        k = (phat > step.rand(m).T).sum(0).clamp(min=1)
        rank = ce.detach().argsort(0).argsort(0)
        low = ((rank < k) * ce).sum(0) / m
        high = _kl(soft, step.logits(step.noisy(step.images, worst))).amax(0)
        return {"low": low.mean(), "high": self.lbd * ((k == m) * high).mean()}

    def _worst_noise(self, step: TrainStep, soft: Tensor) -> Tensor:
        """delta* (m, batch, channel, height, width), detached."""
        from torch.autograd import grad

        noise = step.noise
        moved = noise
        for _ in range(self.steps):
            at = moved.detach().requires_grad_()
            (uphill,) = grad(_kl(soft, step.logits(step.noisy(step.images, at))).mean(0).sum(), at)
            moved = moved + 2 * self.epsilon / self.steps * uphill / (_lengths(uphill) + 1e-8)
            d = moved - noise
            moved = noise + d * (self.epsilon / _lengths(d).clamp(min=1e-12)).clamp(max=1)
        return _like(moved, noise).detach()


def _kl(soft: Tensor, logits: Tensor) -> Tensor:
    """KL(soft || softmax logits), (m, batch), from `soft` (batch, classes) and `logits` (m, batch, classes)."""
    from torch.special import xlogy

    kl: Tensor = (xlogy(soft, soft) - soft * logits.log_softmax(-1)).sum(-1)
    return kl


def _lengths(d: Tensor) -> Tensor:
    """The L2 lengths (m, batch, 1, 1, 1) of `d` (m, batch, channel, height, width)."""
    from torch.linalg import vector_norm

    lengths: Tensor = vector_norm(d, dim=(2, 3, 4), keepdim=True)
    return lengths


def _like(moved: Tensor, noise: Tensor) -> Tensor:
    """`moved` with the mean and standard deviation over the pixels of `noise`; both (m, batch, channel, height, width)."""
    pixels = (2, 3, 4)
    centred = moved - moved.mean(pixels, keepdim=True)
    spread = noise.std(pixels, keepdim=True, correction=0) / centred.std(pixels, keepdim=True, correction=0).clamp(min=1e-12)
    return centred * spread + noise.mean(pixels, keepdim=True)
