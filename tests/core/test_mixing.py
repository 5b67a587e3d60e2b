"""Label smoothing, mixup and CutMix against plain float64 references, and what they leave alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from torch import nn
from torch.nn.functional import cross_entropy as torch_s

from rscli.api import TrainStep
from rscli.config.layers import resolve
from rscli.config.published import PublishedRow
from rscli.report.recipe import Recipe, setting_differences
from rscli.runtime.progress import Silent
from rscli.training.train import TrainOptions, train
from rscli_core.losses import _mixing
from rscli_core.losses._cross_entropy import cross_entropy
from rscli_core.losses.consistency import Consistency
from rscli_core.losses.gaussian import GaussianLoss
from rscli_core.losses.mixup import Mixup
from rscli_core.noises.gaussian import Gaussian


def logits_of(m: int = 3, batch: int = 6, classes: int = 5, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(m, batch, classes, generator=random, dtype=dtype)
    return logits.requires_grad_(), torch.randint(classes, (batch,), generator=random)


# --- label smoothing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.1, 0.5])
@pytest.mark.parametrize("loss", [GaussianLoss, lambda **f: Consistency(lbd=10, **f)], ids=["gaussian", "consistency"])
def test_smoothed_labels_are_those_of_their_definition(loss, s):
    logits, labels = logits_of()
    found = loss(m=3, label_smoothing=s).terms(logits, labels)
    target = np.full((6, 5), s / 5)
    target[np.arange(6), labels.numpy()] += 1 - s
    log_p = logits.detach().numpy() - np.log(np.exp(logits.detach().numpy()).sum(-1, keepdims=True))
    assert found["ce"].item() == pytest.approx(-(target * log_p).sum(-1).mean(), rel=1e-12)
    wanted = torch_s(logits.flatten(0, 1), labels.repeat(3), label_smoothing=s)
    assert found["ce"].item() == pytest.approx(wanted.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(each, logits)[0] for each in (found["ce"], wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_without_smoothing_loss_and_gradient_are_those_of_before_bit_for_bit():
    logits, labels = logits_of(dtype=torch.float32)
    log_p = logits.log_softmax(-1)
    before = -log_p.gather(-1, labels.expand(log_p.shape[:-1]).unsqueeze(-1)).mean()
    now = GaussianLoss(m=3).terms(logits, labels)["ce"]
    assert torch.equal(now, before)
    assert torch.equal(*(torch.autograd.grad(each, logits)[0] for each in (now, before)))
    assert torch.equal(Consistency(m=3, lbd=1).terms(logits, labels)["ce"], before)


def test_the_other_terms_know_nothing_of_it():
    logits, labels = logits_of()
    plain, smooth = (Consistency(m=3, lbd=10, label_smoothing=s).terms(logits, labels) for s in (0, 0.3))
    assert torch.equal(plain["kl"], smooth["kl"])
    assert torch.equal(plain["entropy"], smooth["entropy"])
    with pytest.raises(ValidationError):
        GaussianLoss(label_smoothing=1)


# --- the random shares --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 4.0])
def test_shares_have_the_beta_distribution(alpha):
    random = torch.Generator().manual_seed(0)
    u, v = torch.rand(2, 100_000, generator=random, dtype=torch.float64)
    drawn = _mixing.beta(u, v, alpha).numpy()
    assert ((drawn >= 0) & (drawn <= 1)).all()
    for x in (1e-4, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1 - 1e-4):  # nearer to the ends, numbers are rounded to them
        p = stats.beta(alpha, alpha).cdf(x)
        assert (drawn <= x).mean() == pytest.approx(p, abs=4 * (p * (1 - p) / 100_000) ** 0.5 + 1e-9)
    assert drawn.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.02)


def test_shares_are_finite_at_the_ends_of_the_uniform_numbers():
    ends = torch.tensor([0.0, 1e-38, 1e-7, 0.25, 0.5, 0.75, 1 - 2**-24])
    for alpha in (0.01, 0.2, 1.0, 100.0):
        drawn = _mixing.beta(*torch.meshgrid(ends, ends, indexing="ij"), alpha)
        assert ((drawn >= 0) & (drawn <= 1)).all()


# --- mixed images -------------------------------------------------------------------------------------------------------------


def test_mixup_images():
    images = torch.rand(5, 2, 4, 3, dtype=torch.float64)
    share = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
    mixed = _mixing.mixup(images, share).numpy()
    for i in range(5):
        wanted = share[i].item() * images[i].numpy() + (1 - share[i].item()) * images[i - 1].numpy()
        np.testing.assert_allclose(mixed[i], wanted, rtol=1e-14)
    assert np.array_equal(mixed[4], images[4].numpy())


def box_of_the_paper(height: int, width: int, share: float, row: float, column: float) -> tuple[int, int, int, int]:
    """Yun et al., section 3.2: sides sqrt(1 - share) of the image's, a uniform centre, clipped."""
    h, w = int(height * np.sqrt(1 - share)), int(width * np.sqrt(1 - share))
    y, x = int(row * height), int(column * width)
    top, bottom = np.clip([y - h // 2, y + h // 2], 0, height)
    left, right = np.clip([x - w // 2, x + w // 2], 0, width)
    return int(top), int(bottom), int(left), int(right)


def test_cutmix_images_and_what_is_left_of_each():
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.random((200, 3, 12, 9)))
    share, centre = torch.from_numpy(random.random(200)), torch.from_numpy(random.random((200, 2)))
    mixed, kept = _mixing.cutmix(images, share, centre)
    boxes = 0
    for i in range(200):
        top, bottom, left, right = box_of_the_paper(12, 9, share[i].item(), *centre[i].tolist())
        wanted = images[i].clone()
        wanted[:, top:bottom, left:right] = images[i - 1][:, top:bottom, left:right]
        assert torch.equal(mixed[i], wanted)
        assert kept[i].item() == pytest.approx(1 - (bottom - top) * (right - left) / 108, abs=1e-6)
        boxes += bottom > top and right > left
    assert boxes > 150


# --- the loss -----------------------------------------------------------------------------------------------------------------


def a_step(m: int = 3, batch: int = 8, seed: int = 0) -> TrainStep:
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 1, 6, 6, generator=random)
    smoothing = Gaussian(sigma=0.5)
    noise = smoothing.sample((m, *images.shape), generator=random, device=torch.device("cpu"))
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    labels = torch.randint(5, (batch,), generator=random)
    return TrainStep(model, images, images, labels, torch.arange(batch), noise, smoothing, torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    "loss",
    [
        Mixup(m=3, mixup=0.5),
        Mixup(m=3, mixup=0, cutmix=1.0, label_smoothing=0.1),
        Mixup(m=3, mixup=0.5, cutmix=1.0, switch=0.4, share=0.7),
    ],
    ids=["mixup", "cutmix", "both"],
)
def test_the_loss_is_the_formula_of_its_docstring(loss):
    """In float64, a loop over images and copies; the random numbers are those of the step's generator."""
    step = a_step()
    found = loss.step(step)
    images, lam = loss.mixed(step.images, torch.rand(8, 6, generator=torch.Generator().manual_seed(9)))
    weight, bias = (p.detach().double().numpy() for p in step.model.parameters())
    total, s = 0.0, loss.label_smoothing
    for i in range(8):
        for copy in range(3):
            x = images[i].double().numpy() + step.noise[copy, i].double().numpy()  # the noise is not mixed
            z = weight @ x.ravel() + bias
            log_p = z - np.log(np.exp(z).sum())
            for label, share in ((step.labels[i], lam[i].item()), (step.labels[i - 1], 1 - lam[i].item())):
                total += share * ((1 - s) * -log_p[label] - s * log_p.mean())
    assert set(found) == {"ce"}
    assert found["ce"].item() == pytest.approx(total / 24, rel=1e-5)
    assert 0 <= lam.min() < lam.max() <= 1
    assert "noisy_logits" not in step.__dict__  # no accuracy of a label that is not the only one


def test_every_image_has_its_own_share_and_its_copies_have_one():
    step = a_step(m=2, batch=64)
    seen = []
    step.model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    step.model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    Mixup(m=2, mixup=1.0).step(step)
    copies = seen[0].view(2, 64, 1, 6, 6) - step.noise
    torch.testing.assert_close(copies[0], copies[1])  # the same mixed image under each copy of the noise
    _, lam = Mixup(mixup=1.0).mixed(step.images, torch.rand(64, 6, generator=torch.Generator().manual_seed(9)))
    assert len(lam.unique()) == 64


def test_how_many_images_are_mixed_and_cut():
    images = torch.rand(20_000, 1, 2, 2)
    uniform = torch.rand(20_000, 6, generator=torch.Generator().manual_seed(0))
    out, lam = Mixup(mixup=1.0, cutmix=1.0, switch=0.25, share=0.6).mixed(images, uniform)
    same = (out == images).flatten(1).all(1)
    assert (lam[same] == 1).float().mean() > 0.99
    of_partner = _mixing.partner(images)
    whole = ((out == images) | (out == of_partner)).flatten(1).all(1)  # pixels of one or the other, as CutMix leaves them
    assert (~whole).float().mean().item() == pytest.approx(0.6 * 0.75, abs=0.02)
    assert ((out >= 0) & (out <= 1)).all()


def test_a_step_repeats_and_numbers_per_image_are_used_where_there_are_any():
    one, again = Mixup(m=3).step(a_step())["ce"], Mixup(m=3).step(a_step())["ce"]
    assert torch.equal(one, again)

    class Sharing(TrainStep):
        def rand(self, *shape: int) -> torch.Tensor:
            return torch.zeros(len(self.labels), *shape)

    step = a_step()
    shared = Sharing(**{name: getattr(step, name) for name in TrainStep.__dataclass_fields__})
    before = shared.generator.get_state()
    Mixup(m=3).step(shared)
    assert torch.equal(shared.generator.get_state(), before)


def test_no_mixing_at_all_is_refused():
    with pytest.raises(ValidationError, match="both 0"):
        Mixup(mixup=0)


def test_a_plain_cross_entropy_where_nothing_is_mixed():
    """With one image, its partner is itself."""
    step = a_step(batch=1)
    found = Mixup(m=3, mixup=1.0).step(step)["ce"]
    wanted = cross_entropy(step.noisy_logits.log_softmax(-1), step.labels)
    torch.testing.assert_close(found, wanted)


def test_a_run_learns_under_mixup_and_cutmix(tmp_path):
    sets = ["data.name=digits", "arch.name=lenet", "noise.sigma=0.25", "optimizer.lr=0.05", "epochs=3", "batch=128"]
    sets += [
        "loss.name=mixup",
        "loss.cutmix=1.0",
        "loss.label_smoothing=0.1",
        "attack.name=pgd",
        "attack.epsilon=0.2",
        "attack.steps=1",
    ]
    train(resolve(sets=sets), TrainOptions(out=tmp_path / "run", data_dir=tmp_path, device="cpu", workers=0), Silent())
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["ce"] < lines[0]["ce"]
    assert "accuracy" not in lines[0]


def test_labels_that_are_not_smoothed_are_a_published_setting_and_smoothed_ones_are_not():
    of = lambda method, setting: PublishedRow(  # noqa: E731
        **{**dict.fromkeys(PublishedRow.__dataclass_fields__), "method": method, "setting": setting}
    )
    plain, smooth = ({"m": 1, "label_smoothing": s} for s in (0.0, 0.1))
    recipe = lambda method, setting: Recipe("mnist", "lenet", method, 0.5, setting)  # noqa: E731
    assert setting_differences(recipe("gaussian", plain), of("gaussian", ""), {}) == ()
    assert setting_differences(recipe("gaussian", smooth), of("gaussian", ""), {}) == ("setting not published",)
    row = of("consistency", "m=2;lbd=10")
    for smoothing, said in ((0.0, ()), (0.1, ("label_smoothing 0.1, not 0",))):
        ours = recipe("consistency", {"m": 2, "lbd": 10.0, "label_smoothing": smoothing})
        assert setting_differences(ours, row, {}) == said
