"""SmoothAdv without gradients: Salman et al., NeurIPS 2019 (arXiv 1906.04584), the gradient-free variant."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rscli.api import Passes, TrainStep
from rscli_core.attacks._smoothadv import Ascent

if TYPE_CHECKING:
    from torch import Tensor


class GradientFree(Ascent):
    """Ascent along noise that hurts, as PGD but with forwards only (SmoothAdv).

    The gradient of PGD is replaced by 1/m sum_i -softmax f(x + d + delta_i)_y delta_i: up to a factor 1/sigma^2, what m
    samples say of the downward slope of the smoothed probability of y. Steps (shorter where this is below about 1e-8, as in
    PGD), clamping and projection, and their order (`clamp`), are those of PGD.

    With one copy it would be the noise itself whatever the model says, so m >= 2 is needed (the authors' code falls back to
    PGD, rscli refuses to begin).
    """

    min_m: ClassVar[int] = 2

    def passes(self, m: int) -> Passes:
        """A forward a step."""
        return Passes(forward=self.steps * m)

    def ascent(self, step: TrainStep, moved: Tensor) -> Tensor:
        """The estimate at `moved`; both are (batch, channel, height, width)."""
        from torch import no_grad

        with no_grad():
            p = step.logits(step.noisy(moved)).softmax(-1)
            p_y = p.gather(-1, step.labels.expand(p.shape[:-1]).unsqueeze(-1))  # (m, batch, 1)
            return -(p_y[..., None, None] * step.noise).mean(0)
