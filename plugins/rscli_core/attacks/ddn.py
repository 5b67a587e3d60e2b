"""Decoupled direction and norm: Rony et al., CVPR 2019 (arXiv 1811.09600), algorithm 1, as SmoothAdv uses it.

SmoothAdv: Salman et al., NeurIPS 2019 (arXiv 1906.04584), section 3.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from rscli.api import Passes, TrainStep
from rscli_core.attacks._l2 import direction, norms, within
from rscli_core.attacks._smoothadv import SmoothAdv, gradient

if TYPE_CHECKING:
    from torch import Tensor


class Ddn(SmoothAdv):
    """A search for the nearest adversarial image of the smoothed prediction, by direction and norm (SmoothAdv).

    With J as for PGD and g its gradient at the current point, divided by |g| + 1e-8; with d = 0 and a norm of epsilon to
    start with, each of `steps` (T) steps looks at x + d and then

        d    <- d + alpha_k g            alpha_k = 0.01 + 0.99 (1 + cos(pi k / T)) / 2,  k = 1..T
        norm <- norm (1 - gamma) if x + d was adversarial, else norm (1 + gamma)
        d    <- norm d / (|d| + 1e-8), then x + d rounded to `levels` grey levels and clipped to [0, 1]

    Adversarial: the class that most of the m copies are given (the lowest, on equal votes) is not y. The shortest adversarial d
    that was looked at, zero if there was none, is clipped to [0, 1] and projected to |d| <= epsilon.

    Where we differ from the authors' code: it divides by |g| and |d| alone, and takes a random direction where g = 0; on images
    whose gradient is below about 1e-8 our g is shorter and turns d less, and where it is 0 d does not turn. It rounds once more
    after the last projection, which may leave |d| > epsilon, we do not; it caps the norm at the farthest corner of the box,
    which clipping does for us.
    """

    steps: int = Field(10, ge=2, description="points that are tried; the first is the image itself")
    gamma: float = Field(0.05, gt=0, lt=1, description="relative change of the norm in a step")
    levels: int = Field(256, ge=2, description="grey levels of the images that are tried")

    def passes(self, m: int) -> Passes:
        """A gradient at every point but the last, of which only the class is asked."""
        return Passes(attacked=(self.steps - 1) * m, forward=m)

    def perturb(self, step: TrainStep) -> TrainStep:
        """The step with moved images (batch, channel, height, width): in [0, 1], at most `epsilon_at` away, detached.

        Raises nothing of its own.
        """
        images, epsilon = step.images, self.epsilon_at(step.position.epoch)
        norm = images.new_full((len(images), 1, 1, 1), epsilon)
        moved, best, shortest = images, images, norm + math.inf
        for k in range(1, self.steps + 1):
            moved = moved.detach().requires_grad_()
            logits = step.logits(step.noisy(moved))
            adversarial = (_vote(logits) != step.labels).reshape(norm.shape)
            length = norms(moved.detach() - images)
            better = adversarial & (length < shortest)
            best, shortest = moved.detach().where(better, best), length.where(better, shortest)
            if k < self.steps:  # where the last step would lead is never looked at
                norm = norm * (1 + self.gamma - 2 * self.gamma * adversarial)
                moved = self._next(images, moved.detach(), self._alpha(k) * direction(gradient(step, logits, moved)), norm)
        return step.moved(images=within(images, best, epsilon))

    def _alpha(self, k: int) -> float:
        return 0.01 + 0.99 * (1 + math.cos(math.pi * k / self.steps)) / 2

    def _next(self, images: Tensor, moved: Tensor, stride: Tensor, norm: Tensor) -> Tensor:
        """The next point: `norm` (batch, 1, 1, 1) away in the direction of d + stride, rounded to grey levels, in [0, 1]."""
        point = images + norm * direction(moved - images + stride)
        return ((point * (self.levels - 1)).round() / (self.levels - 1)).clamp(0, 1)


def _vote(logits: Tensor) -> Tensor:
    """The class (batch,) that most copies of `logits` (m, batch, classes) are given; the lowest on equal votes."""
    from torch.nn.functional import one_hot

    return one_hot(logits.argmax(-1), logits.shape[-1]).sum(0).argmax(-1)
