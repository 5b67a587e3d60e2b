"""MACER, maximising the certified radius: Zhai et al., ICLR 2020 (arXiv 2001.02378), algorithm 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from rscli.api import Loss, TrainStep, unit

if TYPE_CHECKING:
    from torch import Tensor


class Macer(Loss):
    """Cross-entropy of the smoothed prediction, plus a hinge on the radius of images that are classified rightly.

    With q the mean over the m copies of softmax f(x + delta_i), qb the mean of softmax(beta f(x + delta_i)), p1 >= p2 the two
    largest of qb, and xi = PhiInv(p2) - PhiInv(p1), which is -2/sigma times the radius,

        L = 1/B [ sum_B -log(q_y + 1e-10) + lbd * sigma/2 * sum_S (gamma + xi) ]

        S = the images with argmax qb = y, xi finite and |xi| <= gamma

    Both sums are divided by all B images, not by |S|; beta is in the second term only. The paper calls m k.

    Where we differ from the authors' code: PhiInv is torch.special.ndtri, more accurate in the tails than their inverse error
    function. Images outside S are replaced by a constant before PhiInv, so that its infinite slope at 0 and 1 cannot turn
    into NaN on the way back.
    """

    chunked: ClassVar[bool] = False

    m: int = Field(16, ge=1, description="noisy copies per image (k in the paper)")
    lbd: float = Field(ge=0, description="weight of the robustness term")
    beta: float = Field(16.0, gt=0, description="inverse temperature of the robustness term")
    gamma: float = Field(8.0, gt=0, description="margin of the hinge, on -xi", json_schema_extra=unit("2 radius / sigma"))
    deferred: bool = Field(
        False, description="lbd = 0 until the learning rate first falls: for the whole run if the schedule keeps it"
    )

    def step(self, step: TrainStep) -> dict[str, Tensor]:
        """`ce` and `robustness`, scalars, the latter multiplied by lbd * sigma/2 already (0 while it is deferred).

        `ce` is in nats, `robustness` in the units of sigma times lbd. The two sums of Zhai et al., algorithm 1, each over B.
        Raises nothing of its own; torch raises RuntimeError if there are fewer than two classes.
        """
        logits, labels = step.noisy_logits, step.labels
        q_y = logits.softmax(-1).mean(0).gather(-1, labels.unsqueeze(-1))
        lbd = 0.0 if self.deferred and step.position.lr_factor == 1 else self.lbd
        return {"ce": -(q_y + 1e-10).log().mean(), "robustness": lbd * step.sigma / 2 * self._hinge(logits, labels).mean()}

    def _hinge(self, logits: Tensor, labels: Tensor) -> Tensor:
        """gamma + xi for the images in S, 0 for the others: (batch,), from `logits` (m, batch, classes)."""
        top = (self.beta * logits).softmax(-1).mean(0).topk(2)
        xi = _xi(top.values.detach())
        inside = (top.indices[:, 0] == labels) & (xi.abs() <= self.gamma)  # false for infinite and NaN xi
        harmless = top.values.where(inside.unsqueeze(-1), 0.5)
        return (self.gamma + _xi(harmless)).where(inside, 0.0)


def _xi(top: Tensor) -> Tensor:
    """PhiInv(p2) - PhiInv(p1), (batch,), from `top` (batch, 2) = p1, p2: not positive; infinite at p1 = 1 or p2 = 0."""
    from torch.special import ndtri

    z: Tensor = ndtri(top)
    return z[:, 1] - z[:, 0]
