"""The schedules against closed forms, and against torch's own, step by step and epoch by epoch."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, PolynomialLR, SequentialLR

from rscli.config.layers import resolve
from rscli.data.splits import open_split
from rscli.registry import installed
from rscli.training.trainer import Trainer
from rscli_core.schedules.constant import Constant
from rscli_core.schedules.cosine import Cosine
from rscli_core.schedules.linear import Linear
from rscli_core.schedules.polynomial import Polynomial

EVERY = ("constant", "cosine", "linear", "polynomial")


def torch_s(schedulers, milestones, count: int) -> list[float]:
    """The factors that a chain of torch's schedulers gives, at each of `count` of its steps."""
    optimizer = SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    made = [build(optimizer) for build in schedulers]
    chain = SequentialLR(optimizer, made, milestones) if len(made) > 1 else made[0]
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(count):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            chain.step()
    return found


# --- closed forms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 0.3, 2.5, 7, 10])
def test_closed_forms(epoch):
    t = epoch / 10
    assert Cosine().factor(epoch, 10) == pytest.approx(math.cos(math.pi * t / 2) ** 2, abs=1e-15)
    assert Cosine(floor=0.2).factor(epoch, 10) == pytest.approx(0.2 + 0.8 * math.cos(math.pi * t / 2) ** 2)
    assert Linear(floor=0.1).factor(epoch, 10) == pytest.approx(1 - 0.9 * t)
    assert Polynomial(power=3).factor(epoch, 10) == pytest.approx((1 - t) ** 3)
    assert Constant().factor(epoch, 10) == 1


def test_the_trapezoid():
    schedule = Linear(warmup=2, warmup_from=0, hold=5, floor=0.5)
    at = {0: 0, 1: 0.5, 2: 1, 4: 1, 7: 1, 8.5: 0.75, 10: 0.5}
    assert [schedule.factor(epoch, 10) for epoch in at] == pytest.approx(list(at.values()))


def test_what_a_paper_on_mnist_would_write():
    """Ten epochs of warm-up from a tenth, a cosine to 1 %: values worked out by hand."""
    schedule = Cosine(warmup=10, warmup_from=0.1, floor=0.01)
    at = {0: 0.1, 5: 0.55, 10: 1, 50: 0.505, 90: 0.01}
    assert [schedule.factor(epoch, 90) for epoch in at] == pytest.approx(list(at.values()))


# --- torch's own --------------------------------------------------------------------------------------------------------------

BATCHES, EPOCHS, WARMUP = 7, 12, 3


@pytest.mark.parametrize(("floor", "start"), [(0.0, 0.01), (0.05, 0.2)])
def test_cosine_with_warm_up_is_torch_s_sequence_in_every_step(floor, start):
    steps, warm = BATCHES * EPOCHS, BATCHES * WARMUP
    wanted = torch_s(
        [
            lambda o: LinearLR(o, start_factor=start, total_iters=warm),
            lambda o: CosineAnnealingLR(o, T_max=steps - warm, eta_min=floor),
        ],
        [warm],
        steps,
    )
    schedule = Cosine(warmup=WARMUP, warmup_from=start, floor=floor)
    assert [schedule.factor(k / BATCHES, EPOCHS) for k in range(steps)] == pytest.approx(wanted, rel=1e-10, abs=1e-12)


def test_cosine_with_warm_up_is_torch_s_sequence_in_every_epoch():
    wanted = torch_s(
        [
            lambda o: LinearLR(o, start_factor=0.01, total_iters=WARMUP),
            lambda o: CosineAnnealingLR(o, T_max=EPOCHS - WARMUP, eta_min=0.1),
        ],
        [WARMUP],
        EPOCHS,
    )
    schedule = Cosine(warmup=WARMUP, floor=0.1, per="epoch")
    found = [schedule.factor(epoch + batch / BATCHES, EPOCHS) for epoch in range(EPOCHS) for batch in range(BATCHES)]
    assert found == pytest.approx([each for each in wanted for _ in range(BATCHES)], rel=1e-10)


def test_polynomial_and_linear_are_torch_s():
    steps = BATCHES * EPOCHS
    for power in (0.5, 1, 2.5):
        wanted = torch_s([lambda o, p=power: PolynomialLR(o, total_iters=steps, power=p)], [], steps)
        found = [Polynomial(power=power).factor(k / BATCHES, EPOCHS) for k in range(steps)]
        assert found == pytest.approx(wanted, rel=1e-9)
    wanted = torch_s([lambda o: LinearLR(o, start_factor=1, end_factor=0.3, total_iters=steps)], [], steps)
    assert [Linear(floor=0.3).factor(k / BATCHES, EPOCHS) for k in range(steps)] == pytest.approx(wanted, rel=1e-9)


# --- of all of them -----------------------------------------------------------------------------------------------------------


@given(
    name=st.sampled_from(EVERY),
    warmup=st.floats(0, 20),
    start=st.floats(0, 1),
    hold=st.floats(0, 20),
    floor=st.floats(0, 1),
    per=st.sampled_from(["step", "epoch"]),
    epochs=st.integers(1, 30),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=30),
)
def test_it_grows_and_then_falls_between_its_ends(name, warmup, start, hold, floor, per, epochs, shares):
    """Whatever the settings, also where the warm-up is longer than the run."""
    decay = {} if name == "constant" else {"hold": hold, "floor": floor}
    schedule = installed().build("schedules", {"name": name, "warmup": warmup, "warmup_from": start, "per": per, **decay})
    places = sorted(share * epochs for share in shares)
    found = [schedule.factor(place, epochs) for place in places]
    low = min(start if warmup else 1, floor if decay else 1)
    assert all(low - 1e-9 <= value <= 1 + 1e-9 for value in found)
    growing = [value for place, value in zip(places, found, strict=True) if (place // 1 if per == "epoch" else place) <= warmup]
    assert growing == sorted(growing)
    assert found[len(growing) :] == sorted(found[len(growing) :], reverse=True)


@pytest.mark.parametrize("name", EVERY)
def test_bad_fields_are_refused(name):
    for fields in ({"warmup": -1}, {"warmup_from": 1.1}, {"per": "batch"}, {"warmup": float("nan")}):
        with pytest.raises(ValidationError):
            installed().build("schedules", {"name": name, **fields})


def test_the_host_gives_every_batch_its_rate(tmp_path):
    sets = ["schedule.name=cosine", "schedule.warmup=1", "schedule.floor=0.1", "optimizer.lr=0.5", "epochs=3", "batch=480"]
    resolved = resolve("digits-gaussian-0.25", sets=sets)
    spec = resolved.dataset.spec(tmp_path)
    split = open_split(resolved.dataset, spec, "train", tmp_path)
    trainer = Trainer(resolved, spec, split, torch.device("cpu"), channels_last=False)
    found = []
    for _ in trainer.epoch_batches():
        found.append(trainer.optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([0.5 * 0.01, 0.5 * (0.01 + 0.99 / 3), 0.5 * (0.01 + 0.99 * 2 / 3)])
