"""The losses against plain float64 loops written from the papers' formulas, and the pitfalls of each by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from rscli_core.losses.consistency import Consistency
from rscli_core.losses.gaussian import GaussianLoss

CLASSES = 4
LABELS = torch.tensor([2, 0, 3])


def some_logits(m: int, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    """Logits (m, 3, 4) in float64, reproducible."""
    random = torch.Generator().manual_seed(seed)
    return scale * torch.randn((m, len(LABELS), CLASSES), generator=random, dtype=torch.float64)


# --- the formulas, one number at a time --------------------------------------------------------------------------------------


def softmax(logits: np.ndarray) -> list[float]:
    exps = [math.exp(v) for v in logits]
    return [e / sum(exps) for e in exps]


def mean_of(rows: list[list[float]]) -> list[float]:
    return [sum(row[c] for row in rows) / len(rows) for c in range(CLASSES)]


def cross(p: list[float], q: list[float]) -> float:
    return -sum(a * math.log(b) for a, b in zip(p, q, strict=True))


def by_hand(logits: torch.Tensor) -> dict[str, float]:
    """Every quantity of the consistency objectives without weights, averaged as methods.md says."""
    m, batch, _ = logits.shape
    sums = dict.fromkeys(("ce", "kl", "entropy", "xent", "mse"), 0.0)
    for b in range(batch):
        p = [softmax(logits[i, b].numpy()) for i in range(m)]
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
