"""Training images that a run sets aside: which they are, that nothing else changes, and that everybody means the same ones."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from rscli.api import DataSpec, Transform
from rscli.cli.app import app
from rscli.config.layers import rebuild, resolve
from rscli.data.splits import FileSplit, MemorySplit, Split, open_split, set_aside, spec_of
from rscli.data.subset import limited
from rscli.errors import ConfigError, InputError, Stopped
from rscli.models.modelfile import load_model
from rscli.results.reader import read_results
from rscli.runtime.progress import Silent
from rscli.training import train as training
from rscli.training.train import TrainOptions, outlook, train
from rscli.training.trainer import Trainer

SPEC = DataSpec(class_names=("a", "b", "c"), shape=(1, 2, 2), test_transform=Transform(channels=1, crop=(2, 2)))


def digits(*sets: str):
    return resolve("digits-gaussian-0.25", sets=["epochs=1", "batch=256", *sets])


def options(folder: Path, **changes) -> TrainOptions:
    return TrainOptions(out=folder / "run", data_dir=folder, device="cpu", workers=0, **changes)


def digits_split(folder: Path) -> Split:
    dataset = digits().dataset
    return open_split(dataset, spec_of(dataset, folder), "train", folder)


def memory_split(count: int = 30, **more) -> MemorySplit:
    """Image i is filled with i, its label is i % 3."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 1, 2, 2))
    return MemorySplit(images, np.arange(count) % 3, SPEC, **more)


def file_split(folder: Path, count: int = 30) -> FileSplit:
    paths = [folder / f"{i}.png" for i in range(count)]
    for value, path in enumerate(paths):
        Image.fromarray(np.full((2, 2), value, np.uint8)).save(path)
    return FileSplit(paths, np.arange(count) % 3, SPEC)


def numbers(split: Split) -> list[int]:
    """What the images of a split made by this file are filled with."""
    return [round(split.image(i)[0, 0, 0].item() * 255) for i in range(len(split))]


@pytest.fixture(params=["memory", "cached", "files"])
def split(request, tmp_path) -> Split:
    if request.param == "files":
        return file_split(tmp_path)
    return memory_split(fingerprint="of the files" if request.param == "cached" else None)


def test_every_image_is_on_one_side_with_its_label(split):
    left, held = set_aside(split, 8, seed=3)
    assert (len(left), len(held)) == (22, 8)
    assert numbers(left) == sorted(numbers(left))
    assert sorted(numbers(left) + numbers(held)) == list(range(30))
    for side in (left, held):
        assert side.labels.tolist() == [number % 3 for number in numbers(side)]
    (indices, images) = next(iter(held.in_order(100)))
    assert indices.tolist() == list(range(8))
    assert [round(image[0, 0, 0].item() * 255) for image in images] == numbers(held)
    seen = list(left.batches(seed=0, epoch=0, batch=5, device="cpu"))
    assert sorted(round(image[0, 0, 0].item() * 255) for batch in seen for image in batch.images) == numbers(left)


def test_the_seed_alone_chooses_and_the_fingerprint_tells(split):
    left, held = set_aside(split, 8, seed=3)
    again, other = set_aside(split, 8, seed=3), set_aside(split, 8, seed=4)
    assert numbers(again[1]) == numbers(held)
    assert numbers(other[1]) != numbers(held)
    assert numbers(set_aside(split, 9, seed=3)[1])[:8] == numbers(held)  # more of the same, not others
    assert (again[0].fingerprint(), again[0].content()) == (left.fingerprint(), left.content())
    prints = [side.fingerprint() for side in (split, left, held, *other)]
    assert len(set(prints)) == len(prints)


def test_held_out_images_come_in_random_order():
    """With images sorted by class, the first of them must not all be of the first class."""
    sorted_by_class = MemorySplit(np.zeros((300, 1, 2, 2), np.uint8), np.arange(300) // 100, SPEC)
    counts = np.bincount(set_aside(sorted_by_class, 200, 0)[1].labels[:60], minlength=3)
    assert counts.min() >= 10  # expected 20 each; 10 is three standard deviations away


@pytest.mark.parametrize("count", [30, 31, 10**6])
def test_something_must_be_left_to_train_on(split, count):
    with pytest.raises(InputError, match=r"holdout is [\d,]+, but there are only 30 training images"):
        set_aside(split, count, 0)


def test_a_run_trains_on_what_is_left_and_its_checkpoint_knows(tmp_path):
    whole = digits_split(tmp_path)
    left, held = set_aside(whole, 200, seed=0)
    resolved = digits("holdout=200")
    made = Trainer(resolved, left.spec, left, torch.device("cpu"), channels_last=None)
    for _ in made.epoch_batches():
        pass
    assert made.meter.images == 1237
    train(resolved, options(tmp_path), Silent())
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert (state["data"]["images"], state["data"]["fingerprint"]) == (1237, left.fingerprint())
    trained = load_model(tmp_path / "run/model.safetensors")
    assert all(torch.equal(value, trained.network.state_dict()[name]) for name, value in made.classifier.state_dict().items())
    pixels = {whole.image(i).numpy().tobytes() for i in range(len(whole))}
    assert {held.image(i).numpy().tobytes() for i in range(len(held))} <= pixels


def test_without_a_holdout_the_split_is_the_data_sets_own(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "set_aside", None)  # calling it would fail
    train(digits(), options(tmp_path), Silent())
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    whole = digits_split(tmp_path)
    assert (state["data"]["images"], state["data"]["fingerprint"]) == (1437, whole.fingerprint())


def test_the_outlook_counts_what_is_left(tmp_path):
    seen = outlook(digits("holdout=200"), options(tmp_path))
    assert (seen.images, seen.steps_per_epoch) == (1237, 5)
    for start in (outlook, lambda *given: train(*given, Silent())):
        with pytest.raises(InputError, match="holdout is 1,437, but there are only 1,437 training images"):
            start(digits("holdout=1437"), options(tmp_path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("word", "rule"), [("-1", "greater than or equal to 0"), ("0.5", "must be a valid integer")])
def test_a_holdout_is_a_number_of_images(word, rule):
    with pytest.raises(ConfigError, match=f"holdout = {word}.*{rule}"):
        digits(f"holdout={word}")


@pytest.mark.parametrize("callback", ["probe", "validate"])
def test_what_looks_at_held_out_images_needs_some(callback):
    with pytest.raises(ConfigError, match=rf"holdout: must be above 0: callbacks\.{callback} looks at images set aside"):
        digits(f"callbacks.{callback}={{}}")


class Stopping(Silent):
    """Asks to stop after so many batches."""

    def __init__(self, after: int) -> None:
        self.left = after

    def update(self, done: int, figures: dict[str, str]) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_with_another_holdout_is_not_resumed(tmp_path):
    with pytest.raises(Stopped):
        train(digits("holdout=200"), options(tmp_path), Stopping(2))
    with pytest.raises(InputError, match=r"holdout: 200 in .*, 100 now"):
        train(digits("holdout=100"), options(tmp_path, resume=True), Silent())
    train(digits("holdout=200"), options(tmp_path, resume=True), Silent())
    assert (tmp_path / "run/model.safetensors").exists()


def test_a_run_from_before_there_was_a_holdout_is_resumed(tmp_path):
    with pytest.raises(Stopped):
        train(digits(), options(tmp_path), Stopping(2))
    path = tmp_path / "run/config.json"
    record = json.loads(path.read_text())
    for key in ("holdout", "ramps"):
        record["config"].pop(key)
        record["sources"].pop(key, None)
    record["config"]["callbacks"].pop("collapse")
    path.write_text(json.dumps(record))
    train(digits(), options(tmp_path, resume=True), Silent())
    assert (tmp_path / "run/model.safetensors").exists()


def test_a_saved_configuration_keeps_its_holdout():
    assert rebuild(digits("holdout=7").as_dict()).config.holdout == 7


def certify(folder: Path, *words: str):
    line = ["certify", folder / "run", "--n", 100, "--split", "holdout", "--out", folder / "r.tsv", "-q", *words]
    return CliRunner().invoke(app, [*map(str, line)])


def test_certify_takes_the_images_that_the_run_has_set_aside(tmp_path):
    train(digits("holdout=20", "seed=5"), options(tmp_path), Silent())
    answer = certify(tmp_path)
    assert answer.exit_code == 0, answer.output
    found = read_results(tmp_path / "r.tsv")
    held = set_aside(digits_split(tmp_path), 20, seed=5)[1]
    assert found.idx.tolist() == list(range(20))
    assert found.label.tolist() == held.labels.tolist()
    protocol = json.loads((tmp_path / "r.tsv.protocol.json").read_text())
    assert (protocol["split"], protocol["data_sha256"]) == ("holdout", held.fingerprint())


def test_certify_takes_them_from_the_images_that_the_run_is_limited_to(tmp_path):
    train(digits("holdout=20", "limit=100"), options(tmp_path), Silent())
    answer = certify(tmp_path, "--max", "5")
    assert answer.exit_code == 0, answer.output
    left, held = set_aside(limited(digits_split(tmp_path), 100), 20, seed=0)
    assert len(left) == 80
    assert json.loads((tmp_path / "r.tsv.protocol.json").read_text())["data_sha256"] == held.fingerprint()


def test_certify_says_that_a_model_has_set_nothing_aside(tmp_path):
    train(digits(), options(tmp_path), Silent())
    answer = certify(tmp_path)
    assert answer.exit_code == 2
    assert "holdout" in answer.output
    assert not (tmp_path / "r.tsv").exists()
