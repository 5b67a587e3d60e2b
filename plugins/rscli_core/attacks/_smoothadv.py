"""What the attacks of SmoothAdv share: Salman et al., NeurIPS 2019 (arXiv 1906.04584), section 3 and its algorithms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rscli.api import Attack, TrainStep, unit
from rscli_core.attacks._l2 import direction, near, within

if TYPE_CHECKING:
    from torch import Tensor


class SmoothAdv(Attack):
    """An L2 attack on the smoothed classifier, its reach growing over the first epochs."""

    epsilon: float = Field(gt=0, description="maximum length of the perturbation", json_schema_extra=unit("[0, 1] pixels"))
    warmup: int = Field(
        10, ge=0, description="epochs over which epsilon grows to its value; 0 or 1: none", json_schema_extra=unit("epochs")
    )

    def epsilon_at(self, epoch: int) -> float:
        """epsilon * min(1, (epoch + 1) / warmup), in pixels of [0, 1]; `epoch` counts from 0."""
        return self.epsilon * min(1.0, (epoch + 1) / max(self.warmup, 1))


class Ascent(SmoothAdv):
    """From the image, steps along `ascent`, each brought back to where the perturbation may be.

    A step is 2 epsilon / steps times |g| / (|g| + 1e-8) long, where g is what `ascent` gives: shorter where |g| is below about
    1e-8. The authors' code divides by |g| alone.

    Two orders of clamping and projecting are in use, and `clamp` chooses. Salman et al.'s code clamps the pixels to [0, 1],
    then projects to |d| <= epsilon. The code of Jeong & Shin (NeurIPS 2020, arXiv 2006.04062), from which their rows of MNIST
    and CIFAR-10 come, projects, then clamps: what the box cuts off is not made up for, so that on MNIST, where most pixels are
    0 or 1, d stays shorter than epsilon.
    """

    steps: int = Field(10, ge=1, description="steps, each of length 2 epsilon / steps, less where the gradient is near 0")

    clamp: Literal["before-projection", "after-projection"] = Field(
        "before-projection",
        description="when pixels are clamped to [0, 1]: before the projection to epsilon (Salman et al.), or after it "
        "(Jeong & Shin), which leaves shorter perturbations where many pixels are 0 or 1",
    )

    def ascent(self, step: TrainStep, moved: Tensor) -> Tensor:
        """Where to go from `moved`, of any length; both are (batch, channel, height, width).

        Raises `NotImplementedError` unless it is overridden.
        """
        raise NotImplementedError

    def perturb(self, step: TrainStep) -> TrainStep:
        """The step with moved images (batch, channel, height, width): in [0, 1], at most `epsilon_at` away, detached.

        Raises nothing of its own.
        """
        epsilon = self.epsilon_at(step.position.epoch)
        moved = step.images
        for _ in range(self.steps):
            uphill = direction(self.ascent(step, moved))
            moved = self._back(step.images, moved + 2 * epsilon / self.steps * uphill, epsilon)
        return step.moved(images=moved)

    def _back(self, images: Tensor, moved: Tensor, epsilon: float) -> Tensor:
        """`moved` brought back to where it may be, in the order that `clamp` says."""
        if self.clamp == "after-projection":
            return near(images, moved, epsilon).clamp(0, 1)
        return within(images, moved, epsilon)


def gradient(step: TrainStep, logits: Tensor, moved: Tensor) -> Tensor:
    """The gradient by `moved`, image by image, of J = -log max(mean_i softmax f(moved + delta_i)_y, 1e-20).

    J is the objective of Salman et al., section 3. `logits` (m, batch, classes) were computed from `moved` (batch, channel,
    height, width), whose shape the gradient has; torch raises RuntimeError if it requires no gradient. The graph of the logits
    is freed, and nothing is accumulated in the model's parameters.
    """
    from torch.autograd import grad

    p_y = logits.softmax(-1).mean(0).gather(-1, step.labels.unsqueeze(-1))
    (by_image,) = grad(-p_y.clamp(min=1e-20).log().sum(), moved)
    return by_image
