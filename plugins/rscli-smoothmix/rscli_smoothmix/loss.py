"""SmoothMix: Jeong, Park, Kim, Lee, Kim & Shin, NeurIPS 2021 (arXiv 2111.09277)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from rscli.api import Loss, Passes, TrainStep, unit

if TYPE_CHECKING:
    from torch import Tensor


class SmoothMix(Loss):
    """Cross-entropy under noise, plus a mixup along the way to an unbounded adversarial image, which is to be unsure.

    With pbar(x) the mean of the m copies' softmax f(x + delta_i), and J(x) = -log max(pbar(x)_y, 1e-20): from the image x,
    `steps` (T) steps of length alpha along the gradient of J, kept in [0, 1], lead to x_T. Nothing bounds its distance from x.
    Then, with lam ~ U(0, 1/2) for each image,

        x_mix = (1 - lam) x_c + lam x_T          y_mix = (1 - lam) pbar(x_c) + lam / classes
        L = 1/(mB) sum_B sum_i CE(f(x_c + delta_i), y)
            + eta w / (mB) sum over the images with argmax pbar(x_c) = y, and i, of KL(y_mix || softmax f(x_mix + delta_i))

    x_c is x with one_step = false; with one_step = true it is the first step, brought back to a distance of alpha w. w grows
    from 1/warmup to 1 over the first `warmup` epochs. The target y_mix is not detached. The same noise is used throughout; the
    adversarial image is found in eval mode, and the two forwards update batch-norm statistics twice per step.

    Where we may differ from the authors' code: a step is alpha |g| / (|g| + 1e-8) long, shorter where the gradient is below
    1e-8.
    """

    m: int = Field(4, ge=1, le=4096, description="noisy copies per image")
    eta: float = Field(5.0, ge=0, description="weight of the mixup term")
    alpha: float = Field(1.0, gt=0, description="length of an adversarial step", json_schema_extra=unit("[0, 1] pixels, L2"))
    steps: int = Field(4, ge=1, le=1000, description="adversarial steps (T in the paper)")
    one_step: bool = Field(False, description="train on the first adversarial step in place of the image (mix_step = 1)")
    warmup: int = Field(10, ge=0, description="epochs over which the mixup term grows to its weight; 0 or 1: none")

    @property
    def passes(self) -> Passes:
        """Two forwards with gradients of m copies, and an attack of `steps` on them."""
        return Passes(trained=2 * self.m, attacked=self.steps * self.m)

    def weight_at(self, epoch: int) -> float:
        """w = min(1, (epoch + 1) / warmup); `epoch` counts from 0."""
        return min(1.0, (epoch + 1) / max(self.warmup, 1))

    def step(self, step: TrainStep) -> dict[str, Tensor]:
        """The objective of the class's docstring, from logits (m, batch, classes) of the noisy images and of the mixed ones.

        `ce` and `mixup` are scalars in nats, the latter multiplied by eta w already.
        """
        from torch.nn.functional import cross_entropy

        weight = self.weight_at(step.position.epoch)
        with step.frozen():
            first, last = self._adversaries(step)
        lam = step.rand(1, 1, 1) / 2
        centre = _within(step.images, first, self.alpha * weight) if self.one_step else step.images
        noisy = step.logits(step.noisy(centre))
        pbar = noisy.softmax(-1).mean(0)
        share = lam.reshape(-1, 1)
        target = (1 - share) * pbar + share / pbar.shape[-1]
        log_mixed = step.logits(step.noisy((1 - lam) * centre + lam * last)).log_softmax(-1)
        kl = (target * (target.clamp(min=1e-30).log() - log_mixed)).sum(-1).mean(0)
        right = (pbar.argmax(-1) == step.labels).float()
        labels = step.labels.repeat(len(noisy))
        return {"ce": cross_entropy(noisy.flatten(0, 1), labels), "mixup": self.eta * weight * (right * kl).mean()}

    def _adversaries(self, step: TrainStep) -> tuple[Tensor, Tensor]:
        """The images (batch, channel, height, width) after the first and after the last step, in [0, 1], detached."""
        moved = first = step.images
        for number in range(self.steps):
            moved = (moved + self.alpha * _direction(self._gradient(step, moved))).clamp(0, 1).detach()
            first = moved if number == 0 else first
        return first, moved

    def _gradient(self, step: TrainStep, at: Tensor) -> Tensor:
        """The gradient of J, image by image, at `at` (batch, channel, height, width), in its shape."""
        from torch.autograd import grad

        at = at.detach().requires_grad_()
        p_y = step.logits(step.noisy(at)).softmax(-1).mean(0).gather(-1, step.labels.unsqueeze(-1))
        (found,) = grad(-p_y.clamp(min=1e-20).log().sum(), at)
        return found


def _lengths(d: Tensor) -> Tensor:
    """The L2 lengths (batch, 1, 1, 1) of `d` (batch, channel, height, width)."""
    from torch.linalg import vector_norm

    lengths: Tensor = vector_norm(d, dim=(1, 2, 3), keepdim=True)
    return lengths


def _direction(d: Tensor) -> Tensor:
    return d / (_lengths(d) + 1e-8)


def _within(images: Tensor, moved: Tensor, radius: float) -> Tensor:
    """`moved` brought back to at most `radius` (L2) from `images`; both (batch, channel, height, width)."""
    d = moved - images
    return images + d * (radius / _lengths(d).clamp(min=1e-12)).clamp(max=1)
