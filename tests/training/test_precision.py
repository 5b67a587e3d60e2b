"""Precision: logits and losses in fp32 whatever the network runs in, scaled gradients of fp16, and what is refused or said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import together
from rscli.api import TrainStep
from rscli.cli.app import main
from rscli.config.layers import resolve
from rscli.errors import InputError, Stopped
from rscli.runtime import devices
from rscli.runtime.progress import Silent
from rscli.training.objective import attacked
from rscli.training.precision import TRAINING_PRECISIONS, Forward, gradient_scaler
from rscli.training.run_folder import RunFolder
from rscli.training.train import train
from rscli.training.trainer import Trainer
from rscli_core.attacks.pgd import Pgd
from rscli_core.noises.gaussian import Gaussian
from runs import Interrupting, Listening
from runs import train_options as options

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _plugins() -> Iterator[None]:
    together.announce()
    yield
    together.forget()


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def a_step(model: nn.Module) -> TrainStep:
    random = torch.Generator().manual_seed(2)
    images, noise = torch.rand(4, 1, 6, 6, generator=random), torch.randn(2, 4, 1, 6, 6, generator=random)
    places = torch.arange(4)
    return TrainStep(model, images, images, places % 3, places, 0.3 * noise, Gaussian(sigma=0.3), random)


# --- the forward -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "inside"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_logits_are_fp32_and_the_layers_are_not(precision, inside):
    seen = []
    made = network()
    made[4].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    step = a_step(Forward(made, precision, CPU))
    assert step.noisy_logits.dtype == torch.float32
    attacked(Pgd(epsilon=0.5, steps=2, warmup=0), step)
    assert len(seen) > 2
    assert set(seen) == {inside}
    assert not torch.is_autocast_enabled("cpu")
    assert all(parameter.dtype == torch.float32 for parameter in made.parameters())


@pytest.mark.parametrize(("precision", "near"), [("bf16", 0.05), ("fp16", 0.01)])
def test_gradients_are_near_those_of_fp32(precision, near):
    found = []
    for each in ("fp32", precision):
        made = network()
        step = a_step(Forward(made, each, CPU))
        nn.functional.cross_entropy(step.noisy_logits.flatten(0, 1), step.labels.repeat(2)).backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in made.parameters())
        found.append(torch.cat([parameter.grad.flatten() for parameter in made.parameters()]))
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert 1e-6 < error < near  # not zero: it was another precision


def test_only_fp16_scales_its_gradients():
    assert [gradient_scaler(each, CPU) is not None for each in TRAINING_PRECISIONS] == [False, False, False, True]


# --- fp16 --------------------------------------------------------------------------------------------------------------------

HALF = [*together.BASE, "precision=fp16", "limit=24", "batch=8", "epochs=2"]


def a_trainer(tmp_path: Path, *sets: str) -> Trainer:
    from rscli.data.splits import open_split
    from rscli.data.subset import limited

    resolved = resolve(sets=[*HALF, *sets])
    spec = resolved.dataset.spec(tmp_path)
    split = limited(open_split(resolved.dataset, spec, "train", tmp_path), resolved.config.limit)
    return Trainer(resolved, spec, split, CPU, channels_last=False)


@pytest.mark.parametrize("clip", [(), ("clip_norm=1",)], ids=["", "clipped"])
def test_a_step_with_infinite_gradients_is_skipped(tmp_path, clip):
    """The first step overflows with an enormous scale: nothing changes but the scale, and training goes on, clipped or not."""
    trainer = a_trainer(tmp_path, *clip)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    before = {name: each.clone() for name, each in trainer.classifier.state_dict().items()}
    batches = trainer.epoch_batches()
    next(batches)
    assert trainer.scaler.get_scale() == 2.0**125
    assert all(torch.equal(before[name], each) for name, each in trainer.classifier.state_dict().items())
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 128.0})
    trainer.scaler._scale.fill_(128.0)
    next(batches)
    assert not all(torch.equal(before[name], each) for name, each in trainer.classifier.state_dict().items())
    assert all(value < 100 for value in trainer.meter.means().values())


def test_scaling_leaves_the_gradients_as_they_are(tmp_path):
    """What the optimiser sees is unscaled: a scale of 1 and one of 1024 learn nearly the same."""
    found = []
    for scale in (1.0, 1024.0):
        trainer = a_trainer(tmp_path, "clip_norm=0.5")
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in trainer.epoch_batches():
            pass
        found.append(torch.cat([each.detach().flatten() for each in trainer.classifier.parameters()]))
    assert torch.allclose(*found, atol=1e-3)


def test_the_scale_survives_a_stop(tmp_path, monkeypatch):
    """It halves on overflow and grows every other step here, so that it is another one at every step."""
    scales: list[float] = []

    def scaler(*_: Any) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=2)

    step = torch.amp.GradScaler.update

    def update(self, *args: Any) -> None:
        step(self, *args)
        scales.append(self.get_scale())

    monkeypatch.setattr("rscli.training.trainer.gradient_scaler", scaler)
    monkeypatch.setattr(torch.amp.GradScaler, "update", update)
    resolved = resolve(sets=[*HALF, "epochs=4", "clip_norm=1"])
    train(resolved, options(tmp_path / "whole"), Silent())
    whole = list(scales)
    assert len(set(whole)) > 2
    scales.clear()
    with pytest.raises(Stopped):
        train(resolved, options(tmp_path / "parts"), Interrupting(4))
    assert RunFolder(tmp_path / "parts").load()["scaler"]["scale"] == scales[-1] != 2.0**120
    train(resolved, options(tmp_path / "parts", resume=True), Silent())
    assert scales == whole
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert ours.read_bytes() == theirs.read_bytes()


# --- refused and warned ------------------------------------------------------------------------------------------------------


def test_tf32_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(InputError, match="precision tf32 exists on CUDA devices only, not on cpu") as error:
        train(resolve(sets=[*together.BASE, "precision=tf32"]), options(tmp_path / "run"), Silent())
    assert error.value.hint == "Use fp32 or bf16."
    assert not (tmp_path / "run").exists()


def test_tf32_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--preset", "digits-gaussian-0.25", "--precision", "tf32", "--device", "cpu", "--out", "run"]
    monkeypatch.setattr("sys.argv", ["rscli", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "tf32 exists on CUDA devices only" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "precision", "warned"),
    [
        ("fpu sse avx2", "bf16", True),
        ("fpu avx512_bf16", "bf16", False),
        ("fpu avx512_bf16", "fp16", True),
        ("fpu amx_fp16", "fp16", False),
        ("fp asimdhp", "fp16", False),
        ("fpu sse avx2", "fp32", False),
    ],
)
def test_an_emulated_precision_is_warned_about_before_the_run(tmp_path, monkeypatch, flags, precision, warned):
    info = tmp_path / "cpuinfo"
    info.write_text(f"flags\t\t: {flags}\n")
    monkeypatch.setattr(devices, "CPUINFO", info)
    listening = Listening()

    class Began(Exception):
        pass

    def begin(_trainer: Trainer) -> None:
        raise Began

    monkeypatch.setattr(Trainer, "epoch_batches", begin)
    with pytest.raises(Began):
        train(resolve(sets=[*together.BASE, f"precision={precision}"]), options(tmp_path / "run"), listening)
    assert len(listening.warnings) == int(warned)
    if warned:
        assert listening.warnings[0].startswith(f"{precision} is emulated on this processor, and many times slower than fp32")


def test_the_precision_is_in_the_record(tmp_path):
    train(resolve(sets=[*together.BASE, "precision=bf16", "limit=8"]), options(tmp_path / "run"), Silent())
    assert json.loads((tmp_path / "run/config.json").read_text())["config"]["precision"] == "bf16"
    with pytest.raises(InputError, match=r"precision: 'bf16' in .*, 'fp32' now"):
        train(resolve(sets=[*together.BASE, "limit=8"]), options(tmp_path / "run", resume=True), Silent())
