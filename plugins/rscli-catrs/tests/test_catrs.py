"""CAT-RS against an evaluation of its formulas copy by copy, in float64, with gradients by hand; and its soft labels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rscli.api import Noise, TrainContext, TrainStep
from rscli.errors import InputError
from rscli_catrs.loss import CatRs, _like
from rscli_catrs.soft_labels import make, read, read_or_make, write

CLASSES, SHAPE, BATCH = 3, (1, 2, 3), 6


class Additive(Noise):
    norm = "L2"

    def sample(self, shape, *, generator, device):
        return torch.randn(tuple(shape), generator=generator, device=device) * self.sigma


class Linear(nn.Module):
    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(CLASSES, math.prod(SHAPE), generator=random, dtype=torch.float64) * scale)

    def forward(self, images):
        return images.flatten(1).to(self.weight.dtype) @ self.weight.T


SOFT = torch.softmax(torch.randn(20, CLASSES, generator=torch.Generator().manual_seed(5), dtype=torch.float64), -1)
SOFT[0] = torch.tensor([1.0, 0.0, 0.0])  # zeros are common: all votes for one class


def a_step(m: int, scale: float = 2.0) -> TrainStep:
    random = torch.Generator().manual_seed(7)
    images = torch.rand(BATCH, *SHAPE, generator=random, dtype=torch.float64)
    noise = torch.randn(m, BATCH, *SHAPE, generator=random, dtype=torch.float64) * 0.5
    model = Linear(scale)
    labels = model(images).argmax(-1)
    labels[-1] = (labels[-1] + 1) % CLASSES
    return TrainStep(
        model=model,
        images=images,
        clean=images,
        labels=labels,
        indices=torch.tensor([4, 0, 19, 3, 7, 11]),
        noise=noise,
        smoothing=Additive(sigma=0.5),
        generator=torch.Generator().manual_seed(11),
        state={"soft_labels": SOFT},
    )


def softmax(z):
    e = (z - z.max()).exp()
    return e / e.sum()


def kl(p, q):
    return sum(float(a * (math.log(a) - math.log(b))) for a, b in zip(p, q, strict=True) if a > 0)


def by_hand(step: TrainStep, loss: CatRs) -> tuple[float, float]:
    weight, m = step.model.weight.detach(), len(step.noise)
    draws = torch.rand(BATCH, m, generator=torch.Generator().manual_seed(11)).T
    low = high = 0.0
    for b in range(BATCH):
        x, y, soft = step.images[b].flatten(), int(step.labels[b]), SOFT[step.indices[b]]
        clean = [softmax(weight @ (x + step.noise[i, b].flatten())) for i in range(m)]
        phat = sum(int(p.argmax()) == y for p in clean) / m
        k = max(1, sum(float(draws[i, b]) < phat for i in range(m)))
        low += sum(sorted(-math.log(p[y]) for p in clean)[:k]) / m
        worst = -math.inf
        for i in range(m):
            start = step.noise[i, b].flatten()
            moved = start
            for _ in range(loss.steps):
                p = softmax(weight @ (x + moved))
                slope = (p - soft) @ weight / m  # of KL(soft || softmax), for the mean over the copies
                moved = moved + 2 * loss.epsilon / loss.steps * slope / (slope.norm() + 1e-8)
                d = moved - start
                moved = start + d * min(1.0, loss.epsilon / max(float(d.norm()), 1e-12))
            moved = (moved - moved.mean()) / moved.std(correction=0) * start.std(correction=0) + start.mean()
            worst = max(worst, kl(soft, softmax(weight @ (x + moved))))
        high += worst * (k == m)
    return low / BATCH, loss.lbd * high / BATCH


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize(("epsilon", "steps"), [(0.3, 1), (1.0, 4)])
def test_the_terms_are_those_of_the_formula(m, epsilon, steps):
    loss = CatRs(m=m, lbd=2.0, epsilon=epsilon, steps=steps, soft_labels="any")
    terms = loss.step(a_step(m))
    low, high = by_hand(a_step(m), loss)
    assert terms["low"].item() == pytest.approx(low, rel=1e-8)
    assert terms["high"].item() == pytest.approx(high, rel=1e-7)
    assert high > 0


def test_an_attacked_noise_keeps_mean_and_spread():
    noise, moved = torch.randn(2, 3, *SHAPE), torch.randn(2, 3, *SHAPE) * 5 + 1
    like = _like(moved, noise)
    pixels = (2, 3, 4)
    torch.testing.assert_close(like.mean(pixels), noise.mean(pixels))
    torch.testing.assert_close(like.square().mean(pixels).sqrt(), noise.square().mean(pixels).sqrt())


def test_the_model_is_left_as_it_was_and_extreme_logits_have_finite_gradients():
    step = a_step(2, scale=2000.0)
    step.model.train()
    sum(CatRs(m=2, lbd=1.0, soft_labels="any").step(step).values()).backward()
    assert step.model.training
    assert step.model.weight.requires_grad
    assert torch.isfinite(step.model.weight.grad).all()


# --- soft labels -------------------------------------------------------------------------------------------------------------


class Context(TrainContext):
    """Three batches of images, and a teacher that is the linear network."""

    def __init__(self) -> None:
        self.images, self.classes, self.device = 20, CLASSES, torch.device("cpu")
        self.noise, self.generator = Additive(sigma=1.0), torch.Generator().manual_seed(0)
        self.data_sha256, self.notes = "d1", []
        self.pixels = torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(1))
        self.asked = []

    def batches(self, batch=256):
        for start in range(0, 20, batch):
            indices = torch.arange(start, min(start + batch, 20))
            yield indices, self.pixels[indices], torch.zeros(len(indices), dtype=torch.int64)

    def load_model(self, path):
        self.asked.append(path)
        return Linear().requires_grad_(False), Additive(sigma=0.25)

    def note(self, text):
        self.notes.append(text)


def teacher(folder, text: str = "weights"):
    (folder / "teacher").write_text(text)
    return folder / "teacher"


def test_soft_labels_of_another_origin_are_refused(tmp_path):
    file, context = tmp_path / "soft.safetensors", Context()
    read_or_make(context, file, teacher(tmp_path), 5)
    with pytest.raises(InputError, match="votes"):
        read_or_make(context, file, teacher(tmp_path), 6)
    with pytest.raises(InputError, match="teacher_sha256"):
        read_or_make(context, file, teacher(tmp_path, "others"), 5)
    context.data_sha256 = "d2"
    with pytest.raises(InputError, match="data_sha256"):
        read_or_make(context, file, None, 5)
    with pytest.raises(InputError, match="cannot be read"):
        read_or_make(context, None, tmp_path / "nobody", 5)


def test_soft_labels_are_the_vote_shares_under_the_teachers_noise(tmp_path):
    context, votes = Context(), 4000
    shares = make(context, tmp_path, votes)
    torch.testing.assert_close(shares.sum(-1), torch.ones(20))
    weight = Linear().weight.detach()
    for index in (0, 13):  # by an independent draw
        noise = torch.randn(200_000, math.prod(SHAPE), dtype=torch.float64) * 0.25
        won = (context.pixels[index].flatten().double() + noise) @ weight.T
        expected = torch.bincount(won.argmax(-1), minlength=CLASSES) / len(won)
        assert (shares[index] - expected).abs().max() < 4.5 * (0.25 / votes) ** 0.5


def test_soft_labels_are_kept_in_the_file_and_made_once(tmp_path):
    file, context = tmp_path / "deep" / "soft.safetensors", Context()
    first = read_or_make(context, file, teacher(tmp_path), 50)
    assert file.exists()
    assert torch.equal(read_or_make(context, file, None, 50), first)
    assert torch.equal(read_or_make(context, file, teacher(tmp_path), 50), first)
    assert context.asked == [teacher(tmp_path)]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_wrong_files_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(InputError, match="there are no soft labels"):
        read_or_make(Context(), tmp_path / "none", None, 50)
    torn = tmp_path / "torn"
    torn.write_bytes(b"no tensors")
    with pytest.raises(InputError, match="holds no soft labels"):
        read(torn, 20, CLASSES, {})
    write(tmp_path / "other", torch.full((3, CLASSES), 1 / CLASSES), {})
    with pytest.raises(InputError, match=r"\(3, 3\).*\(20, 3\)"):
        read(tmp_path / "other", 20, CLASSES, {})
    write(tmp_path / "wrong", torch.full((20, CLASSES), 1.0), {})
    with pytest.raises(InputError, match="not probabilities"):
        read(tmp_path / "wrong", 20, CLASSES, {})


def test_a_loss_without_any_soft_labels_says_what_it_needs():
    with pytest.raises(ValueError, match=r"loss\.teacher=RUN"):
        CatRs(lbd=1.0)


@pytest.mark.parametrize("settings", [{"m": 2, "steps": 3}, {"m": 4, "steps": 1}], ids=str)
def test_the_cost_that_it_states_is_what_a_step_runs(settings):
    loss, counts = CatRs(lbd=1.0, teacher="x", **settings), {"trained": 0, "attacked": 0}
    step = a_step(loss.m)

    def count(module, inputs, output):
        counts["trained" if module.weight.requires_grad else "attacked"] += len(output)

    step.model.register_forward_hook(count)
    sum(loss.step(step).values()).backward()
    assert counts == {"trained": BATCH * loss.passes.trained, "attacked": BATCH * loss.passes.attacked}
