"""The objective as a module, and an attack before it: what plugins may do, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rscli.api import Attack, Loss, TrainStep
from rscli.errors import PluginError
from rscli.training.objective import Objective, attacked
from rscli_core.noises.gaussian import Gaussian


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3))


def a_step(model: nn.Module | None = None) -> TrainStep:
    random = torch.Generator().manual_seed(2)
    images, noise = torch.rand(4, 1, 6, 6, generator=random), torch.randn(2, 4, 1, 6, 6, generator=random)
    places = torch.arange(4)
    return TrainStep(model or network(), images, images, places % 3, places, noise, Gaussian(sigma=1), random)


def a_loss(does) -> Loss:
    class Made(Loss):
        def step(self, step: TrainStep) -> dict[str, Tensor]:
            return does(step)

    return Made()


def an_attack(does) -> Attack:
    class Moving(Attack):
        def perturb(self, step: TrainStep) -> TrainStep:
            return does(step)

    return Moving()


def ce(step: TrainStep) -> Tensor:
    return nn.functional.cross_entropy(step.noisy_logits[0], step.labels)


# --- the loss ----------------------------------------------------------------------------------------------------------------


def test_a_module_that_has_the_networks_parameters_and_gives_the_terms():
    step = a_step()
    objective = Objective(step.model)
    assert [*objective.parameters()] == [*step.model.parameters()]
    terms = objective(a_loss(lambda step: {"ce": ce(step), "twice": 2 * ce(step)}), step)
    assert [*terms] == ["ce", "twice"]
    assert terms["twice"] == 2 * terms["ce"]
    terms["ce"].backward()
    assert all(parameter.grad is not None for parameter in step.model.parameters())


@pytest.mark.parametrize(
    ("does", "message"),
    [
        (ce, r"step returned tensor\(.*: it must return named scalars"),
        (lambda _: {}, r"must return at least one named scalar, and returned \{\}"),
        (lambda step: {"ce": step.noisy_logits.mean(0)}, r"returned \{'ce': \(4, 3\)\}"),
        (lambda step: {"ce": ce(step).item()}, "it must return named scalars"),
        (lambda step: {1: ce(step)}, "it must return named scalars"),
        (lambda step: {"ce": ce(step).detach()}, "terms without gradients, from which nothing can be learned"),
        (lambda step: {"ce": ce(step), "lr": ce(step)}, "calls a term lr, which the log has for itself"),
        (lambda step: {"ce": ce(step), "grad_norm": ce(step)}, "calls a term grad_norm, which"),
        (lambda step: {"ce": ce(step), "loss": ce(step)}, "calls a term loss, which"),
        (lambda step: {"ce": ce(step) + step.noise.mul_(2).sum()}, "changed the step's noise in place"),
        (lambda step: {"ce": ce(step) + step.labels.add_(0).sum()}, "changed the step's labels in place"),
        (lambda step: {"ce": ce(step) / int("x")}, "failed in step: ValueError: invalid literal"),
    ],
)
def test_a_loss_that_breaks_its_contract_is_named(does, message):
    step = a_step()
    with pytest.raises(PluginError, match=message) as error:
        Objective(step.model)(a_loss(does), step)
    assert error.value.message.startswith("the loss Made ")
    assert error.value.exit_code == 2


def test_a_single_term_may_be_called_loss():
    step = a_step()
    assert [*Objective(step.model)(a_loss(lambda step: {"loss": ce(step)}), step)] == ["loss"]


# --- the attack --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("does", "message"),
    [
        (lambda step: step.images, r"perturb returned a Tensor: it must return step.moved\(images=...\)"),
        (lambda step: step.moved(images=step.images[:2]), r"returned images of shape \(2, 1, 6, 6\), not \(4, 1, 6, 6\)"),
        (lambda step: step.moved(noise=step.noise[0]), r"returned noise of shape \(4, 1, 6, 6\), not \(2, 4, 1, 6, 6\)"),
        (lambda step: step.moved(images=step.images.double()), "returned images that are no tensor of torch.float32"),
        (lambda step: step.moved(images=step.images.numpy()), "returned images that are no tensor of torch.float32"),
        (lambda step: step.moved(images=step.images + 1), "returned pixels from .* they must be in"),
        (lambda step: step.moved(images=step.images - 1), "returned pixels from .* they must be in"),
        (lambda step: step.moved(images=step.images.sqrt() * torch.nan), "returned pixels from nan to nan"),
        (lambda step: step.moved(target=3), "added target, of which not all are tensors"),
        (lambda step: step.moved(images=step.images.mul_(1)), "changed the step's images and clean in place"),
        (lambda step: step.moved(images=step.images / 0 * int("x")), "failed in perturb: ValueError"),
    ],
)
def test_an_attack_that_breaks_its_contract_is_named(does, message):
    step = a_step()
    modes = [module.training for module in step.model.modules()]
    with pytest.raises(PluginError, match=message) as error:
        attacked(an_attack(does), step)
    assert error.value.message.startswith("the attack Moving ")
    assert [module.training for module in step.model.modules()] == modes
    assert all(parameter.requires_grad for parameter in step.model.parameters())


def test_one_bad_pixel_is_enough():
    def does(step: TrainStep) -> TrainStep:
        images = step.images.clone()
        images[3, 0, 5, 5] = torch.nan
        return step.moved(images=images)

    with pytest.raises(PluginError, match="they must be in"):
        attacked(an_attack(does), a_step())


def test_what_an_attack_may_change_and_what_stays():
    """It sees a frozen model in eval mode; buffers, modes, gradients and cached logits are afterwards as if it had not been."""
    step = a_step()
    step.model[1].eval()
    before = {name: each.clone() for name, each in step.model.state_dict().items()}
    modes = [module.training for module in step.model.modules()]
    seen = []

    def does(step: TrainStep) -> TrainStep:
        seen.append(any(module.training for module in step.model.modules()))
        seen.append(any(parameter.requires_grad for parameter in step.model.parameters()))
        images = step.images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(step.logits(images).logsumexp(-1).sum(), images)
        _ = step.noisy_logits
        moved = (images + 0.1 * slope.sign()).clamp(0, 1)
        return replace(step.moved(images=moved, noise=step.noise * images, slope=slope), labels=step.labels * 0, clean=moved)

    moved = attacked(an_attack(does), step)
    assert seen == [False, False]
    assert "noisy_logits" not in moved.__dict__
    assert not any(each.requires_grad for each in (moved.images, moved.noise, moved.extra["slope"]))
    assert not torch.equal(moved.images, step.images)
    assert torch.equal(moved.labels, step.labels)
    assert moved.clean is step.clean
    assert moved.model is step.model
    assert [module.training for module in step.model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in step.model.parameters())
    assert all(torch.equal(each, before[name]) for name, each in step.model.state_dict().items())
    loss = a_loss(lambda step: {"ce": ce(step)})
    Objective(step.model)(loss, moved)["ce"].backward()
    assert step.model[4].weight.grad is not None


def test_gathered_rows_of_a_process_alone_are_its_own():
    rows = torch.rand(4, 3, requires_grad=True)
    found = a_step().gathered(rows)
    assert torch.equal(found, rows)
    assert not found.requires_grad
