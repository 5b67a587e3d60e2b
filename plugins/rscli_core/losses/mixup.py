"""Cross-entropy under noise on mixed pairs of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from rscli.api import Loss, TrainStep, unit
from rscli_core.losses import _mixing
from rscli_core.losses._cross_entropy import cross_entropies, label_smoothing_field

if TYPE_CHECKING:
    from torch import Tensor


class Mixup(Loss):
    """Cross-entropy under noise on pairs of images, mixed (mixup) or cut together (CutMix).

        L = 1/(mB) sum_B sum_i [ lam CE(f(xm + delta_i), y) + (1 - lam) CE(f(xm + delta_i), y') ]

        mixup    xm = lam x + (1 - lam) x',                   lam ~ Beta(mixup, mixup)      Zhang et al., ICLR 2018
        CutMix   xm = x with a box of x' in it, lam its area  1 - lam ~ Beta(cutmix, cutmix), before the box is cut off at the
                 that is still x                              image's edge                  Yun et al., ICCV 2019

    Every image has a lam of its own, and all m noisy copies of an image share it, its partner and its box. The noise is put on
    afterwards: it has the full sigma that the certificate is for (mixing noisy images would make it smaller). The partner x' is
    the image before x among those of the optimiser step, or of the part of them that a process or micro-batch holds: with a
    different number of processes the pairs are different ones. An attack has moved the images before they are mixed. The log
    has no accuracy: a mixed image has no one label.
    """

    mixup: float = Field(0.2, ge=0, le=100, description="alpha of mixup; 0: no mixup", json_schema_extra=unit("1"))
    cutmix: float = Field(0.0, ge=0, le=100, description="alpha of CutMix; 0: no CutMix", json_schema_extra=unit("1"))
    switch: float = Field(0.5, ge=0, le=1, description="share of CutMix, where there are both", json_schema_extra=unit("1"))
    share: float = Field(1.0, gt=0, le=1, description="share of the images that are mixed at all", json_schema_extra=unit("1"))
    label_smoothing: float = label_smoothing_field()

    @model_validator(mode="after")
    def _one_of_them(self) -> Mixup:
        if self.mixup == 0 and self.cutmix == 0:
            raise ValueError("mixup and cutmix are both 0: set one of them, or choose loss.name=gaussian")
        return self

    def step(self, step: TrainStep) -> dict[str, Tensor]:
        """`ce`, a scalar in nats: the formula of the class. Raises nothing of its own."""
        images, lam = self.mixed(step.images, step.rand(6))
        log_p = step.logits(step.noisy(images)).log_softmax(-1)
        own, other = (
            cross_entropies(log_p, labels, self.label_smoothing).squeeze(-1)
            for labels in (step.labels, _mixing.partner(step.labels))
        )
        return {"ce": (lam * own + (1 - lam) * other).mean()}

    def mixed(self, images: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """The mixed `images` (batch, channel, height, width), and lam (batch,), from uniform numbers (batch, 6) in [0, 1)."""
        whether, which, u, v = uniform[:, :4].unbind(1)
        plain = whether >= self.share
        cut = which < (self.switch if self.mixup and self.cutmix else float(self.cutmix > 0))
        lam = images.new_ones(len(images))
        out = images
        if self.mixup:
            lam = _mixing.beta(u, v, self.mixup).masked_fill(plain | cut, 1.0)
            out = _mixing.mixup(images, lam)
        if self.cutmix:
            boxed, kept = _mixing.cutmix(images, _mixing.beta(u, v, self.cutmix).masked_fill(plain, 1.0), uniform[:, 4:])
            lam, out = kept.where(cut, lam), boxed.where(cut.view(-1, 1, 1, 1), out)
        return out, lam
