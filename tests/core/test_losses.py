"""The losses against plain float64 loops written from the papers' formulas, and the pitfalls of each by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from scipy.stats import norm
from torch import nn
from torch.nn import functional

from rscli.api import Position, TrainStep
from rscli_core.losses.consistency import Consistency
from rscli_core.losses.gaussian import GaussianLoss
from rscli_core.losses.macer import Macer
from rscli_core.losses.stability import Stability
from rscli_core.noises.gaussian import Gaussian

CLASSES = 4
LABELS = torch.tensor([2, 0, 3])


def some_logits(m: int, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    """Logits (m, 3, 4) in float64, reproducible."""
    random = torch.Generator().manual_seed(seed)
    return scale * torch.randn((m, len(LABELS), CLASSES), generator=random, dtype=torch.float64)


# --- the formulas, one number at a time --------------------------------------------------------------------------------------


def softmax(logits: Sequence[float]) -> list[float]:
    exps = [math.exp(v) for v in logits]
    return [e / sum(exps) for e in exps]


def mean_of(rows: list[list[float]]) -> list[float]:
    return [sum(row[c] for row in rows) / len(rows) for c in range(CLASSES)]


def cross(p: list[float], q: list[float]) -> float:
    return -sum(a * math.log(b) for a, b in zip(p, q, strict=True))


def by_hand(logits: torch.Tensor) -> dict[str, float]:
    """Every quantity of the consistency objectives without weights, averaged as docs/methods.md says."""
    m, batch, _ = logits.shape
    sums = dict.fromkeys(("ce", "kl", "entropy", "xent", "mse"), 0.0)
    for b in range(batch):
        p = [softmax(logits[i, b].tolist()) for i in range(m)]
        pbar = mean_of(p)
        for i in range(m):
            sums["ce"] -= math.log(p[i][LABELS[b]]) / m
            sums["kl"] += sum(pbar[c] * math.log(pbar[c] / p[i][c]) for c in range(CLASSES)) / m
            sums["xent"] += cross(pbar, p[i]) / m
        sums["entropy"] += cross(pbar, pbar)
        if m > 1:
            sums["mse"] += sum((p[0][c] - p[1][c]) ** 2 for c in range(CLASSES))
    return {name: value / batch for name, value in sums.items()}


def values(terms: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: term.item() for name, term in terms.items()}


def total_gradient(loss: Consistency | GaussianLoss, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The gradient of the summed terms with respect to the logits."""
    logits = logits.clone().requires_grad_()
    sum(loss.terms(logits, labels).values()).backward()
    return logits.grad


# --- Gaussian ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 3])
def test_gaussian_is_the_mean_cross_entropy_of_the_copies(m: int) -> None:
    logits = some_logits(m)
    assert values(GaussianLoss(m=m).terms(logits, LABELS)) == pytest.approx({"ce": by_hand(logits)["ce"]}, rel=1e-12)


def test_the_labels_follow_the_images_through_every_copy() -> None:
    # the copies are the first dimension: labels interleaved the other way (0, 0, 1, 1, ...) would give a large loss here
    labels = torch.tensor([0, 1, 2])
    sure = 50.0 * functional.one_hot(labels, CLASSES).double().expand(2, -1, -1)
    assert GaussianLoss(m=2).terms(sure, labels)["ce"].item() == pytest.approx(0, abs=1e-12)
    assert Consistency(lbd=1).terms(sure, labels)["ce"].item() == pytest.approx(0, abs=1e-12)


# --- consistency -------------------------------------------------------------------------------------------------------------


WEIGHTS = {"default": {"kl": 7.0, "entropy": 0.3}, "xent": {"xent": 7.0}, "kl": {"kl": 7.0}, "mse": {"mse": 7.0}}


@pytest.mark.parametrize(("form", "m"), [(form, m) for form in WEIGHTS for m in (1, 2, 5) if (form, m) != ("mse", 1)])
def test_consistency_agrees_with_plain_loops(form: str, m: int) -> None:
    logits = some_logits(m)
    expected = by_hand(logits)
    wanted = {"ce": expected["ce"], **{name: weight * expected[name] for name, weight in WEIGHTS[form].items()}}
    loss = Consistency(m=m, lbd=7.0, eta=0.3, form=form)
    assert values(loss.terms(logits, LABELS)) == pytest.approx(wanted, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("form", ["default", "xent", "kl", "mse"])
@pytest.mark.parametrize("m", [2, 3])
def test_consistency_has_the_gradient_of_its_value(form: str, m: int) -> None:
    loss = Consistency(m=m, lbd=3.0, eta=0.7, form=form)
    logits = some_logits(m).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: tuple(loss.terms(z, LABELS).values()), logits)


def test_the_mean_is_not_detached() -> None:
    logits = some_logits(2)
    p = logits.softmax(-1)
    pbar = p.mean(0)
    # with a constant pbar the gradient of 1/(mB) sum KL(pbar || p_i) by the logits of copy i is (p_i - pbar) / (mB)
    detached = (p - pbar) / (2 * len(LABELS))
    loss = Consistency(lbd=1, form="kl")
    gradient = total_gradient(loss, logits, LABELS) - total_gradient(GaussianLoss(m=2), logits, LABELS)
    assert (gradient - detached).abs().max() > 1e-2


def test_xent_is_the_default_with_both_weights_equal() -> None:
    logits = some_logits(4)
    both = values(Consistency(m=4, lbd=2.5, eta=2.5).terms(logits, LABELS))
    xent = values(Consistency(m=4, lbd=2.5, form="xent").terms(logits, LABELS))
    assert xent["xent"] == pytest.approx(both["kl"] + both["entropy"], rel=1e-12)


def test_one_copy_leaves_only_the_entropy() -> None:
    logits = some_logits(1).float()
    terms = values(Consistency(m=1, lbd=20, eta=0.5).terms(logits, LABELS))
    assert terms["kl"] == 0
    assert terms["entropy"] == pytest.approx(0.5 * by_hand(logits.double())["entropy"], rel=1e-6)


def test_equal_copies_have_no_divergence() -> None:
    logits = some_logits(1).expand(3, -1, -1)
    assert Consistency(m=3, lbd=20).terms(logits, LABELS)["kl"].item() == pytest.approx(0, abs=1e-13)


def test_mse_compares_the_first_two_copies_only() -> None:
    logits = some_logits(4)
    changed = logits.clone()
    changed[2:] += some_logits(2, seed=1)
    loss = Consistency(m=4, lbd=1, form="mse")
    assert loss.terms(changed, LABELS)["mse"] == loss.terms(logits, LABELS)["mse"]


def test_mse_refuses_a_single_copy() -> None:
    with pytest.raises(ValidationError, match="m = 1: set m to 2 or more"):
        Consistency(m=1, lbd=1, form="mse")


@pytest.mark.parametrize("fields", [{}, {"lbd": -1}, {"lbd": 1, "eta": -1}, {"lbd": 1, "m": 0}, {"lbd": 1, "form": "l1"}])
def test_consistency_refuses_fields(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Consistency(**fields)


# --- numerical stability -----------------------------------------------------------------------------------------------------


def far_apart(gap: float, *, agree: bool) -> torch.Tensor:
    """float32 logits (2, 2, 4) with one class `gap` above the others; the copies agree or name different classes."""
    logits = torch.zeros(2, 2, CLASSES)
    logits[0, :, 0] = gap
    logits[1, :, 0 if agree else 1] = gap
    return logits


def as_the_authors(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Consistency (lbd = 1, eta = 0.5) with pbar as a mean of probabilities: equal in value, not in its gradient."""
    pbar = logits.softmax(-1).mean(0)
    kl = functional.kl_div(logits.log_softmax(-1), pbar.expand_as(logits), reduction="none").sum(-1).mean()
    entropy = -(pbar * pbar.clamp(min=1e-20).log()).sum(-1).mean()
    return functional.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits))) + kl + 0.5 * entropy


@pytest.mark.parametrize("agree", [True, False], ids=["copies-agree", "copies-differ"])
@pytest.mark.parametrize("form", ["default", "xent", "kl", "mse"])
@pytest.mark.parametrize("gap", [1e2, 110.0, 1e3, 1e30])
def test_far_apart_logits_give_a_finite_loss_and_gradient(gap: float, form: str, agree: bool) -> None:
    logits, labels = far_apart(gap, agree=agree), torch.tensor([0, 2])
    loss = Consistency(lbd=10, form=form)
    assert all(term.isfinite() for term in loss.terms(logits, labels).values())
    assert total_gradient(loss, logits, labels).isfinite().all()


def test_the_naive_form_is_equal_but_its_gradient_is_nan_when_the_mean_underflows() -> None:
    labels = torch.tensor([0, 2])
    loss = Consistency(lbd=1)
    near, far = far_apart(5, agree=False).requires_grad_(), far_apart(1000, agree=True).requires_grad_()
    as_the_authors(near, labels).backward()
    torch.testing.assert_close(near.grad, total_gradient(loss, near.detach(), labels))
    as_the_authors(far, labels).backward()
    assert far.grad.isnan().any()
    assert total_gradient(loss, far.detach(), labels).isfinite().all()


def test_float32_agrees_with_float64_at_a_gap_of_1000() -> None:
    logits = far_apart(1000, agree=False) + some_logits(2)[:, :2].float()
    labels = torch.tensor([0, 2])
    loss = Consistency(lbd=10)
    exact = values(loss.terms(logits.double(), labels))
    assert values(loss.terms(logits, labels)) == pytest.approx(exact, rel=1e-5)
    gradients = total_gradient(loss, logits, labels), total_gradient(loss, logits.double(), labels)
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-3, atol=1e-3)


# --- stability and MACER: a step with a linear network, so that noisy and clean logits differ -------------------------------


def a_step(m: int, *, sigma: float = 0.5, scale: float = 1.0) -> TrainStep:
    """Three images of 1 x 2 x 3 pixels through a linear network with weights of size `scale`, all in float64."""
    random = torch.Generator().manual_seed(3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, CLASSES, dtype=torch.float64))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=random, dtype=torch.float64))
    images = torch.rand((3, 1, 2, 3), generator=random, dtype=torch.float64)
    noise = sigma * torch.randn((m, *images.shape), generator=random, dtype=torch.float64)
    return TrainStep(network, images, images, LABELS, torch.arange(3), noise, Gaussian(sigma=sigma), random)


def given(logits: torch.Tensor, labels: torch.Tensor, *, lr_factor: float = 0.1, sigma: float = 0.5) -> TrainStep:
    """A step whose noisy logits (m, batch, classes) are `logits`; its network must not be needed."""
    none, smoothing, position = torch.empty(0), Gaussian(sigma=sigma), Position(lr_factor=lr_factor)
    step = TrainStep(nn.Identity(), none, none, labels, none, none, smoothing, torch.Generator(), position)
    step.__dict__["noisy_logits"] = logits
    return step


@pytest.mark.parametrize("m", [1, 3])
def test_stability_agrees_with_plain_loops(m: int) -> None:
    step = a_step(m)
    ce = stability = 0.0
    for b in range(3):
        clean = softmax(step.model(step.images[b : b + 1])[0].tolist())
        ce -= math.log(clean[LABELS[b]]) / 3
        for i in range(m):
            noisy = softmax(step.model(step.images[b : b + 1] + step.noise[i, b : b + 1])[0].tolist())
            stability += cross(clean, noisy) / (3 * m)
    assert values(Stability(m=m, lbd=1.5).step(step)) == pytest.approx({"ce": ce, "stability": 1.5 * stability}, rel=1e-12)


def test_stability_has_the_gradient_of_its_value_on_both_sides() -> None:
    step = a_step(2)

    def terms(images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(Stability(m=2).step(replace(step, images=images, noise=noise)).values())

    assert torch.autograd.gradcheck(terms, (step.images.requires_grad_(), step.noise.requires_grad_()))


def test_the_target_of_stability_is_not_detached() -> None:
    step = a_step(1)
    step.__dict__["clean_logits"] = clean = some_logits(1)[0].requires_grad_()
    Stability().step(step)["stability"].backward()
    assert clean.grad.abs().max() > 1e-3


def test_stability_makes_two_forwards_in_train_mode() -> None:
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(6, CLASSES)).double()
    Stability().step(replace(a_step(1), model=network))
    assert network[0].num_batches_tracked == 2


def macer_by_hand(logits: torch.Tensor, labels: torch.Tensor, loss: Macer, sigma: float) -> dict[str, float]:
    """MACER's terms with scipy's normal quantile, image by image."""
    m, batch, _ = logits.shape
    ce = robustness = 0.0
    for b in range(batch):
        y = int(labels[b])
        ce -= math.log(mean_of([softmax(logits[i, b].tolist()) for i in range(m)])[y] + 1e-10)
        sharp = mean_of([softmax((loss.beta * logits[i, b]).tolist()) for i in range(m)])
        second, first = sorted(sharp)[-2:]
        xi = float(norm.ppf(second) - norm.ppf(first))
        if sharp[y] == first and math.isfinite(xi) and abs(xi) <= loss.gamma:
            robustness += loss.gamma + xi
    return {"ce": ce / batch, "robustness": loss.lbd * sigma / 2 * robustness / batch}


@pytest.mark.parametrize("sigma", [0.25, 1.0])
@pytest.mark.parametrize("gamma", [0.8, 8.0], ids=["tight", "paper"])
@pytest.mark.parametrize("beta", [1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_macer_agrees_with_plain_loops(seed: int, beta: float, gamma: float, sigma: float) -> None:
    logits = some_logits(5, scale=1.0, seed=seed)
    labels = logits.mean(0).argmax(-1)
    labels[0] = (labels[0] + 1) % CLASSES  # one that is wrong
    loss = Macer(m=5, lbd=12.0, beta=beta, gamma=gamma)
    terms = values(loss.step(given(logits, labels, sigma=sigma)))
    assert terms == pytest.approx(macer_by_hand(logits, labels, loss, sigma), rel=1e-10)


def test_macer_has_the_gradient_of_its_value() -> None:
    logits = some_logits(5, scale=0.5)
    labels = logits.mean(0).argmax(-1)
    loss = Macer(m=5, lbd=12.0, beta=2.0)
    assert values(loss.step(given(logits, labels)))["robustness"] > 0
    assert torch.autograd.gradcheck(lambda z: tuple(loss.step(given(z, labels)).values()), logits.requires_grad_())


def test_macer_divides_by_all_images_not_by_those_in_the_hinge() -> None:
    right = some_logits(4, scale=0.5)[:, :1]
    label = right.mean(0).argmax(-1)
    loss = Macer(m=4, lbd=1.0, beta=1.0)
    alone = values(loss.step(given(right, label)))["robustness"]
    wrong = right.repeat(1, 3, 1)
    labels = torch.cat([label, (label + 1) % CLASSES, (label + 1) % CLASSES])
    assert alone > 0
    assert values(loss.step(given(wrong, labels)))["robustness"] == pytest.approx(alone / 3, rel=1e-12)


def test_beta_is_in_the_robustness_term_only() -> None:
    logits = some_logits(4, scale=0.5)
    step = given(logits, logits.mean(0).argmax(-1))
    mild, sharp = (values(Macer(m=4, lbd=1.0, beta=beta).step(step)) for beta in (1.0, 2.0))
    assert mild["ce"] == sharp["ce"]
    assert mild["robustness"] != pytest.approx(sharp["robustness"], rel=1e-3)


def test_images_beyond_gamma_push_no_further() -> None:
    logits = torch.tensor([[[3.0, 0.0, 0.0, 0.0]]], dtype=torch.float64).requires_grad_()
    terms = Macer(m=1, lbd=1.0, beta=1.0, gamma=2.0).step(given(logits, torch.tensor([0])))
    terms["robustness"].backward()
    assert terms["robustness"] == 0  # xi = PhiInv(0.0433) - PhiInv(0.870) = -2.84
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_macer_stays_finite_at_saturation(dtype: torch.dtype) -> None:
    # the first image is saturated (p1 = 1, p2 = 0: xi is infinite), the second wrong and hopeless (q_y = 0), the third usual
    logits = torch.zeros(2, 3, CLASSES, dtype=dtype)
    logits[:, 0, 1] = logits[:, 1, 2] = 1000.0
    logits[:, 2, 3] = 0.1
    logits.requires_grad_()
    terms = Macer(m=2, lbd=12.0).step(given(logits, torch.tensor([1, 0, 3])))
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 0] == 0).all()
    assert (logits.grad[:, 2] != 0).any()


def test_masking_after_the_quantile_would_be_nan_at_saturation() -> None:
    logits = torch.tensor([[1000.0, 0.0, 0.0, 0.0]]).requires_grad_()
    top = logits.softmax(-1).topk(2).values
    xi = torch.special.ndtri(top[:, 1]) - torch.special.ndtri(top[:, 0])
    torch.where(xi.abs() <= 8, 8 + xi, 0.0).sum().backward()
    assert logits.grad.isnan().any()


@pytest.mark.parametrize(
    ("deferred", "lr_factor", "counts"), [(False, 1, True), (True, 1, False), (True, 0.1, True), (True, 0.01, True)]
)
def test_deferred_macer_waits_for_the_first_drop(deferred: bool, lr_factor: float, counts: bool) -> None:
    logits = some_logits(4, scale=0.5)
    step = given(logits, logits.mean(0).argmax(-1), lr_factor=lr_factor)
    assert (values(Macer(lbd=6.0, beta=1.0, deferred=deferred).step(step))["robustness"] > 0) is counts


def test_settings_of_the_papers_are_the_defaults() -> None:
    assert Stability().model_dump() == {"m": 1, "lbd": 2.0}
    assert Macer(lbd=12).model_dump() == {"m": 16, "lbd": 12.0, "beta": 16.0, "gamma": 8.0, "deferred": False}
    assert Consistency(lbd=10).model_dump() == {"m": 2, "lbd": 10.0, "eta": 0.5, "form": "default", "label_smoothing": 0.0}
    assert [loss.chunked for loss in (GaussianLoss, Consistency, Stability, Macer)] == [True, True, False, False]
