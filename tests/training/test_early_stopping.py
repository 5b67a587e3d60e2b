"""Runs that end before their last epoch: because a callback says so, and for good."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rscli import registry
from rscli.config.layers import resolve
from rscli.errors import ConfigError, InputError, Stopped
from rscli.models.modelfile import load_model
from rscli.plugin_files import load_plugin_file
from rscli.registry import installed
from rscli.runtime.progress import Silent
from rscli.training.train import TrainOptions, train
from rscli_core.callbacks.early_stopping import EarlyStopping

STILL = ["callbacks.early-stopping.figure=lr", "callbacks.early-stopping.patience=2"]
"""The learning rate never gets larger: training ends after epoch 3 of 5."""


@pytest.fixture(autouse=True)
def _forget():
    yield
    registry._announced.clear()
    installed.cache_clear()


def digits(*sets: str):
    return resolve("digits-gaussian-0.25", sets=["epochs=5", "batch=512", "schedule.milestones=[]", *sets])


def options(folder: Path, **changes) -> TrainOptions:
    return TrainOptions(out=folder / "run", data_dir=folder, device="cpu", workers=0, **changes)


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_s")} for line in lines]


class Noting(Silent):
    """Keeps the notes; asks to stop after so many batches."""

    def __init__(self, after: int = 0) -> None:
        self.left, self.notes = after, []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def update(self, done: int, figures: dict[str, str]) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def same(one: Path, other: Path) -> bool:
    first, second = (load_model(path / "run/model.safetensors").network.state_dict() for path in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_ends_as_if_that_epoch_were_its_last(tmp_path):
    said = Noting()
    train(digits(*STILL), options(tmp_path / "a"), said)
    lines = metrics(tmp_path / "a")
    reason = "lr has not got better 2 times in a row; it was best in epoch 1: 0.02"
    assert [line.get("ended") for line in lines] == [None, None, reason]
    assert f"training ends after epoch 3 of 5: {reason}" in said.notes
    train(digits("epochs=3"), options(tmp_path / "b"), Silent())
    assert same(tmp_path / "a", tmp_path / "b")
    assert load_model(tmp_path / "a/run/model.safetensors").source.card.epochs == 3
    assert not (tmp_path / "a/run/running.txt").exists()


def test_a_run_that_ended_stays_finished(tmp_path):
    train(digits(*STILL), options(tmp_path), Silent())
    path = tmp_path / "run/model.safetensors"
    before, lines, content = path.stat().st_mtime_ns, metrics(tmp_path), path.read_bytes()
    said = Noting()
    train(digits(*STILL), options(tmp_path, resume=True), said)
    assert said.notes == [f"{path} is finished already"]
    assert path.stat().st_mtime_ns == before
    path.unlink()  # killed before it was written
    train(digits(*STILL), options(tmp_path, resume=True), Silent())
    assert path.read_bytes() == content
    assert metrics(tmp_path) == lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(digits(*STILL), options(folder), Silent())
    return folder


@pytest.mark.parametrize("after", [4, 8, 9])
def test_a_stop_from_outside_does_not_move_the_end(whole, tmp_path, after):
    """Three batches an epoch; what was waited for is kept in the checkpoint."""
    cut = tmp_path / "cut"
    with pytest.raises(Stopped) as stopped:
        train(digits(*STILL), options(cut), Noting(after))
    assert ("when" in str(stopped.value)) == (after == 9)  # asked to stop in what became the last epoch: the model is there
    if after < 9:
        train(digits(*STILL), options(cut, resume=True), Silent())
    assert metrics(cut) == metrics(whole)
    assert (cut / "run/model.safetensors").read_bytes() == (whole / "run/model.safetensors").read_bytes()


def test_when_to_stop_is_part_of_the_run(tmp_path):
    with pytest.raises(Stopped):
        train(digits(*STILL), options(tmp_path), Noting(2))
    with pytest.raises(InputError, match=r"callbacks\.early-stopping\.patience: 2 in .*, 3 now"):
        train(digits(*STILL, "callbacks.early-stopping.patience=3"), options(tmp_path, resume=True), Silent())


def ends(values: list, **fields) -> int | None:
    """The epoch in which training is ended."""
    callback, state, ended = EarlyStopping(figure="x", **fields), {}, []
    for epoch, value in enumerate(values, 1):
        figures = {} if value is None else {"x": value}
        run = SimpleNamespace(epoch=epoch, figures=figures, note=str, stop=lambda reason, epoch=epoch: ended.append(epoch))
        callback.after_figures(run, state)
    return ended[0] if ended else None


@pytest.mark.parametrize(
    ("values", "fields", "epoch"),
    [
        ([1, 2, 3, 3, 3, 3], {"patience": 2}, 5),
        ([1, 2, 3, 3, 4, 3, 3], {"patience": 2}, 7),
        ([3, 2, 1, 1], {"mode": "min", "patience": 1}, 4),
        ([1, 1.05, 1.09, 1.2, 1.25, 1.29], {"min_delta": 0.1, "patience": 2}, 3),
        ([1, None, None, 1, None, 1], {"patience": 2}, 6),  # a probe that comes every other epoch
        ([1, 2, 3], {"patience": 1}, None),
        ([float("nan")] * 3, {"patience": 2}, 2),
    ],
)
def test_when_training_ends(values, fields, epoch):
    assert ends(values, **fields) == epoch


def test_a_figure_to_watch_must_be_named():
    with pytest.raises(ConfigError, match=r"callbacks\.early-stopping\.figure: is missing"):
        digits("callbacks.early-stopping={}")


STOPPER = """
class Stopper(Callback):
    at: int

    def begin(self, run, state):
        state["steps"] = state.get("steps", 0)
        if self.at == 0:
            run.stop("at once")

    def after_step(self, run, state):
        state["steps"] += 1
        if state["steps"] == self.at:
            run.stop("enough")
            run.stop("more than enough")
"""


@pytest.mark.parametrize(("at", "epochs"), [(0, 0), (1, 1), (3, 1), (4, 2)])
def test_any_callback_may_end_a_run_after_its_epoch(tmp_path, at, epochs):
    path = tmp_path / "mine.py"
    path.write_text("from rscli.api import *\n\n\n" + STOPPER)
    load_plugin_file(path)
    resolved = digits(f"callbacks.stopper.at={at}", "callbacks.checkpoint=none")
    train(resolved, options(tmp_path), Silent())
    lines = metrics(tmp_path) if epochs else []
    assert [line.get("ended") for line in lines] == [None] * (epochs - 1) + ["enough"] * (epochs > 0)
    assert load_model(tmp_path / "run/model.safetensors").source.card.epochs == epochs
