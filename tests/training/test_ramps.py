"""Ramps: values worked out by hand, what may be ramped, and that a step gets exactly that."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from rscli.api import TrainStep
from rscli.config.layers import rebuild, resolve
from rscli.config.ramps import value_at
from rscli.config.schema import Ramp
from rscli.data.splits import open_split, spec_of
from rscli.errors import ConfigError, InputError, Stopped
from rscli.models.modelfile import load_model
from rscli.runtime.progress import Silent
from rscli.training import objective
from rscli.training import trainer as engine
from rscli.training.ramps import ramp_values, ramped
from rscli.training.train import TrainOptions, train
from rscli.training.trainer import Trainer


def digits(*sets: str, config: Path | None = None):
    base = ["epochs=2", "batch=256", "loss.lbd=8", "attack.name=pgd", "attack.epsilon=0.5", "attack.steps=4"]
    return resolve("digits-cons-0.25", config, sets=[*base, *sets])


def options(folder: Path, **changes) -> TrainOptions:
    return TrainOptions(out=folder / "run", data_dir=folder, device="cpu", workers=0, **changes)


@pytest.mark.parametrize(
    ("ramp", "epoch", "value"),
    [
        ({}, 0, 1.0),
        ({}, 5, 3.0),  # half way through 10 epochs, from 1 to 5
        ({}, 9.75, 4.9),
        ({}, 10, 5.0),
        ({"epochs": 4}, 1, 2.0),
        ({"epochs": 4}, 4, 5.0),
        ({"epochs": 4}, 7, 5.0),
        ({"wait": 2, "epochs": 4}, 2, 1.0),
        ({"wait": 2, "epochs": 4}, 3, 2.0),
        ({"wait": 2}, 6, 3.0),
        ({"wait": 3, "epochs": 0}, 2.99, 1.0),
        ({"wait": 3, "epochs": 0}, 3, 5.0),
        ({"shape": "cosine"}, 5, 3.0),
        ({"shape": "cosine"}, 2.5, 1 + 4 * (1 - math.sqrt(0.5)) / 2),
        ({"epochs": 0.5}, 0.25, 3.0),
    ],
)
def test_values_worked_out_by_hand(ramp, epoch, value):
    assert value_at(Ramp(start=1.0, **ramp), 5.0, epoch, 10) == pytest.approx(value, rel=1e-12)


def test_the_ends_are_exact_also_downwards_and_whole_numbers_stay_whole():
    down = Ramp(start=0.3, epochs=3)
    assert value_at(down, 0.1, 0, 10) == 0.3
    assert value_at(down, 0.1, 3, 10) == 0.1
    steps = [value_at(Ramp(start=1), 10, epoch, 10) for epoch in range(11)]
    assert steps == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10]  # 1 + 0.9 epoch, rounded, halves to even: 5.5 is 6
    assert all(float(step).is_integer() for step in steps)


def test_what_is_not_ramped_is_the_very_same_plugin():
    plain, moving = digits(), digits("ramps.loss.lbd.start=0")
    for epoch in (0, 0.5, 2):
        assert all(a is b for a, b in zip(ramped(plain, epoch), (plain.loss, plain.attack, plain.noise), strict=True))
        assert ramped(moving, epoch)[1:] == (moving.attack, moving.noise)
        assert ramped(moving, epoch)[2] is moving.noise
    loss, _, _ = ramped(moving, 0.5)
    assert (loss.lbd, loss.eta, loss.m, type(loss)) == (2.0, 0.5, 2, type(moving.loss))
    assert ramped(moving, 2)[0] is moving.loss


def test_loss_attack_and_noise_move_together():
    found = digits(
        "ramps.loss.lbd.start=0", "ramps.loss.eta.start=1", "ramps.attack.epsilon.start=0.1", "ramps.attack.steps.start=1",
        "ramps.noise.sigma.start=0.05", "ramps.noise.sigma.epochs=1",
    )  # fmt: skip
    loss, attack, noise = ramped(found, 0.5)
    assert (loss.lbd, loss.eta) == (2.0, 0.875)
    assert (attack.epsilon, attack.steps) == (pytest.approx(0.2), 2)
    assert isinstance(attack.steps, int)
    assert noise.sigma == pytest.approx(0.15)
    assert ramp_values(found, 1.0) == pytest.approx(
        {"loss.lbd": 4, "loss.eta": 0.75, "attack.epsilon": 0.3, "attack.steps": 2, "noise.sigma": 0.25}
    )


WRONG = {
    "unknown": (["ramps.loss.lambda.start=0"], r"ramps\.loss\.lambda: is no setting here.*numbers of this loss are: lbd, eta"),
    "text": (["ramps.loss.form.start=0"], r"ramps\.loss\.form: is not a number, and cannot be ramped"),
    "copies": (["ramps.loss.m.start=1"], r"ramps\.loss\.m: decides how a batch is split"),
    "below": (["ramps.loss.lbd.start=-1"], r"ramps\.loss\.lbd\.start = -1\.?0? \(--set\): must be greater than or equal to 0"),
    "zero-sigma": (["ramps.noise.sigma.start=0"], r"ramps\.noise\.sigma\.start = 0 \(--set\): must be greater than 0"),
    "the-end": (["ramps.loss.lbd.start=1", "loss.lbd=-1"], r"loss\.lbd = -1 \(--set\): must be greater than or equal to 0"),
    "fraction": (["ramps.attack.steps.start=1.5"], r"ramps\.attack\.steps\.start = 1\.5 \(--set\): must be a valid integer"),
    "section": (["ramps.optimizer.lr.start=1"], r"ramps\.optimizer: cannot be ramped: only numbers of loss, attack, noise"),
    "no-start": (["ramps.loss.lbd.epochs=1"], r"ramps\.loss\.lbd\.start: is missing"),
    "misspelt": (["ramps.loss.lbd.strat=1"], r"lbd\.strat = 1 \(--set\): unknown key\. Did you mean 'ramps\."),
    "nan": (["ramps.loss.lbd.start=nan"], r"ramps\.loss\.lbd\.start = NaN \(--set\): must be a finite number"),
    "number": (["ramps.loss.lbd=3"], r"ramps\.loss\.lbd = 3 \(--set\): is a section with keys of its own"),
    "long": (["ramps.loss.lbd.start=0", "ramps.loss.lbd.epochs=3"], r"ramps\.loss\.lbd\.epochs = 3 .*: must be less: loss"),
    "late": (["ramps.loss.lbd.start=0", "ramps.loss.lbd.wait=2"], r"ramps\.loss\.lbd\.wait = 2 .*: must be less"),
    "shape": (["ramps.loss.lbd.start=0", "ramps.loss.lbd.shape=square"], r"must be 'linear' or 'cosine'"),
    "no-attack": (["ramps.attack.epsilon.start=0.1", "attack=none"], r"ramps\.attack: is ramped, but there is no attack"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_ramp_is_said_before_anything_is_done(case):
    sets, said = WRONG[case]
    with pytest.raises(ConfigError, match=said):
        digits(*sets)


def test_every_wrong_ramp_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        digits("ramps.loss.lbd.start=-1", "ramps.loss.eta.start=-2", "ramps.noise.sigma.start=0")
    assert len(caught.value.problems) == 3


def test_ramps_come_from_layers_and_are_left_out_by_name(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[ramps.loss.lbd]\nstart = 2\n\n[ramps.noise.sigma]\nstart = 0.1\n")
    found = digits(config=file)
    assert ramp_values(found, 0) == {"loss.lbd": 2, "noise.sigma": 0.1}
    assert found.sources["ramps.loss.lbd.start"] == str(file)
    assert ramp_values(digits("ramps.loss.lbd=none", config=file), 0) == {"noise.sigma": 0.1}
    assert ramp_values(digits("ramps.loss.lbd.start=3", config=file), 0)["loss.lbd"] == 3
    assert rebuild(found.as_dict()).as_dict() == found.as_dict()


def test_another_loss_in_a_higher_layer_drops_the_ramps_of_the_one_below(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[ramps.loss.lbd]\nstart = 2\n\n[ramps.noise.sigma]\nstart = 0.1\n")
    found = resolve("digits-cons-0.25", file, sets=["loss.name=gaussian"])
    assert ramp_values(found, 0) == {"noise.sigma": 0.1}


def steps_of(folder: Path, resolved, monkeypatch) -> tuple[list[tuple], list[TrainStep]]:
    """Loss, attack and noise of every optimiser step of the first epoch, and the steps."""
    seen, steps = [], []
    monkeypatch.setattr(engine, "ramped", lambda *given: seen.append(ramped(*given)) or seen[-1])
    monkeypatch.setattr(objective, "_terms", lambda loss, step: steps.append(step) or loss.step(step))
    spec = spec_of(resolved.dataset, folder)
    split = open_split(resolved.dataset, spec, "train", folder)
    for _ in Trainer(resolved, spec, split, torch.device("cpu"), channels_last=False).epoch_batches():
        pass
    return seen, steps


def test_every_step_trains_under_the_ramped_noise_and_loss(tmp_path, monkeypatch):
    found = digits("attack=none", "ramps.noise.sigma.start=0.05", "ramps.noise.sigma.epochs=1", "ramps.loss.lbd.start=0")
    seen, steps = steps_of(tmp_path, found, monkeypatch)
    wanted = [0.05 + 0.2 * batch / 6 for batch in range(6) for _ in range(2)]  # two chunks a batch
    assert [step.sigma for step in steps] == pytest.approx(wanted)
    assert [step.noise.std().item() for step in steps] == pytest.approx(wanted, rel=0.02)
    assert [loss.lbd for loss, _, _ in seen] == pytest.approx([8 * batch / 12 for batch in range(6) for _ in range(2)])


class Stopping(Silent):
    """Asks to stop after so many batches."""

    def __init__(self, after: int) -> None:
        self.left = after

    def update(self, done: int, figures: dict[str, str]) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_ramped_run_is_logged_and_resumes_to_the_same_bits(tmp_path):
    found = digits("attack=none", "ramps.loss.lbd.start=2", "ramps.noise.sigma.start=0.1")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    train(found, options(whole), Silent())
    with pytest.raises(Stopped):
        train(found, options(cut), Stopping(9))
    train(found, options(cut, resume=True), Silent())
    assert (whole / "run/model.safetensors").read_bytes() == (cut / "run/model.safetensors").read_bytes()
    lines = [json.loads(line) for line in (cut / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["loss.lbd"] for line in lines] == pytest.approx(
        [2 + 6 * 5 / 12, 2 + 6 * 11 / 12]
    )  # at each epoch's last batch
    assert load_model(cut / "run/model.safetensors").noise.sigma == 0.25  # what the ramp ends with
    with pytest.raises(InputError, match=r"ramps\.loss\.lbd\.start: 2\.0 in .*, 3\.0 now"):
        train(
            digits("attack=none", "ramps.loss.lbd.start=3", "ramps.noise.sigma.start=0.1"), options(cut, resume=True), Silent()
        )


def test_a_ramp_that_is_over_at_once_changes_no_bit(tmp_path):
    plain, over = tmp_path / "plain", tmp_path / "over"
    plain.mkdir()
    over.mkdir()
    train(digits("attack=none", "epochs=1"), options(plain), Silent())
    train(digits("attack=none", "epochs=1", "ramps.loss.lbd.start=0", "ramps.loss.lbd.epochs=0"), options(over), Silent())
    states = [load_model(folder / "run/model.safetensors").network.state_dict() for folder in (plain, over)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
