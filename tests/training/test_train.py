"""The training engine: what a step computes, and that a run can be stopped anywhere and goes on to the same bits."""

from __future__ import annotations

import json
import math
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import runs
from rscli.api import Attack, Loss, Position, TrainStep
from rscli.config.layers import Resolved
from rscli.data.splits import Batch
from rscli.errors import InputError, PluginError, RscliError, Stopped
from rscli.models.modelfile import load_model
from rscli.registry import installed
from rscli.runtime.progress import Silent
from rscli.runtime.signals import STOPPING
from rscli.training.minimum_batch import check_single_image_batches
from rscli.training.train import outlook, train
from rscli.training.trainer import Trainer, attacked
from rscli_core.optimizers.sgd import Sgd
from runs import Interrupting
from runs import train_options as options

SETTINGS = {
    "data.name": "digits",
    "arch.name": "lenet",
    "noise.sigma": "0.25",
    "loss.name": "consistency",
    "loss.lbd": "5",
    "optimizer.lr": "0.05",
    "schedule.milestones": "[1]",
    "epochs": "2",
    "batch": "256",
}
settings = partial(runs.settings, SETTINGS)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(settings(), options(folder), Silent())
    return folder


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "images_per_s")} for line in lines]


def test_the_run_folder_holds_what_the_readme_promises(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert names == {"config.json", "environment.json", "metrics.jsonl", "checkpoint.pt", "model.safetensors"}
    lines = metrics(uninterrupted)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert [line["lr"] for line in lines] == pytest.approx([0.05, 0.005])
    for line in lines:
        assert line["loss"] == pytest.approx(line["ce"] + line["kl"] + line["entropy"], rel=1e-5)
        assert 0 < line["accuracy"] <= 1


def test_two_runs_with_one_seed_are_identical(uninterrupted, tmp_path):
    train(settings(), options(tmp_path / "run"), Silent())
    assert (tmp_path / "run/model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()
    assert metrics(tmp_path / "run") == metrics(uninterrupted)


def test_another_seed_gives_another_model(uninterrupted, tmp_path):
    train(settings(seed="1"), options(tmp_path / "run"), Silent())
    first = load_model(uninterrupted / "model.safetensors").network.state_dict()
    other = load_model(tmp_path / "run/model.safetensors").network.state_dict()
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("after", "number", "code"),
    [
        (1, signal.SIGTERM, 75),
        (6, signal.SIGINT, 130),
        (9, signal.SIGTERM, 75),
        *((7, number, 75) for number in STOPPING if number not in (signal.SIGTERM, signal.SIGINT)),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else str(value),
)
def test_a_stopped_run_resumes_to_the_same_bits(uninterrupted, tmp_path, after, number, code):
    folder = tmp_path / "run"
    with pytest.raises(Stopped) as stopped:
        train(settings(), options(folder), Interrupting(after, number))
    assert stopped.value.exit_code == code
    assert not (folder / "model.safetensors").exists()
    torch.manual_seed(99)  # whatever the process did in between
    train(settings(), options(folder, resume=True), Silent())
    assert (folder / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()
    assert metrics(folder) == metrics(uninterrupted)


def test_a_finished_run_resumes_to_nothing(uninterrupted):
    before = {path.name: path.stat().st_mtime_ns for path in uninterrupted.iterdir()}
    train(settings(), options(uninterrupted, resume=True), Silent())
    assert {path.name: path.stat().st_mtime_ns for path in uninterrupted.iterdir() if path.name in ("model.safetensors",)} == {
        "model.safetensors": before["model.safetensors"]
    }


def test_a_folder_with_a_run_is_not_overwritten(uninterrupted):
    with pytest.raises(InputError, match="already holds a training run") as error:
        train(settings(), options(uninterrupted), Silent())
    assert "--resume" in str(error.value)


def test_another_configuration_is_refused_with_its_differences(uninterrupted):
    with pytest.raises(InputError, match=r"loss\.lbd: 5.*, 7.* now"):
        train(settings(loss__lbd="7"), options(uninterrupted, resume=True), Silent())


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a checkpoint", b"\x80\x02ccollections\nOrderedDict\n."])
def test_a_broken_checkpoint_is_refused_and_nothing_is_run_from_it(uninterrupted, tmp_path, damage):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (folder / name).write_bytes((uninterrupted / name).read_bytes())
    (folder / "checkpoint.pt").write_bytes(damage)
    with pytest.raises(InputError, match="checkpoint"):
        train(settings(), options(folder, resume=True), Silent())


FIRST = "network.fc1.weight"
EDITS = {
    "epoch-text": (lambda s: {**s, "epoch": "one"}, 'is damaged: epoch = "one" must be a valid integer'),
    "epoch-negative": (lambda s: {**s, "epoch": -1}, "is damaged: epoch = -1 must be greater than or equal to 0"),
    "epoch-beyond": (lambda s: {**s, "epoch": 9}, "it is at epoch 10, batch 0, of a run of 2 epochs with 6 batches each"),
    "batch-fraction": (lambda s: {**s, "batch": 0.5}, "is damaged: batch = 0.5 must be a valid integer"),
    "batch-beyond": (lambda s: {**s, "epoch": 1, "batch": 6}, "it is at epoch 2, batch 6, of a run"),
    "model-list": (lambda s: {**s, "model": [1]}, "is damaged: model must be a valid dictionary"),
    "weight-text": (lambda s: {**s, "model": {**s["model"], FIRST: "x"}}, f"is damaged: model.{FIRST} = "),
    "weight-missing": (lambda s: {**s, "model": {}}, "does not fit this run: Error(s) in loading state_dict"),
    "weight-shape": (lambda s: {**s, "model": {**s["model"], FIRST: torch.zeros(3)}}, "size mismatch"),
    "optimizer-none": (lambda s: {**s, "optimizer": None}, "is damaged: optimizer = null"),
    "optimizer-empty": (lambda s: {**s, "optimizer": {}}, "optimizer.state is missing; optimizer.param_groups is missing"),
    "momentum": (lambda s: _group(s, momentum=0.5), "its optimiser has momentum 0.5, and the run has 0.9"),
    "momentum-buffer": (lambda s: _buffer(s, torch.zeros(2)), "momentum_buffer of its optimiser does not have the shape"),
    "momentum-text": (lambda s: _buffer(s, "x"), "momentum_buffer of its optimiser does not have the shape"),
    "meter-list": (lambda s: {**s, "meter": []}, "is damaged: meter "),
    "meter-nan": (lambda s: {**s, "meter": {"sums": {"loss": math.nan}, "images": 3}}, "meter.sums.loss = NaN must be"),
    "meter-images": (lambda s: {**s, "meter": {"sums": {}, "images": True}}, "meter.images = true must be a valid integer"),
}  # fmt: skip


def _group(state, **changes):
    groups = [{**group, **changes} for group in state["optimizer"]["param_groups"]]
    return {**state, "optimizer": {**state["optimizer"], "param_groups": groups}}


def _buffer(state, value):
    return {**state, "optimizer": {**state["optimizer"], "state": {0: {"momentum_buffer": value}}}}


@pytest.mark.parametrize("edit", EDITS)
def test_a_checkpoint_that_somebody_edited_is_refused_in_one_message(uninterrupted, tmp_path, edit):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    (folder / "model.safetensors").unlink()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state = {
        **{key: state[key] for key in ("epoch", "batch", "model", "optimizer", "meter")},
        "format": 1,
    }
    change, said = EDITS[edit]
    torch.save(change(state), folder / "checkpoint.pt")
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError) as caught:
        train(settings(), options(folder, resume=True), Silent())
    assert f"the checkpoint {folder / 'checkpoint.pt'} " in caught.value.message
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert "--resume" in caught.value.hint
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not (folder / "model.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_with_step_terms_and_learning_rate(tmp_path):
    with pytest.raises(
        RscliError, match=r"epoch 1, batch \d+, chunk \d: loss = (nan|inf).*ce = .*learning rate 1e\+06"
    ) as error:
        train(settings(optimizer__lr="1e6"), options(tmp_path / "run"), Silent())
    assert error.value.exit_code == 1
    assert not (tmp_path / "run/checkpoint.pt").exists()


def test_the_outlook_counts_without_touching_anything(tmp_path):
    seen = outlook(settings(), options(tmp_path / "run"))
    assert (seen.parameters, seen.images, seen.chunks) == (431_080, 1437, 2)
    assert seen.steps_per_epoch == 6 * 2  # 5 batches of 256 and one of 157, each in two chunks
    assert not (tmp_path / "run").exists()


def trainer(resolved: Resolved, folder: Path) -> Trainer:
    from rscli.data.splits import open_split

    spec = resolved.dataset.spec(folder)
    split = open_split(resolved.dataset, spec, "train", folder)
    return Trainer(resolved, spec, split, torch.device("cpu"), channels_last=False)


class Recording(Loss):
    """Keeps the steps that it is given."""

    def step(self, step: TrainStep) -> dict[str, torch.Tensor]:
        self.__class__.seen.append(step)
        return {"zero": step.noisy_logits.sum() * 0}


@pytest.mark.parametrize(("chunk", "shapes"), [("true", [(3, 86), (3, 86), (3, 84)]), ("false", [(3, 256)])])
def test_chunks_are_steps_of_their_own_with_m_copies_each(tmp_path, chunk, shapes):
    resolved = settings(loss__name="gaussian", loss__lbd="", chunk=chunk)
    loss = Recording(m=3)
    Recording.seen = []
    resolved.plugins["loss"] = loss
    made = trainer(resolved, tmp_path)
    made.chunks = 3 if chunk == "true" else 1
    next(made.epoch_batches())
    assert [tuple(step.noise.shape[:2]) for step in Recording.seen] == shapes
    assert all(step.images.shape[0] == step.noise.shape[1] == len(step.labels) for step in Recording.seen)
    noise = torch.cat([step.noise.flatten() for step in Recording.seen])
    assert noise.std().item() == pytest.approx(0.25, rel=0.01)
    assert len({step.noise[0, 0, 0, 0, 0].item() for step in Recording.seen}) == len(shapes)


def test_a_step_is_sgd_with_momentum_and_weight_decay_on_every_parameter(tmp_path):
    """Against the update written out, for the first two steps, from the gradients of the Gaussian loss."""
    resolved = settings(loss__name="gaussian", loss__lbd="", batch="719", schedule__milestones="[]")
    made = trainer(resolved, tmp_path)
    before = [p.detach().clone() for p in made.classifier.parameters()]
    batches = made.epoch_batches()
    next(batches)
    first = [p.grad.clone() for p in made.classifier.parameters()]
    velocity = [g + 1e-4 * p for g, p in zip(first, before, strict=True)]
    after = [p - 0.05 * v for p, v in zip(before, velocity, strict=True)]
    for got, wanted in zip(made.classifier.parameters(), after, strict=True):
        torch.testing.assert_close(got.detach(), wanted)
    middle = [p.detach().clone() for p in made.classifier.parameters()]
    next(batches)
    second = [p.grad.clone() for p in made.classifier.parameters()]
    wanted = [p - 0.05 * (0.9 * v + g + 1e-4 * p) for p, v, g in zip(middle, velocity, second, strict=True)]
    for got, expected in zip(made.classifier.parameters(), wanted, strict=True):
        torch.testing.assert_close(got.detach(), expected)


class Plain(torch.optim.Optimizer):
    """Gradient descent whose step takes nothing."""

    def step(self):
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter -= self.param_groups[0]["lr"] * parameter.grad


def test_an_optimiser_whose_step_takes_no_closure_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(Sgd, "build", lambda self, model: Plain(model.parameters(), {"lr": self.lr}))
    made = trainer(settings(loss__name="gaussian", loss__lbd=""), tmp_path)
    before = [parameter.detach().clone() for parameter in made.classifier.parameters()]
    next(made.epoch_batches())
    assert not any(torch.equal(old, new) for old, new in zip(before, made.classifier.parameters(), strict=True))


@pytest.mark.parametrize(("epoch", "drops"), [(0, 0), (30, 0), (31, 1), (60, 1), (61, 2), (89, 2)])
def test_the_schedule_counts_finished_epochs(tmp_path, epoch, drops):
    made = trainer(settings(epochs="90", schedule__milestones="[31, 61]"), tmp_path)
    made.epoch = epoch
    assert made.lr_factor == pytest.approx(0.1**drops)
    assert made.lr == pytest.approx(0.05 * 0.1**drops)


class Half(Attack):
    """Halves the images, and looks at the model's mode."""

    def perturb(self, step: TrainStep) -> TrainStep:
        assert not any(module.training for module in step.model.modules())
        assert not any(p.requires_grad for p in step.model.parameters())
        return step.moved(images=step.images / 2)


class Cropping(Attack):
    """Breaks its contract."""

    def perturb(self, step: TrainStep) -> TrainStep:
        return step.moved(images=step.images[..., 1:])


class Outside(Attack):
    """Adds `by` to every pixel, whatever comes of it; NaN at 100."""

    by: float

    def perturb(self, step: TrainStep) -> TrainStep:
        return step.moved(images=step.images + (self.by if self.by < 100 else torch.nan))


def a_step() -> TrainStep:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(8, 2))
    network[0].eval()  # a mixture of modes and needs must come back exactly
    network[4].bias.requires_grad_(False)
    images, noise = torch.rand(5, 1, 4, 4), 0.5 * torch.randn(2, 5, 1, 4, 4)
    labels, smoothing = torch.zeros(5, dtype=torch.int64), installed().build("noises", {"name": "gaussian", "sigma": 0.5})
    return TrainStep(network, images, images, labels, torch.arange(5), noise, smoothing, torch.Generator())


def smoothadv(name: str) -> Attack:
    return installed().build("attacks", {"name": name, "epsilon": 1.0, "steps": 3, "warmup": 0})


REAL = ["pgd", "ddn", "gradient-free"]


@pytest.mark.parametrize("attack", [Half(), *map(smoothadv, REAL)], ids=["contract", *REAL])
def test_an_attack_leaves_nothing_behind(attack):
    """Modes, needs of gradients, gradients, and buffers: the statistics of batch normalisation are those of training alone."""
    step = a_step()
    modes = [module.training for module in step.model.modules()]
    needs = [p.requires_grad for p in step.model.parameters()]
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= before.keys()
    random = torch.get_rng_state()
    moved = attacked(attack, step)
    assert not moved.images.requires_grad
    assert not moved.noise.requires_grad
    assert [module.training for module in step.model.modules()] == modes
    assert [p.requires_grad for p in step.model.parameters()] == needs
    assert all(torch.equal(before[name], value) for name, value in step.model.state_dict().items())
    assert all(p.grad is None for p in step.model.parameters())
    assert torch.equal(torch.get_rng_state(), random)  # dropout drew nothing: it was off


@pytest.mark.parametrize("attack", REAL)
def test_training_on_attacked_images_is_training_on_what_the_attack_returned(tmp_path, monkeypatch, attack):
    """One step with the attack, and one without it on the moved images: the same weights and statistics, to the bit."""
    sets = {"arch__name": "cifar-resnet", "arch__depth": "8", "loss__name": "gaussian", "loss__lbd": "", "loss__m": "2"}
    plain = trainer(settings(**sets), tmp_path)
    smooth = {"attack__name": attack, "attack__epsilon": "1.0", "attack__steps": "3", "attack__warmup": "0"}
    made, moved = trainer(settings(**sets, **smooth), tmp_path), []
    monkeypatch.setattr("rscli.training.trainer.attacked", lambda *a: moved.append(attacked(*a)) or moved[0])
    images, labels = torch.rand(8, 1, 28, 28), torch.arange(8)
    made._step(Batch(images, labels, labels, 0, 0, 0, 8), Position())
    plain._step(Batch(moved[0].images, labels, labels, 0, 0, 0, 8), Position())
    assert attack == "ddn" or not torch.equal(moved[0].images, images)  # DDN stays where an untrained network is wrong already
    ours, theirs = made.classifier.state_dict(), plain.classifier.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours["network.bn1.num_batches_tracked"] == 1


def test_the_attack_and_the_loss_see_the_same_noise(tmp_path, monkeypatch):
    resolved, seen = settings(loss__name="gaussian", loss__lbd=""), []
    resolved.plugins.update(loss=Recording(m=2), attack=Half())
    Recording.seen = []
    monkeypatch.setattr("rscli.training.trainer.attacked", lambda attack, step: seen.append(step) or attacked(attack, step))
    images, labels = torch.rand(4, 1, 28, 28), torch.arange(4)
    trainer(resolved, tmp_path)._step(Batch(images, labels, labels, 0, 0, 0, 4), Position())
    (before,), (after,) = seen, Recording.seen
    assert before.noise.data_ptr() == after.noise.data_ptr()
    assert (before.labels is labels, after.labels is labels) == (True, True)
    assert torch.equal(before.images, images)
    assert torch.equal(after.images, images / 2)


def test_the_model_is_restored_when_an_attack_raises():
    step = a_step()
    modes = [module.training for module in step.model.modules()]
    with pytest.raises(ZeroDivisionError), step.frozen():
        raise ZeroDivisionError
    assert [module.training for module in step.model.modules()] == modes


def test_an_attack_that_changes_the_shape_is_named():
    with pytest.raises(PluginError, match="Cropping"):
        attacked(Cropping(), a_step())


@pytest.mark.parametrize("what", [outlook, lambda *a: train(*a, Silent())], ids=["dry-run", "train"])
def test_an_attack_that_needs_more_copies_is_refused_before_anything_is_written(tmp_path, what):
    """The gradient-free one: with a single copy its direction would be the noise itself, whatever the model says."""
    free = {"loss__name": "gaussian", "loss__lbd": "", "attack__name": "gradient-free", "attack__epsilon": "1.0"}
    with pytest.raises(InputError, match=r"'gradient-free' compares 2 noisy copies .* but m = 1") as error:
        what(settings(**free), options(tmp_path / "run"))
    assert "loss.m=2" in error.value.hint
    assert not (tmp_path / "run").exists()
    assert outlook(settings(**free, loss__m="2"), options(tmp_path / "run")).chunks == 2


@pytest.mark.parametrize(("by", "says"), [(0.5, "to 1.5"), (-0.5, "from -0.5"), (100, "nan")], ids=["above", "below", "nan"])
def test_an_attack_that_leaves_the_box_is_named(by, says):
    step = replace(a_step(), images=torch.linspace(0, 1, 80).view(5, 1, 4, 4))
    with pytest.raises(PluginError, match=f"attack Outside breaks its contract: perturb returned pixels.*{says}.*must be in"):
        attacked(Outside(by=by), step)


def test_a_model_that_no_run_wrote_is_kept(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/model.safetensors").write_bytes(b"precious")
    with pytest.raises(InputError, match="already exists"):
        train(settings(), options(tmp_path / "run"), Silent())
    assert (tmp_path / "run/model.safetensors").read_bytes() == b"precious"
    assert not (tmp_path / "run/config.json").exists()


def test_a_launcher_that_leaves_variables_out_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="WORLD_SIZE is 2, but RANK is not set"):
        train(settings(), options(tmp_path / "run"), Silent())
    assert not (tmp_path / "run").exists()


def test_a_network_that_cannot_be_built_leaves_no_run_behind(tmp_path):
    wrong = settings(arch__name="timm/no_such_model")
    with pytest.raises(InputError):
        train(wrong, options(tmp_path / "run"), Silent())
    assert not (tmp_path / "run").exists()


# --- steps on a single image ---

POINTED = {"arch__name": "timm/resnet18", "loss__name": "gaussian", "loss__lbd": ""}
"""On 28x28 pixels its last maps are 1x1: batch normalisation sees one value per channel and image."""


@pytest.mark.parametrize("batch", [1, 359])
def test_an_image_that_is_left_alone_with_batch_normalisation_is_refused_at_once(tmp_path, batch):
    for refused in (train, outlook):
        arguments = (Silent(),) if refused is train else ()
        with pytest.raises(InputError, match=f"batch is {batch}, .* a single image of the 1437 .* timm/resnet18") as caught:
            refused(settings(**POINTED, batch=str(batch)), options(tmp_path / "run"), *arguments)
        better = int(caught.value.hint.partition("batch=")[2].partition(",")[0])
        assert better > batch
        assert 1437 % better != 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {**POINTED, "batch": "360"},  # 357 are left over
        {**POINTED, "batch": "359", "loss__m": "2"},  # two noisy copies of the one image
        {"batch": "359", "loss__name": "gaussian", "loss__lbd": ""},  # no batch normalisation
    ],
    ids=["no-single-image", "two-copies", "lenet"],
)
def test_an_image_left_alone_is_no_problem_otherwise(tmp_path, changes):
    assert outlook(settings(**changes), options(tmp_path / "run")).images == 1437


def test_trying_a_step_leaves_no_trace(tmp_path):
    """Buffers of batch normalisation, gradients and the global generator stay as they were."""
    resolved = settings(**{**POINTED, "loss__m": "2"}, batch="359")
    made = trainer(resolved, tmp_path)
    before, drawn = {name: value.clone() for name, value in made.classifier.state_dict().items()}, torch.get_rng_state()
    check_single_image_batches(resolved, made.classifier, resolved.dataset.spec(tmp_path), 1437)
    assert all(torch.equal(value, before[name]) for name, value in made.classifier.state_dict().items())
    assert all(parameter.grad is None for parameter in made.classifier.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_out_of_memory_is_said_and_the_checkpoint_stays(tmp_path, monkeypatch):
    step = Trainer._step

    def large(trainer: Trainer, *arguments) -> None:
        if trainer.epoch == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_step", large)
    with pytest.raises(
        RscliError, match="the device cpu does not have enough memory for a forward of 128 images with 2 noisy"
    ) as error:
        train(settings(), options(tmp_path / "run"), Silent())
    assert "--set batch" in (error.value.hint or "")
    monkeypatch.setattr(Trainer, "_step", step)
    assert train(settings(), options(tmp_path / "run", resume=True), Silent()).exists()
