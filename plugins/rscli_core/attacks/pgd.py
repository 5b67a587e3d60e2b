"""SmoothAdv with projected gradient descent: Salman et al., NeurIPS 2019 (arXiv 1906.04584), section 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rscli.api import Passes, TrainStep
from rscli_core.attacks._smoothadv import Ascent, gradient

if TYPE_CHECKING:
    from torch import Tensor


class Pgd(Ascent):
    """Projected gradient ascent on the loss of the smoothed prediction (SmoothAdv).

    One perturbation d an image is shared by the noisy copies that the loss will train on. From d = 0, `steps` (T) steps of
    2 epsilon / T times g / (|g| + 1e-8), where g is the gradient of

        J(d) = -log max( 1/m sum_i softmax f(x + d + delta_i)_y, 1e-20 )

    each followed by clamping x + d to [0, 1] and projecting to |d| <= epsilon, or the reverse (`clamp` says which; the paper
    that used it is named there). Their tables give epsilon in 1/256.

    Where we differ from the authors' code: it divides by |g| alone, so that every step has the length 2 epsilon / T, and takes
    a random direction where g = 0. Our steps are shorter on images whose |g| is below about 1e-8, and where g = 0 we stay.
    """

    def passes(self, m: int) -> Passes:
        """A gradient a step."""
        return Passes(attacked=self.steps * m)

    def ascent(self, step: TrainStep, moved: Tensor) -> Tensor:
        """g at `moved`; both are (batch, channel, height, width)."""
        moved = moved.detach().requires_grad_()
        return gradient(step, step.logits(step.noisy(moved)), moved)
