"""SmoothMix against an evaluation of its formulas image by image, in float64, with gradients by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rscli.api import Noise, Position, TrainStep
from rscli_smoothmix.loss import SmoothMix

CLASSES, SHAPE, BATCH = 3, (1, 2, 3), 5


class Additive(Noise):
    norm = "L2"

    def sample(self, shape, *, generator, device):
        return torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float64) * self.sigma


class Linear(nn.Module):
    """Logits that are linear in the pixels, so that gradients can be written down."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(CLASSES, math.prod(SHAPE), generator=random, dtype=torch.float64) * 2)

    def forward(self, images):
        return images.flatten(1) @ self.weight.T


def a_step(m: int, epoch: int) -> TrainStep:
    random = torch.Generator().manual_seed(7)
    images = torch.rand(BATCH, *SHAPE, generator=random, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=random)
    noise = torch.randn(m, BATCH, *SHAPE, generator=random, dtype=torch.float64) * 0.5
    return TrainStep(
        model=Linear(),
        images=images,
        clean=images,
        labels=labels,
        indices=torch.arange(BATCH),
        noise=noise,
        smoothing=Additive(sigma=0.5),
        generator=torch.Generator().manual_seed(11),
        position=Position(epoch=epoch),
    )


def softmax(z):
    e = (z - z.max()).exp()
    return e / e.sum()


def by_hand(step: TrainStep, loss: SmoothMix) -> tuple[float, float]:
    """`ce` and `mixup` image by image: every sum of the paper written out."""
    weight = step.model.weight.detach()
    grow = min(1.0, (step.position.epoch + 1) / max(loss.warmup, 1))
    lam = torch.rand(BATCH, 1, 1, 1, generator=torch.Generator().manual_seed(11)).double() / 2
    m = len(step.noise)
    ce = mixup = 0.0
    for b in range(BATCH):
        x, y = step.images[b].flatten(), int(step.labels[b])
        noise = [step.noise[i, b].flatten() for i in range(m)]
        point = first = x
        for number in range(loss.steps):
            p = [softmax(weight @ (point + d)) for d in noise]
            mean = sum(q[y] for q in p) / m
            # d p_y / d x = p_y (w_y - sum_c p_c w_c), so the gradient of -log mean is
            slope = -sum(q[y] * (weight[y] - q @ weight) for q in p) / (m * mean)
            point = (point + loss.alpha * slope / (slope.norm() + 1e-8)).clamp(0, 1)
            first = point if number == 0 else first
        centre = x
        if loss.one_step:
            d = first - x
            centre = x + d * min(1.0, loss.alpha * grow / max(float(d.norm()), 1e-12))
        p = [softmax(weight @ (centre + d)) for d in noise]
        ce += sum(-math.log(q[y]) for q in p) / (m * BATCH)
        pbar = sum(p) / m
        share = float(lam[b])
        if int(pbar.argmax()) == y:
            target = (1 - share) * pbar + share / CLASSES
            mixed = (1 - share) * centre + share * point
            for d in noise:
                q = softmax(weight @ (mixed + d))
                mixup += loss.eta * grow * sum(float(t * (math.log(t) - math.log(r))) for t, r in zip(target, q, strict=True))
    return ce, mixup / (m * BATCH)


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("one_step", [False, True], ids=["image", "one-step"])
@pytest.mark.parametrize(("epoch", "steps"), [(0, 1), (3, 4), (200, 2)])
def test_the_terms_are_those_of_the_formula(m, one_step, epoch, steps):
    loss = SmoothMix(m=m, eta=2.0, alpha=0.3, steps=steps, one_step=one_step)
    terms = loss.step(a_step(m, epoch))
    ce, mixup = by_hand(a_step(m, epoch), loss)
    assert terms["ce"].item() == pytest.approx(ce, rel=1e-6)
    assert terms["mixup"].item() == pytest.approx(mixup, rel=1e-5, abs=1e-9)
    assert mixup > 0


def test_the_target_is_not_detached_and_the_adversary_is():
    """The gradient by the weights equals a numerical one in which the adversarial images stay where they are."""
    loss = SmoothMix(m=2, eta=3.0, alpha=0.3, steps=2)
    step = a_step(2, 100)
    sum(loss.step(step).values()).backward()
    gradient = step.model.weight.grad[0, 0].item()

    def value(change: float) -> float:
        other = a_step(2, 100)
        with other.frozen():
            fixed = loss._adversaries(other)
        with torch.no_grad():
            other.model.weight[0, 0] += change
        return sum(Fixed(fixed, loss).step(other).values()).item()

    assert gradient == pytest.approx((value(1e-6) - value(-1e-6)) / 2e-6, rel=1e-4)


class Fixed:
    """The loss with given adversarial images."""

    def __init__(self, adversaries, loss) -> None:
        self.loss = type("Given", (SmoothMix,), {"_adversaries": lambda *_: adversaries})(**loss.model_dump())

    def step(self, step):
        return self.loss.step(step)


def test_the_model_is_left_as_it_was_and_extreme_logits_have_finite_gradients():
    step = a_step(2, 100)
    step.model.train()
    with torch.no_grad():
        step.model.weight *= 1000
    terms = SmoothMix(m=2, alpha=0.3).step(step)
    sum(terms.values()).backward()
    assert step.model.training
    assert step.model.weight.requires_grad
    assert torch.isfinite(step.model.weight.grad).all()


def test_images_stay_in_the_box():
    first, last = SmoothMix(m=2, alpha=5.0, steps=3)._adversaries(a_step(2, 0))
    for moved in (first, last):
        assert moved.min() >= 0
        assert moved.max() <= 1


@pytest.mark.parametrize("settings", [{"m": 2, "steps": 3}, {"m": 4, "steps": 1, "one_step": True}], ids=str)
def test_the_cost_that_it_states_is_what_a_step_runs(settings):
    loss, counts = SmoothMix(**settings), {"trained": 0, "attacked": 0}
    step = a_step(loss.m, epoch=20)

    def count(module, inputs, output):
        counts["trained" if module.weight.requires_grad else "attacked"] += len(output)

    step.model.register_forward_hook(count)
    sum(loss.step(step).values()).backward()
    assert counts == {"trained": BATCH * loss.passes.trained, "attacked": BATCH * loss.passes.attacked}
