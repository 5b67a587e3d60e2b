"""The contract of plugins, by plugins of this file: what a step carries, what is kept, saved, restored, and logged."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

import rscli
import runs
from rscli import registry
from rscli.api import (
    Attack,
    Callback,
    Certifier,
    Decision,
    Logger,
    LogWriter,
    Loss,
    Noise,
    NoisyLoss,
    Optimizer,
    Plan,
    Question,
    Run,
    Schedule,
    TrainContext,
    TrainStep,
)
from rscli.config.layers import Resolved, rebuild, resolve
from rscli.data.splits import Split, open_split
from rscli.errors import InputError, PluginError, Stopped
from rscli.models.modelfile import load_model, tensor_digest
from rscli.registry import Entry, installed
from rscli.runtime.progress import Silent
from rscli.training.run_folder import RunFolder
from rscli.training.train import train
from rscli.training.trainer import Trainer, attacked
from rscli_core.attacks.ddn import Ddn
from rscli_core.attacks.gradient_free import GradientFree
from rscli_core.attacks.pgd import Pgd
from runs import Interrupting, Killed
from runs import train_options as options

SETTINGS = {
    "data.name": "digits",
    "arch.name": "lenet",
    "noise.sigma": "0.25",
    "loss.name": "gaussian",
    "loss.m": "2",
    "optimizer.lr": "0.05",
    "schedule.milestones": "[1]",
    "epochs": "2",
    "batch": "480",
}
settings = partial(runs.settings, SETTINGS)
IMAGES, BATCHES = 1437, 3
"""Of digits, and the batches of an epoch."""

SEEN: list[Any] = []
"""What plugins of this file were given, in order; every test begins with none."""


# --- plugins -----------------------------------------------------------------------------------------------------------------


class Masking(Noise):
    """Blacks out pixels: not additive. `sample` draws uniform numbers; `apply` blacks out where they are below `dark`."""

    norm: ClassVar[str] = "L0"
    dark: float = 0.25

    def sample(self, shape: Sequence[int], *, generator: torch.Generator, device: torch.device) -> Tensor:
        return torch.rand(tuple(shape), generator=generator, device=device)

    def apply(self, images: Tensor, noise: Tensor, *, out: Tensor | None = None) -> Tensor:
        return torch.mul(images, (noise >= self.dark).to(images.dtype), out=out)

    def radius(self, p_a: float, p_b: float) -> float:
        return max(0.0, 10 * (p_a - p_b))

    def probability(self, radius: float) -> float:
        return min(1.0, 0.5 + radius / 20)


class Watching(Loss):
    """The Gaussian loss, that keeps each step."""

    def step(self, step: TrainStep) -> dict[str, Tensor]:
        SEEN.append(step)
        return {"ce": nn.functional.cross_entropy(step.noisy_logits.flatten(0, 1), step.labels.repeat(len(step.noise)))}


class Remembering(NoisyLoss):
    """Weights images by a table, which every step changes in place; `fresh` more noise is drawn."""

    def setup(self, context: TrainContext) -> Mapping[str, Tensor]:
        found = list(context.batches(100))
        SEEN.append(("setup", context.images, context.classes, found))
        context.note("prepared")
        weights = torch.rand(context.images, generator=context.generator, device=context.device)
        return {"weights": weights, "seen": torch.zeros(context.images, dtype=torch.int64)}

    def step(self, step: TrainStep) -> dict[str, Tensor]:
        step.state["seen"][step.indices] += 1
        step.state["weights"][step.indices] *= 0.9
        logits = step.logits(step.noisy(step.images, step.draw(3)))
        ce = nn.functional.cross_entropy(logits.flatten(0, 1), step.labels.repeat(3), reduction="none").view(3, -1).mean(0)
        return {"ce": (step.state["weights"][step.indices] * ce).mean()}


class Teaching(Loss):
    """Asks for a teacher's model file."""

    teacher: str

    def setup(self, context: TrainContext) -> Mapping[str, Tensor]:
        network, noise = context.load_model(Path(self.teacher))
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
        indices, images, _ = next(context.batches(64))
        return {"soft": network(noise.apply(images, torch.zeros_like(images))).softmax(-1)[: len(indices)]}

    def step(self, step: TrainStep) -> dict[str, Tensor]:
        return {"ce": nn.functional.cross_entropy(step.noisy_logits[0], step.labels)}


class Moving(Attack):
    """Halves the images, doubles the noise, and hands the clean ones' mean to the loss."""

    def perturb(self, step: TrainStep) -> TrainStep:
        return step.moved(images=step.images / 2, noise=step.noise * 2, mean=step.clean.flatten(1).mean(1))


class AdamW(Optimizer):
    """Its state holds a scalar, `step`."""

    decay: float = 0.01

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        last = [p for name, p in model.named_parameters() if "fc2" in name]
        rest = [p for name, p in model.named_parameters() if "fc2" not in name]
        groups = [{"params": rest}, {"params": last, "lr_scale": 0.1}]
        return torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.decay)


class Cosine(Schedule):
    """Half a cosine."""

    def factor(self, epoch: float, epochs: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


class Collecting(Logger):
    """One line per epoch, in a file of its own."""

    def open(self, run: Run) -> LogWriter:
        SEEN.append(("open", run.epoch))
        path = run.folder / "collected.jsonl"
        lines = path.read_text().splitlines()[: run.epoch] if path.exists() else []
        path.write_text("".join(f"{line}\n" for line in lines))
        return _Collector(path)


class _Collector(LogWriter):
    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(dict(line)) + "\n")

    def close(self) -> None:
        SEEN.append(("close",))


class Ema(Callback):
    """An exponential moving average of the weights, and how many steps it has seen; saves in the middle of an epoch."""

    looks_on: ClassVar[bool] = True  # here: it never replaces the weights

    decay: float = 0.9
    save_at: int = 0

    def begin(self, run: Run, state: dict[str, Any]) -> None:
        SEEN.append(("begin", run.epoch, run.batch, state.get("steps", 0)))
        state.setdefault("steps", 0)
        state.setdefault("average", {name: value.detach().clone() for name, value in run.model.state_dict().items()})

    def after_step(self, run: Run, state: dict[str, Any]) -> None:
        state["steps"] += 1
        for name, value in run.model.state_dict().items():
            state["average"][name].lerp_(value.detach(), 1 - self.decay)
        if state["steps"] == self.save_at:
            run.save()

    def after_epoch(self, run: Run, state: dict[str, Any]) -> None:
        run.log({"ema_steps": state["steps"], "finished": run.epoch})

    def end(self, run: Run, state: dict[str, Any]) -> None:
        SEEN.append(("end", run.epoch))
        torch.save(state["average"], run.folder / "ema.pt")


PLUGINS = {
    ("noises", "masking"): Masking,
    ("losses", "watching"): Watching,
    ("losses", "remembering"): Remembering,
    ("losses", "teaching"): Teaching,
    ("attacks", "moving"): Moving,
    ("optimizers", "adamw"): AdamW,
    ("schedules", "half-cosine"): Cosine,
    ("loggers", "collecting"): Collecting,
    ("callbacks", "averaging"): Ema,
}


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> Iterator[None]:
    """The plugins of this file, as those of a file that a user names."""
    entries = [Entry(kind, name, "tests", "1.0", f"tests:{plugin.__name__}") for (kind, name), plugin in PLUGINS.items()]
    for entry, plugin in zip(entries, PLUGINS.values(), strict=True):
        registry.announce(entry, plugin)
    yield
    for entry in entries:
        registry._announced.pop(entry, None)
        registry.load_entry.cache_clear()
    installed.cache_clear()


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    SEEN.clear()


def interrupted(resolved: Resolved, folder: Path, after: int) -> None:
    """The run, stopped after so many batches, and gone on with."""
    with pytest.raises(Stopped):
        train(resolved, options(folder), Interrupting(after))
    torch.manual_seed(99)
    train(resolved, options(folder, resume=True), Silent())


def weights(folder: Path) -> dict[str, Tensor]:
    return load_model(folder / "model.safetensors").network.state_dict()


def same_weights(one: Path, other: Path) -> bool:
    left, right = weights(one), weights(other)
    return all(torch.equal(left[name], right[name]) for name in left)


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def figures(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_s")} for line in lines(path)]


def digits(resolved: Resolved) -> Split:
    return open_split(resolved.dataset, resolved.dataset.spec(Path()), "train", Path())


# --- what a step carries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", ["true", "false"])
def test_indices_are_right_under_shuffling_and_chunks(tmp_path, chunk):
    resolved = settings(loss__name="watching", chunk=chunk, epochs="1")
    train(resolved, options(tmp_path / "run"), Silent())
    split = digits(resolved)
    order = torch.cat([step.indices for step in SEEN])
    assert sorted(order.tolist()) == list(range(IMAGES))
    assert order.tolist() != list(range(IMAGES))
    assert len(SEEN) == BATCHES * (2 if chunk == "true" else 1)
    for step in SEEN:
        assert step.indices.device.type == "cpu"
        for place in range(0, len(step.indices), 50):
            index = int(step.indices[place])
            assert torch.equal(step.images[place], split.image(index))
            assert int(step.labels[place]) == split.labels[index]
        assert torch.equal(step.clean, step.images)


def test_positions_are_those_of_the_run(tmp_path):
    train(settings(loss__name="watching", chunk="false"), options(tmp_path / "run"), Silent())
    found = [(s.position.epoch, s.position.share, s.position.lr_factor) for s in SEEN]
    wanted = [(k // BATCHES, k / (2 * BATCHES), 0.1 ** (k // BATCHES)) for k in range(2 * BATCHES)]
    assert [each[0] for each in found] == [each[0] for each in wanted]
    assert [each[1:] for each in found] == [pytest.approx(each[1:]) for each in wanted]


def test_an_attack_moves_images_and_noise_and_hands_on_more_while_the_clean_images_stay(tmp_path):
    resolved = settings("attack.name=moving", loss__name="watching", epochs="1", chunk="false")
    train(resolved, options(tmp_path / "run"), Silent())
    split = digits(resolved)
    for step in SEEN:
        first = split.image(int(step.indices[0]))
        assert torch.equal(step.clean[0], first)
        assert torch.equal(step.images[0], first / 2)
        assert step.noise.std().item() == pytest.approx(0.5, rel=0.02)
        assert torch.equal(step.extra["mean"], step.clean.flatten(1).mean(1))
        assert step.model.training
        assert step.smoothing.sigma == step.sigma == 0.25


def test_more_noise_is_of_the_step_s_distribution_and_its_generator(tmp_path):
    resolved = settings(loss__name="watching", epochs="1", chunk="false")
    train(resolved, options(tmp_path / "a"), Silent())
    first = [step.draw(4) for step in SEEN]
    SEEN.clear()
    interrupted(resolved, tmp_path / "b", 1)
    again = [step.draw(4) for step in SEEN]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape == (4, 480, 1, 28, 28)
    assert first[0].std().item() == pytest.approx(0.25, rel=0.02)
    assert not torch.equal(first[0][0, 0], SEEN[0].noise[0, 0])


class Wrong(Attack):
    """Breaks its contract in the way of its field."""

    way: str

    def perturb(self, step: TrainStep) -> Any:
        return {
            "tensor": lambda: step.images,
            "nothing": lambda: None,
            "noise-shape": lambda: step.moved(noise=step.noise[:1]),
            "image-shape": lambda: step.moved(images=step.images[:1]),
            "pixels": lambda: step.moved(images=step.images + 1),
        }[self.way]()


@pytest.mark.parametrize("way", ["tensor", "nothing", "noise-shape", "image-shape", "pixels"])
def test_an_attack_that_returns_something_else_is_named(tmp_path, way):
    with pytest.raises(PluginError, match="the attack Wrong breaks its contract: perturb returned"):
        attacked(Wrong(way=way), first_step(tmp_path))


def first_step(tmp_path: Path, *sets: str) -> TrainStep:
    """The first step of a run, not trained on."""
    SEEN.clear()
    resolved = settings(*sets, loss__name="watching", chunk="false")
    made = Trainer(resolved, resolved.dataset.spec(tmp_path), digits(resolved), torch.device("cpu"), channels_last=False)
    next(made.epoch_batches())
    return SEEN.pop()


# --- noise that is not additive ----------------------------------------------------------------------------------------------


class Seeing(nn.Module):
    """Keeps what it is given; names class 0."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.classes = classes
        self.inputs: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.inputs.append(images.detach().clone())
        return torch.eye(self.classes)[:1].repeat(len(images), 1) + 0 * images.flatten(1).sum(1, keepdim=True)


def masked(inputs: Tensor, value: float) -> None:
    """Every pixel is 0 or `value`, and a quarter of them 0; but for rows that fill up a batch."""
    inputs = inputs[inputs.flatten(1).any(1)]
    dark = inputs == 0
    torch.testing.assert_close(inputs[~dark], torch.full_like(inputs[~dark], value))
    assert dark.float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_the_sampler_puts_noise_on_by_its_plugin():
    network = Seeing()
    model = rscli.SmoothedClassifier(network, noise=Masking(sigma=1.0), class_names=3)
    (certificate,) = model.certify(torch.full((1, 1, 8, 8), 0.5), n=200, batch=64)
    assert certificate.predict == 0
    assert certificate.radius == pytest.approx(10 * (certificate.p_a - certificate.p_b))
    seen = torch.cat([inputs for inputs in network.inputs if len(inputs) > 2])  # smaller ones are of the trial before
    assert len(seen) >= 300
    masked(seen, 0.5)
    network.inputs.clear()
    model.predict(torch.full((1, 1, 8, 8), 0.5), n=200)
    masked(torch.cat([inputs for inputs in network.inputs if len(inputs) > 2]), 0.5)


@pytest.mark.parametrize(
    "attack", [Pgd(epsilon=1.0), Ddn(epsilon=1.0), GradientFree(epsilon=1.0)], ids=lambda a: type(a).__name__
)
def test_training_and_attacks_put_noise_on_by_its_plugin(tmp_path, attack):
    step = first_step(tmp_path, "noise.name=masking", "noise.sigma=1")
    noisy, network = step.noisy(step.images), Seeing(classes=10)
    assert noisy.shape == step.noise.shape
    dark = step.noise < 0.25
    assert torch.equal(noisy[dark], torch.zeros_like(noisy[dark]))
    assert torch.equal(noisy[~dark], step.images.expand_as(noisy)[~dark])
    step = replace(step, images=torch.full_like(step.images, 0.5), model=network)
    moved = attacked(attack, step)
    assert network.inputs
    masks = (step.noise >= 0.25).flatten(0, 1)
    for inputs in network.inputs:
        assert (inputs.reshape(masks.shape)[~masks] == 0).all()  # what is masked is dark, wherever the image was moved
    assert torch.equal(moved.noise, step.noise)


# --- certifiers --------------------------------------------------------------------------------------------------------------


class Hoeffding(Certifier):
    """Hoeffding's bound, in place of Clopper's and Pearson's; for given radii, the largest that it reaches."""

    grid: ClassVar[bool] = True
    decisive: ClassVar[tuple[str, ...]] = ("slack",)
    slack: float = Field(0.0, ge=0, description="taken off the bound")

    def largest_p_a(self, n: int) -> float:
        return 1 - math.sqrt(math.log(1 / self.alpha) / (2 * n)) - self.slack

    def plan(self, counts: np.ndarray, question: Question) -> Plan:
        return Plan(int(counts.argmax()), (self.n,), question.thresholds)

    def decide(self, counts: np.ndarray, n: int, plan: Plan) -> Decision:
        p_a = counts[plan.candidate] / n - (1 - self.largest_p_a(n))
        reached = [place for place, threshold in enumerate(plan.state) if p_a > threshold]
        if not reached:
            return Decision(-1, p_a, 1 - p_a, "n-reached")
        return Decision(plan.candidate, p_a, 1 - p_a, "grid", threshold=reached[-1])


@pytest.fixture
def _hoeffding() -> Iterator[None]:
    entry = Entry("certifiers", "hoeffding", "tests", "1.0", "tests:Hoeffding")
    registry.announce(entry, Hoeffding)
    yield
    registry._announced.pop(entry)
    registry.load_entry.cache_clear()
    installed.cache_clear()


@pytest.mark.usefixtures("_hoeffding")
def test_a_certifier_of_its_own_bound():
    model = rscli.SmoothedClassifier(Seeing(), sigma=0.5, class_names=3)
    image = torch.full((1, 1, 4, 4), 0.5)
    (plain,) = model.certify(image, n=1000, certifier="hoeffding")
    p_a = 1 - math.sqrt(math.log(1000) / 2000)  # all samples are of class 0
    reach = model.noise.radius(p_a, 1 - p_a)
    assert (plain.predict, plain.p_a) == (0, pytest.approx(p_a))
    assert plain.radius == 0.25 * math.floor(reach / 0.25)  # the default grid goes as far as the certifier's own largest p_a
    assert plain.radius > 0
    (asked,) = model.certify(image, n=1000, certifier="hoeffding", radii=[0.1, 0.3, 5.0])
    assert asked.radius == 0.3  # exactly the wanted radius, by its place
    (less,) = model.certify(image, n=1000, certifier="hoeffding", slack=0.2)
    assert less.radius < plain.radius
    with pytest.raises(InputError, match="even a unanimous vote"):
        model.certify(image, n=10, certifier="hoeffding")


# --- what a loss keeps -------------------------------------------------------------------------------------------------------


def test_what_a_loss_keeps_is_saved_and_restored(tmp_path):
    resolved = settings(loss__name="remembering", chunk="false")
    train(resolved, options(tmp_path / "a"), Silent())
    ((_, images, classes, found),) = SEEN
    assert (images, classes) == (IMAGES, 10)
    assert torch.equal(torch.cat([indices for indices, _, _ in found]), torch.arange(IMAGES))
    split = digits(resolved)
    pixels, labels = torch.cat([p for _, p, _ in found]), torch.cat([y for _, _, y in found])
    assert torch.equal(pixels[::100], torch.stack([split.image(i) for i in range(0, IMAGES, 100)]))
    assert labels.tolist() == split.labels.tolist()

    SEEN.clear()
    interrupted(resolved, tmp_path / "b", 2)
    assert len(SEEN) == 1, "a run that goes on does not set up again"
    assert same_weights(tmp_path / "a", tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        state = RunFolder(folder).load()["loss"]
        assert state["seen"].tolist() == [2] * IMAGES
        card = load_model(folder / "model.safetensors").source.card
        assert card.loss_state == {name: tensor_digest({name: state[name]}) for name in ("weights", "seen")}
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_teacher_of_the_same_data_is_lent_and_another_refused(tmp_path):
    train(settings(epochs="1"), options(tmp_path / "teacher"), Silent())
    taught = settings(f"loss.teacher={tmp_path / 'teacher'}", loss__name="teaching", loss__m="1", epochs="1")
    train(taught, options(tmp_path / "student"), Silent())
    assert set(load_model(tmp_path / "student/model.safetensors").source.card.loss_state) == {"soft"}

    from rscli.models.modelfile import save_model
    from rscli.models.network import build_classifier

    teacher = load_model(tmp_path / "teacher/model.safetensors")
    card = teacher.source.card
    spec = card.spec.model_copy(update={"class_names": tuple("abcde")})
    other = build_classifier(installed().build("architectures", card.arch), spec)
    save_model(tmp_path / "other.safetensors", other, card.model_copy(update={"spec": spec}))
    for path, said in (("other.safetensors", "is for 5 classes"), ("none.safetensors", "there is no model file")):
        refused = settings(f"loss.teacher={tmp_path / path}", loss__name="teaching", loss__m="1", epochs="1")
        with pytest.raises(InputError, match=said):
            train(refused, options(tmp_path / f"run-{path}"), Silent())


# --- optimisers, schedules ---------------------------------------------------------------------------------------------------

ADAMW = {"optimizer__name": "adamw", "optimizer__lr": "0.001", "schedule__name": "half-cosine", "schedule__milestones": ""}


def test_any_optimiser_and_schedule_resume_to_the_same_bits(tmp_path):
    resolved = settings(**ADAMW)
    train(resolved, options(tmp_path / "a"), Silent())
    interrupted(resolved, tmp_path / "b", 2)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert figures(tmp_path / "a/metrics.jsonl") == figures(tmp_path / "b/metrics.jsonl")
    assert any(state["step"].ndim == 0 for state in checkpoint(tmp_path / "b")["optimizer"]["state"].values())
    last = [0.001 * 0.5 * (1 + math.cos(math.pi * (epoch + 2 / BATCHES) / 2)) for epoch in range(2)]
    assert [line["lr"] for line in lines(tmp_path / "a/metrics.jsonl")] == pytest.approx(last)


def test_a_group_has_its_own_scale_of_the_learning_rate(tmp_path):
    resolved = settings(**ADAMW)
    made = Trainer(resolved, resolved.dataset.spec(tmp_path), digits(resolved), torch.device("cpu"), channels_last=False)
    batches = made.epoch_batches()
    for done in range(BATCHES):
        next(batches)
        lr = 0.001 * 0.5 * (1 + math.cos(math.pi * done / BATCHES / 2))
        assert [group["lr"] for group in made.optimizer.param_groups] == pytest.approx([lr, 0.1 * lr])


# --- loggers and callbacks ---------------------------------------------------------------------------------------------------


def test_loggers_get_a_line_per_epoch_with_what_callbacks_add(tmp_path):
    train(settings("loggers.collecting={}", "callbacks.averaging={}"), options(tmp_path / "run"), Silent())
    found = lines(tmp_path / "run/collected.jsonl")
    assert found == lines(tmp_path / "run/metrics.jsonl")
    assert [(line["epoch"], line["ema_steps"], line["finished"]) for line in found] == [(1, 6, 1), (2, 12, 2)]
    assert SEEN == [("open", 0), ("begin", 0, 0, 0), ("end", 2), ("close",)]
    recorded = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert set(recorded["loggers"]) == {"jsonl", "collecting"}
    assert recorded["callbacks"]["averaging"] == {"decay": 0.9, "save_at": 0}


def test_epochs_of_a_killed_run_are_dropped_from_every_log(tmp_path):
    """Saved after the first epoch of three by a callback that saves every third; killed in the third."""
    resolved = settings("loggers.collecting={}", "callbacks.checkpoint.every=3", "callbacks.averaging.save_at=6", epochs="3")
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(resolved, options(whole), Silent())
    with pytest.raises(KeyboardInterrupt):
        train(resolved, options(run), Killed(2 * BATCHES + 1))
    assert (checkpoint(run)["epoch"], checkpoint(run)["batch"]) == (1, 0)
    assert len(lines(run / "collected.jsonl")) == 2
    train(resolved, options(run, resume=True), Silent())
    for log in ("collected.jsonl", "metrics.jsonl"):
        assert [line["epoch"] for line in lines(run / log)] == [1, 2, 3]
        assert figures(run / log) == figures(whole / log)
    assert same_weights(whole, run)


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_what_a_callback_keeps_is_restored_in_mid_epoch(tmp_path, after):
    resolved = settings("callbacks.averaging={}")
    train(resolved, options(tmp_path / "a"), Silent())
    SEEN.clear()
    interrupted(resolved, tmp_path / "b", after)
    assert [("begin", 0, 0, 0), ("begin", after // BATCHES, after % BATCHES, 2 * after), ("end", 2)] == SEEN
    left, right = (torch.load(tmp_path / run / "ema.pt", weights_only=True) for run in "ab")
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not torch.equal(left["network.fc2.weight"], weights(tmp_path / "a")["network.fc2.weight"])
    assert checkpoint(tmp_path / "b")["callbacks"]["averaging"]["steps"] == 12


def test_a_callback_may_save_in_the_middle_of_an_epoch(tmp_path):
    resolved = settings("callbacks.averaging.save_at=3", "callbacks.checkpoint=none")
    with pytest.raises(KeyboardInterrupt):
        train(resolved, options(tmp_path / "run"), Killed(4))
    state = checkpoint(tmp_path / "run")
    steps = state["callbacks"]["averaging"]["steps"]
    assert (state["epoch"], state["batch"], steps) == (0, 2, 4)  # after the batch of that step
    train(resolved, options(tmp_path / "run", resume=True), Silent())
    train(resolved, options(tmp_path / "whole"), Silent())
    assert same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(("word", "saved"), [("every=1", 2), ("every=2", 2), ("every=3", 0)])
def test_checkpoints_are_as_far_apart_as_asked(tmp_path, word, saved):
    resolved = settings(f"callbacks.checkpoint.{word}", epochs="4")
    with pytest.raises(KeyboardInterrupt):
        train(resolved, options(tmp_path / "run"), Killed(2 * BATCHES + 1))
    path = tmp_path / "run/checkpoint.pt"
    assert path.exists() is bool(saved)
    assert not saved or checkpoint(tmp_path / "run")["epoch"] == saved


def test_without_the_checkpoint_callback_a_run_is_saved_only_when_it_is_stopped(tmp_path):
    resolved = settings("callbacks.checkpoint=none")
    assert "checkpoint" not in resolved.callbacks
    train(resolved, options(tmp_path / "whole"), Silent())
    assert not (tmp_path / "whole/checkpoint.pt").exists()
    interrupted(resolved, tmp_path / "run", 4)
    assert same_weights(tmp_path / "whole", tmp_path / "run")


def test_what_only_looks_on_may_differ_when_a_run_goes_on(tmp_path):
    plain = settings()
    train(plain, options(tmp_path / "whole"), Silent())
    with pytest.raises(Stopped):
        train(plain, options(tmp_path / "run"), Interrupting(2))
    watched = settings("callbacks.averaging={}", "loggers.collecting={}", "callbacks.checkpoint.every=2")
    train(watched, options(tmp_path / "run", resume=True), Silent())
    assert SEEN[:2] == [("open", 0), ("begin", 0, 2, 0)]
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    shutil.copytree(tmp_path / "whole", tmp_path / "other")
    with pytest.raises(InputError, match=r"optimizer\.name: 'sgd'.*, 'adamw' now"):
        train(settings(**ADAMW), options(tmp_path / "other", resume=True), Silent())


# --- names of before ---------------------------------------------------------------------------------------------------------


def test_old_names_are_read_with_a_note(tmp_path):
    now = settings()
    old = settings("schedule.drops=[1]", "schedule.factor=0.1", schedule__milestones="")
    assert old.as_dict() == now.as_dict()
    assert len(old.notes) == 2
    assert not now.notes
    assert "schedule.drops is now called schedule.milestones (--set)" in old.notes
    assert old.sources["schedule.gamma"] == "--set"
    file = tmp_path / "mine.toml"
    file.write_text("[schedule]\ndrops = [1]\n", encoding="utf-8")
    found = resolve("mnist-cons-0.25", file)
    assert found.config.schedule == {"name": "step", "milestones": [1], "gamma": 0.1}


def of_before(record: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration as a version before contract 2 wrote it."""
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in record.items()}
    del config["loggers"], config["callbacks"], config["optimizer"]["name"], config["schedule"]["name"]
    config["schedule"] = {"drops": config["schedule"]["milestones"], "factor": config["schedule"]["gamma"]}
    return config


def test_a_run_that_an_older_version_began_goes_on(tmp_path):
    resolved = settings()
    train(resolved, options(tmp_path / "whole"), Silent())
    with pytest.raises(Stopped):
        train(resolved, options(tmp_path / "run"), Interrupting(2))
    path = tmp_path / "run/config.json"
    record = json.loads(path.read_text())
    old = of_before(record["config"])
    assert rebuild(old).as_dict() == resolved.as_dict()
    path.write_text(json.dumps({**record, "config": old}))
    state = checkpoint(tmp_path / "run")
    state = {key: value for key, value in state.items() if key not in ("loss", "callbacks", "line", "digest", "data")}
    torch.save({**state, "format": 1}, tmp_path / "run/checkpoint.pt")
    with pytest.raises(InputError, match=r"schedule\.milestones: \[1\].*, \[2\] now"):
        train(settings(schedule__milestones="[2]"), options(tmp_path / "run", resume=True), Silent())
    train(resolved, options(tmp_path / "run", resume=True), Silent())
    assert same_weights(tmp_path / "whole", tmp_path / "run")
