"""What looks at a run while it trains: the probe, validation, the best model, collapse; and checkpoints within an epoch."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rscli.cli.app import app
from rscli.config.layers import resolve
from rscli.data.splits import open_split, set_aside, spec_of
from rscli.errors import ConfigError, InputError, PluginError, Stopped
from rscli.models.modelfile import load_model
from rscli.results.reader import read_results
from rscli.runtime.progress import Silent
from rscli.training.run_folder import RunFolder
from rscli.training.train import TrainOptions, train
from rscli_core.callbacks._held_out import mean_figures
from rscli_core.callbacks.best import Best
from rscli_core.callbacks.checkpoint import Checkpoint
from rscli_core.callbacks.collapse import Collapse
from rscli_core.callbacks.probe import Probe

QUICK = ["callbacks.probe.images=40", "callbacks.probe.every=1", "callbacks.probe.n=400"]


def digits(*sets: str):
    base = ["epochs=2", "batch=256", "holdout=100", "optimizer.lr=0.1", "schedule.milestones=[]"]
    return resolve("digits-gaussian-0.25", sets=[*base, *sets])


def options(folder: Path, **changes) -> TrainOptions:
    return TrainOptions(out=folder / "run", data_dir=folder, device="cpu", workers=0, **changes)


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("seconds") and k != "images_per_s"} for line in lines]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_model(path).network.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


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


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    train(digits(), options(folder), Silent())
    return folder


# --- the probe ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ([], ["--labels", "--certifier", "sequential", "--radii", "0,0.25,0.5"]),
        (["label=false", "radii=0.1,0.3"], ["--certifier", "sequential", "--radii", "0.1,0.3"]),
        (["certifier=cohen", "n0=20", "label=false", "radii=0.1,0.3"], ["--n0", "20"]),
    ],
    ids=["labels", "chosen", "fixed-n"],
)
def test_the_probe_says_what_certify_says_of_the_same_images(tmp_path, sets, words):
    """Exactly: the same seed and certifier draw the same noise for the same images."""
    trained = digits(
        "batch=32", "optimizer.lr=0.02", *QUICK, "callbacks.probe.every=5", *(f"callbacks.probe.{text}" for text in sets)
    )
    train(trained, options(tmp_path), Silent())
    line = metrics(tmp_path)[-1]
    rows = tmp_path / "r.tsv"
    given = ["certify", tmp_path / "run", "--split", "holdout", "--max", 40, "--n", 400, "--out", rows, "-q", *words]
    answer = CliRunner().invoke(app, [*map(str, given)])
    assert answer.exit_code == 0, answer.output
    found = read_results(rows)
    radii = [float(name.removeprefix("certified_")) for name in line if name.startswith("certified_") and name[-2:] != "se"]
    assert radii == ([0, 0.25, 0.5] if not sets else [0.1, 0.3])
    for radius in radii:
        share = np.mean(found.correct & (found.radius >= radius))
        assert line[f"certified_{radius:g}"] == share
        assert line[f"certified_{radius:g}_se"] == pytest.approx(math.sqrt(share * (1 - share) / 40))
    assert 0.2 < line[f"certified_{radii[0]:g}"] < 1  # something to compare
    samples = sum(int(cells[6]) + int(cells[7]) for cells in (row.split("\t") for row in rows.read_text().splitlines()[1:]))
    assert line["probe_samples"] == samples + 4 * 40


def test_looking_changes_no_bit_of_the_run(plain, tmp_path):
    watched = digits(*QUICK, "callbacks.validate={}", "callbacks.best.figure=certified_0")
    train(watched, options(tmp_path), Silent())
    assert same(weights(tmp_path / "run/model.safetensors"), weights(plain / "run/model.safetensors"))
    for line, before in zip(metrics(tmp_path), metrics(plain), strict=True):
        assert {name: line[name] for name in before} == before


@pytest.mark.parametrize(("every", "probed"), [(1, [1, 2, 3]), (2, [2, 3]), (5, [3])])
def test_it_probes_every_so_many_epochs_and_the_last(tmp_path, every, probed):
    train(digits("epochs=3", *QUICK, "callbacks.probe.images=2", f"callbacks.probe.every={every}"), options(tmp_path), Silent())
    assert [line["epoch"] for line in metrics(tmp_path) if "certified_0" in line] == probed


@pytest.mark.parametrize(
    ("sets", "images"),
    [(["images=1000"], 100), (["images=30"], 30), (["samples=5049"], 10), (["n=800", "samples=5049"], 5), (["samples=504"], 1)],
)
def test_it_takes_no_more_images_and_samples_than_it_may(tmp_path, sets, images):
    given = digits("epochs=1", *QUICK, "callbacks.probe.images=1000", *(f"callbacks.probe.{text}" for text in sets))
    train(given, options(tmp_path), Silent())
    (line,) = metrics(tmp_path)
    assert line["probe_images"] == images
    assert line["probe_samples"] <= given.callbacks["probe"].samples


def test_what_cannot_be_probed_is_said_before_the_first_step_and_corrected_with_resume(tmp_path):
    with pytest.raises(InputError, match=r"callbacks\.probe cannot certify the radius 0\.5: n = 200 samples"):
        train(digits(*QUICK, "callbacks.probe.n=200"), options(tmp_path), Silent())  # 0.001 ** (1/200) is below Phi(2)
    for wrong, said in (
        ("samples=503", r"samples = 503 is less than one image may take \(504\)"),
        ("certifier=none", "'none'"),
    ):
        with pytest.raises((InputError, PluginError), match=said):
            train(digits(*QUICK, f"callbacks.probe.{wrong}"), options(tmp_path, resume=True), Silent())
    assert not (tmp_path / "run/checkpoint.pt").exists()
    train(digits(*QUICK), options(tmp_path, resume=True), Silent())
    assert "certified_0.5" in metrics(tmp_path)[0]


@pytest.mark.parametrize("radii", ["0.5,0.25", "0.5,0.5", "-1,0"])
def test_radii_increase(radii):
    with pytest.raises(ConfigError, match="must be increasing radii, the first 0 or more"):
        digits(f"callbacks.probe.radii={radii}")


def test_the_usual_radii_follow_sigma():
    assert Probe()._radii(SimpleNamespace(noise=SimpleNamespace(sigma=0.25))) == (0, 0.25, 0.5)


# --- validation --------------------------------------------------------------------------------------------------------------


def test_validation_agrees_with_the_accuracy_of_the_model_file(tmp_path):
    train(digits("callbacks.validate.copies=5", "callbacks.validate.images=90"), options(tmp_path), Silent())
    line = metrics(tmp_path)[-1]
    dataset = digits().dataset
    held = set_aside(open_split(dataset, spec_of(dataset, tmp_path), "train", tmp_path), 100, 0)[1]
    images, labels = torch.stack([held.image(i) for i in range(90)]), torch.from_numpy(held.labels[:90])
    network = load_model(tmp_path / "run/model.safetensors").network.eval()
    with torch.no_grad():
        right = network(images).argmax(-1) == labels
        noise = torch.randn(100, *images.shape, generator=torch.Generator().manual_seed(1)) * 0.25
        noisy = torch.stack([(network(images + one).argmax(-1) == labels).float() for one in noise]).mean(0)
    p = right.float().mean().item()
    assert line["holdout_clean"] == pytest.approx(p, abs=1e-6)
    assert line["holdout_clean_se"] == pytest.approx(math.sqrt(p * (1 - p) / 90), abs=1e-6)
    drawn = math.sqrt((noisy * (1 - noisy)).sum().item() * (1 / 5 + 1 / 100)) / 90  # of both Monte Carlo means
    assert line["holdout_noisy"] == pytest.approx(noisy.mean().item(), abs=4 * drawn)
    assert "holdout_clean" in metrics(tmp_path)[0]


def test_the_standard_error_of_a_mean():
    """Of 0 and 1, sqrt(p (1 - p) / k); of any values, their standard deviation over sqrt(k)."""
    assert mean_figures("x", [1, 0, 0, 0]) == {"x": 0.25, "x_se": pytest.approx(math.sqrt(0.25 * 0.75 / 4))}
    values = [0.2, 0.9, 0.4]
    assert mean_figures("x", values) == {"x": pytest.approx(0.5), "x_se": pytest.approx(np.std(values) / math.sqrt(3))}


# --- the best model ----------------------------------------------------------------------------------------------------------

FALLS = ["epochs=3", "schedule.milestones=[2]", "callbacks.best.figure=lr"]
"""The learning rate is largest, for the first time, in epoch 1."""


def test_the_best_model_is_that_of_its_epoch(plain, tmp_path):
    said = Noting()
    train(digits(*FALLS, "callbacks.best.mode=min"), options(tmp_path / "min"), said)
    train(digits(*FALLS), options(tmp_path / "max"), Silent())
    assert [line["best_epoch"] for line in metrics(tmp_path / "min")] == [1, 1, 3]
    assert [line["best_epoch"] for line in metrics(tmp_path / "max")] == [1, 1, 1]
    least = tmp_path / "min/run/model-best.safetensors"
    assert same(weights(least), weights(tmp_path / "min/run/model.safetensors"))
    assert f"best: {least}, of epoch 3: lr 0.01" in said.notes
    train(digits("epochs=1"), options(tmp_path / "one"), Silent())
    best = tmp_path / "max/run/model-best.safetensors"
    assert same(weights(best), weights(tmp_path / "one/run/model.safetensors"))
    assert not same(weights(best), weights(tmp_path / "max/run/model.safetensors"))
    assert load_model(best).source.card.epochs == 1
    assert load_model(tmp_path / "max/run/model.safetensors").source.card.epochs == 3
    assert len([*(tmp_path / "max/run").glob("*.safetensors")]) == 2


def test_the_best_model_survives_a_stop(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(digits(*FALLS), options(whole), Silent())
    with pytest.raises(Stopped):
        train(digits(*FALLS), options(cut), Noting(8))
    train(digits(*FALLS), options(cut, resume=True), Silent())
    assert metrics(cut) == metrics(whole)
    for name in ("model-best", "model"):
        assert (cut / f"run/{name}.safetensors").read_bytes() == (whole / f"run/{name}.safetensors").read_bytes()


def test_a_figure_that_is_not_there_is_said_once(tmp_path):
    said = Noting()
    train(digits("callbacks.best.figure=certifed_0.5"), options(tmp_path), said)
    (note,) = [note for note in said.notes if "certifed_0.5" in note]
    assert note.endswith("it has: epoch, lr, loss, ce, accuracy")
    assert not (tmp_path / "run/model-best.safetensors").exists()


def follow(values: list, **fields) -> list[bool | None]:
    watcher, state = Best(figure="x", **fields), {}
    run = SimpleNamespace(epoch=0, note=lambda text: None)
    found = []
    for value in values:
        run.epoch, run.figures = run.epoch + 1, {} if value is None else {"x": value}
        found.append(watcher.better(run, state))
    return found


@pytest.mark.parametrize(
    ("values", "fields", "better"),
    [
        ([0.5, 0.6, 0.6, 0.5, 0.7], {}, [True, True, False, False, True]),
        ([0.5, 0.4, 0.4, 0.3], {"mode": "min"}, [True, True, False, True]),
        ([0.5, 0.55, 0.59, 0.75], {"min_delta": 0.1}, [True, False, False, True]),
        ([0.5, 0.45, 0.3], {"mode": "min", "min_delta": 0.1}, [True, False, True]),
        ([None, 0.5, None, 0.6], {}, [None, True, None, True]),
        ([math.nan, 0.5, math.nan, math.inf, 0.6], {}, [False, True, False, False, True]),
        (["text"], {}, [None]),
    ],
)
def test_what_is_better(values, fields, better):
    assert follow(values, **fields) == better


@pytest.mark.parametrize("name", ["../best", "", "a/b", "x" * 101])
def test_a_model_file_stays_in_the_run_folder(name):
    with pytest.raises(ConfigError, match=r"callbacks\.best\.file"):
        digits("callbacks.best.figure=loss", f'callbacks.best.file="{name}"')


# --- collapse ----------------------------------------------------------------------------------------------------------------

HEAVY = ["epochs=3", "batch=128", "noise.sigma=1.0", "optimizer.lr=0.05"]


@pytest.mark.parametrize(("lbd", "collapses"), [(1000, True), (5, False)])
def test_a_collapse_is_said_once_and_nothing_else_is(tmp_path, lbd, collapses):
    said = Noting()
    train(resolve("digits-cons-0.25", sets=[*HEAVY, f"loss.lbd={lbd}"]), options(tmp_path), said)
    notes = [note for note in said.notes if "collapsed" in note]
    assert len(notes) == collapses
    last = metrics(tmp_path)[-1]
    assert (last["accuracy"] < 0.12) == collapses
    if collapses:
        assert "after epoch 3 the accuracy under noise is at chance (1" in notes[0]
        assert "kl has fallen from 0.0" in notes[0]


def judged(epochs: list[dict], labels=tuple(range(10)) * 100, **fields) -> list[int]:
    """The epochs in which a collapse is said."""
    notes, state = [], {}
    run = SimpleNamespace(epoch=0, note=lambda text: notes.append(run.epoch), labels=lambda split: np.array(labels))
    for figures in epochs:
        run.epoch, run.figures = run.epoch + 1, {"lr": 1, "loss": sum(figures.values()), **figures}
        Collapse(**fields).after_epoch(run, state)
    return notes


def epoch(accuracy: float, kl: float, **more: float) -> dict:
    return {"ce": 2.3, "kl": kl, **more, "accuracy": accuracy}


@pytest.mark.parametrize(
    ("epochs", "fields", "said"),
    [
        ([epoch(0.9, 1.0), epoch(0.1, 0.4), epoch(0.1, 0.4), epoch(0.1, 0.1)], {}, [3]),
        ([epoch(0.9, 1.0), epoch(0.1, 0.4)], {"patience": 1}, [2]),
        ([epoch(0.1, 0.01), epoch(0.1, 0.02), epoch(0.1, 0.04), epoch(0.3, 0.1)], {}, []),  # learns slowly: kl rises
        ([epoch(0.9, 1.0), epoch(0.9, 0.1), epoch(0.9, 0.01)], {}, []),  # learns well
        ([epoch(0.9, 1.0), epoch(0.1, 0.4), epoch(0.5, 0.4), epoch(0.1, 0.4)], {}, []),  # not in a row
        ([epoch(0.9, 1.0), epoch(0.128, 0.4), epoch(0.128, 0.4)], {}, [3]),  # 0.1 + 3 sqrt(0.09 / 1000) = 0.1285
        ([epoch(0.9, 1.0), epoch(0.129, 0.4), epoch(0.129, 0.4)], {}, []),
        ([epoch(0.1, 0.5, entropy=1.0), epoch(0.1, 0.5, entropy=0.4), epoch(0.1, 0.5, entropy=0.4)], {}, [3]),
        ([{"ce": 1.0, "accuracy": 0.9}, {"ce": 0.1, "accuracy": 0.1}, {"ce": 0.1, "accuracy": 0.1}], {}, []),  # no regulariser
        ([{"ce": 1.0, "kl": 1.0}, {"ce": 0.1, "kl": 0.1}, {"ce": 0.1, "kl": 0.1}], {}, []),  # no accuracy
    ],
)
def test_what_a_collapse_is(epochs, fields, said):
    assert judged(epochs, **fields) == said


def test_chance_is_the_share_of_the_most_frequent_class():
    answers = [epoch(0.9, 1.0), epoch(0.6, 0.1), epoch(0.6, 0.1)]
    assert judged(answers, labels=[0] * 600 + [1] * 400) == [3]
    assert judged(answers, labels=[0] * 500 + [1] * 500) == []


def test_it_is_on_unless_it_is_left_out():
    assert set(digits().callbacks) == {"checkpoint", "collapse"}
    assert set(digits("callbacks.collapse=none").callbacks) == {"checkpoint"}
    assert digits("callbacks.collapse.patience=5").callbacks["collapse"].patience == 5


# --- what docs/probe.md says -------------------------------------------------------------------------------------------------


def test_the_commands_of_the_page_resolve(tmp_path):
    page = (Path(__file__).parents[2] / "docs/probe.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^    rscli train (.+)$", page, re.M)
    assert len(commands) > 5
    for words in map(str.split, commands):
        sets = [value for flag, value in pairwise(words) if flag == "--set"]
        resolve(words[words.index("--preset") + 1], sets=sets)
    file = tmp_path / "ramps.toml"
    file.write_text(*re.findall(r"^```toml\n(.+?)^```", page, re.M | re.S))
    assert resolve("mnist-cons-0.5", file).config.ramps["loss"]["lbd"].wait == 5
    fields = set(re.findall(r"callbacks\.([\w-]+)", page))
    assert fields == {"best", "checkpoint", "collapse", "early-stopping", "ema", "probe", "validate"}


# --- checkpoints within an epoch ---------------------------------------------------------------------------------------------


def saved(folder: Path, monkeypatch, *sets: str) -> list[tuple[int, int]]:
    """Epoch and batch of every checkpoint of a run of two epochs with six batches each."""
    places = []
    monkeypatch.setattr(RunFolder, "save", lambda self, state: places.append((state["epoch"], state["batch"])))
    train(digits("holdout=0", *sets), options(folder), Silent())
    return places


@pytest.mark.parametrize(
    ("sets", "places"),
    [
        ([], [(1, 0), (2, 0)]),
        (["steps=4"], [(0, 4), (1, 0), (1, 4), (2, 0)]),  # the end of an epoch counts, too
        (["steps=4", "every=2"], [(0, 4), (1, 2), (2, 0)]),
        (["steps=100"], [(1, 0), (2, 0)]),
        (["minutes=1000"], [(1, 0), (2, 0)]),
        (["minutes=1e-9"], [*((0, b) for b in range(1, 6)), (1, 0), *((1, b) for b in range(1, 6)), (2, 0)]),
    ],
    ids=str,
)
def test_when_a_run_is_saved(tmp_path, monkeypatch, sets, places):
    assert saved(tmp_path, monkeypatch, *(f"callbacks.checkpoint.{text}" for text in sets)) == places


def test_a_step_is_one_of_the_optimiser(tmp_path, monkeypatch):
    """Two chunks a batch are two steps."""
    more = ["loss.name=consistency", "loss.lbd=1", "callbacks.checkpoint.steps=4", "epochs=1"]
    assert saved(tmp_path, monkeypatch, *more) == [(0, 2), (0, 4), (1, 0)]


def test_minutes_count_from_the_last_checkpoint(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    saves = []
    run, callback = SimpleNamespace(epoch=1, epochs=9, save=lambda: saves.append(now[0])), Checkpoint(every=5, minutes=2)
    callback.begin(run, {})
    for second in (60, 119, 120, 180, 240, 241):
        now[0] = float(second)
        callback.after_step(run, {})
    assert saves == [120, 240]
