"""The loggers that draw curves: TensorBoard for real, where it is installed; W&B and trackio by stubs of their libraries."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from rscli.config.layers import resolve
from rscli.errors import ConfigError, InputError, Stopped
from rscli.registry import installed
from rscli.runtime.progress import Silent
from rscli.training.train import TrainOptions, train

SETS = ["data.name=digits", "arch.name=lenet", "noise.sigma=0.25", "loss.name=gaussian", "optimizer.lr=0.05"]
SETS += ["epochs=2", "batch=480"]
BATCHES = 3


class Interrupting(Silent):
    """Asks the run to stop after so many batches."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def update(self, done: int, figures: dict[str, str]) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def run(folder: Path, *sets: str, after: int = 0, resume: bool = False) -> list[str]:
    options = TrainOptions(out=folder, data_dir=folder.parent, device="cpu", workers=0, resume=resume)
    progress = Interrupting(after)
    if after:
        with pytest.raises(Stopped):
            train(resolve(sets=[*SETS, *sets]), options, progress)
    else:
        train(resolve(sets=[*SETS, *sets]), options, progress)
    return progress.notes


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- stubs of libraries -------------------------------------------------------------------------------------------------------


class StubRun:
    """What wandb.init and trackio.init return: keeps everything."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given, self.points, self.finished, self.axes = given, [], 0, []
        self.url, self.offline = "https://example.org/run", given.get("mode") == "offline"

    def log(self, points: dict[str, float], step: int | None = None) -> None:
        self.points.append((step, points))

    def define_metric(self, *names: str, **more: str) -> None:
        self.axes.append((*names, more))

    def finish(self) -> None:
        self.finished += 1


def stub(monkeypatch, name: str) -> list[StubRun]:
    """Puts a stub in the place of a library; the runs that are begun with it."""
    begun: list[StubRun] = []
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)

    def init(**given: Any) -> StubRun:
        begun.append(StubRun(given))
        return begun[-1]

    module.init = init
    module.finish = lambda: begun[-1].finish()
    module.Settings = lambda **given: given
    monkeypatch.setitem(sys.modules, name, module)
    return begun


@pytest.fixture(params=["wandb", "trackio"])
def library(request) -> str:
    return request.param


def done_of(library: str, step: int | None, points: dict[str, float]) -> int:
    return int(points["batches"]) if library == "wandb" else step


# --- a run with a stub --------------------------------------------------------------------------------------------------------


def test_figures_of_epochs_and_steps_arrive_at_their_places(tmp_path, monkeypatch, library):
    begun = stub(monkeypatch, library)
    run(tmp_path / "mine" / "seed0", f"loggers.{library}.project=smooth")
    (made,) = begun
    assert made.finished == 1
    assert made.given["project"] == "smooth"
    assert made.given["config"]["noise"] == {"name": "gaussian", "sigma": 0.25}
    assert made.given["name"].startswith("mine/seed0")
    found = [(done_of(library, *point), point[1]) for point in made.points]
    steps = [(done, points) for done, points in found if "step/loss" in points]
    epochs = [(done, points) for done, points in found if "epoch/loss" in points]
    assert [done for done, _ in steps] == [1, 2, 3, 4, 5, 6]
    assert [done for done, _ in epochs] == [3, 6]
    for (done, points), line in zip(epochs, lines(tmp_path / "mine/seed0"), strict=True):
        figures = {name: value for name, value in line.items() if name != "epoch"}
        assert {name.removeprefix("epoch/"): value for name, value in points.items() if name.startswith("epoch/")} == figures
        assert points["epoch"] == done / BATCHES == line["epoch"]
    assert {"step/loss", "step/ce", "step/lr", "epoch"} <= set(steps[0][1])
    assert not {"step/batch", "step/epoch"} & set(steps[0][1])


def test_a_resumed_run_goes_on_under_its_name(tmp_path, monkeypatch, library):
    begun = stub(monkeypatch, library)
    run(tmp_path / "run", f"loggers.{library}={{}}", after=2)
    run(tmp_path / "run", f"loggers.{library}={{}}", resume=True)
    run(tmp_path / "other", f"loggers.{library}={{}}")
    first, second, other = (made.given for made in begun)
    assert [made.finished for made in begun] == [1, 1, 1]
    key = "id" if library == "wandb" else "name"
    assert first[key] == second[key] != other[key]
    assert second["resume"] == "allow"
    seen = [done_of(library, *point) for made in begun[:2] for point in made.points if "step/loss" in point[1]]
    assert seen == [1, 2, 3, 4, 5, 6]


def test_fewer_points_on_request(tmp_path, monkeypatch, library):
    begun = stub(monkeypatch, library)
    run(tmp_path / "few", f"loggers.{library}.every=2")
    run(tmp_path / "none", f"loggers.{library}.every=0")
    few, none = ([done_of(library, *p) for p in made.points if "step/loss" in p[1]] for made in begun)
    assert few == [2, 4, 6]
    assert none == []
    assert sum("epoch/loss" in points for _, points in begun[1].points) == 2


def test_what_the_library_refuses_is_an_error_that_can_be_acted_on(tmp_path, monkeypatch, library):
    stub(monkeypatch, library)

    def refuse(**given: Any) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(sys.modules[library], "init", refuse)
    with pytest.raises(InputError, match="cannot begin the run: no network") as caught:
        run(tmp_path / "run", f"loggers.{library}={{}}")
    assert f"loggers.{library}" in caught.value.hint


def test_wandb_is_told_where_to_draw_and_where_to_keep(tmp_path, monkeypatch):
    begun = stub(monkeypatch, "wandb")
    notes = run(tmp_path / "run", "loggers.wandb.mode=offline", "loggers.wandb.entity=us", "loggers.wandb.run_name=first")
    (made,) = begun
    assert made.axes == [("*", {"step_metric": "batches"})]
    assert (made.given["mode"], made.given["entity"], made.given["name"]) == ("offline", "us", "first")
    assert Path(made.given["dir"]) == tmp_path / "run"
    assert re.fullmatch(r"[0-9a-f]{8}", made.given["id"])
    assert notes == []
    assert run(tmp_path / "online", "loggers.wandb={}") == ["W&B: https://example.org/run"]


# --- without the library ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_library_that_is_missing_is_said_before_anything_begins(tmp_path, monkeypatch, name):
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda library, *more: None if library == name else found(library, *more))
    with pytest.raises(ConfigError, match=rf"loggers\.{name} .*pip install 'rscli\[{name}\]'"):
        run(tmp_path / "run", f"loggers.{name}={{}}")
    assert not (tmp_path / "run").exists()


def test_a_library_that_does_not_load_is_an_error_too(tmp_path, monkeypatch):
    stub(monkeypatch, "wandb")
    logger = installed().build("loggers", {"name": "wandb"})
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
    with pytest.raises(InputError, match=r"pip install 'rscli\[wandb\]'"):
        logger.open(SimpleNamespace(folder=tmp_path, epoch=0, batch=0))
    assert not list(tmp_path.iterdir())


def test_bad_fields_are_refused(monkeypatch, library):
    stub(monkeypatch, library)
    for fields in ({"every": -1}, {"project": ""}, {"mode": "sometimes"}):
        with pytest.raises(ValidationError):
            installed().build("loggers", {"name": library, **fields})


# --- TensorBoard, for real ----------------------------------------------------------------------------------------------------


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard reads from the event files: the values of each curve by their places."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_back_what_the_log_says(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path / "run", "loggers.tensorboard={}")
    found, said = curves(tmp_path / "run/tensorboard"), lines(tmp_path / "run")
    assert found["epoch/loss"] == pytest.approx({3: said[0]["loss"], 6: said[1]["loss"]}, rel=1e-6)
    assert found["epoch/accuracy"] == pytest.approx({3: said[0]["accuracy"], 6: said[1]["accuracy"]}, rel=1e-6)
    assert list(found["step/ce"]) == [1, 2, 3, 4, 5, 6]
    weights = [480, 480, 477]  # images of the batches: the epoch's loss is the mean over images
    mean = sum(w * found["step/loss"][k] for w, k in zip(weights, (1, 2, 3), strict=True)) / 1437
    assert mean == pytest.approx(said[0]["loss"], rel=1e-5)
    (file,) = (tmp_path / "run/tensorboard").iterdir()
    assert b'"name": "digits"' in file.read_bytes()


def test_tensorboard_hides_what_was_trained_after_the_checkpoint_of_a_killed_run(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path / "whole", "loggers.tensorboard={}")

    class Killed(Silent):
        left = 5

        def update(self, done: int, figures: dict[str, str]) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    options = TrainOptions(out=tmp_path / "run", data_dir=tmp_path, device="cpu", workers=0)
    with pytest.raises(KeyboardInterrupt):
        train(resolve(sets=[*SETS, "loggers.tensorboard={}"]), options, Killed())
    run(tmp_path / "run", "loggers.tensorboard={}", resume=True)
    whole, resumed = curves(tmp_path / "whole/tensorboard"), curves(tmp_path / "run/tensorboard")
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 2
    for tag in ("epoch/loss", "step/loss", "step/ce", "epoch"):
        assert resumed[tag] == whole[tag]
