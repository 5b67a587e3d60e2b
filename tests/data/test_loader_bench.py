"""bench/loader.py: that it measures what it says; its figures are for a quiet machine to tell."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

PATH = Path(__file__).resolve().parents[2] / "bench" / "loader.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_loader", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photos(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    bench.make(folder, 20)
    return folder


def test_the_folder_holds_real_size_photographs_in_ten_classes(photos):
    files = sorted(photos.rglob("*.jpg"))
    assert len(files) == 20
    assert len({file.parent.name for file in files}) == 10
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert 400 <= image.width <= 600
            assert 300 <= image.height <= 450
        assert file.stat().st_size > 15_000  # no flat surface, which is decoded too fast
    assert len({file.read_bytes() for file in files}) == 20


def test_the_loader_and_the_steps_are_those_of_training(bench, photos):
    resolved = bench.settings(
        photos, "cifar-resnet", 32, 8, ["loss.name=consistency", "loss.lbd=1", "loss.m=2", "data.cache=files"]
    )
    assert (resolved.loss.m, resolved.config.batch) == (2, 8)
    spec = bench.spec_of(resolved.dataset, Path())
    assert spec.augmentation.resized_crop
    split = bench.open_split(resolved.dataset, spec, "train", Path())
    read = bench.loader_batches(split, resolved, CPU)
    assert [next(read) for _ in range(5)] == [8, 8, 4, 8, 8]  # on into the next epoch
    read.close()
    batches = split.batches(seed=0, epoch=0, batch=8, device="cpu")
    repeated = bench.Repeated(split, next(batches))
    trained = bench.trained_batches(bench.Trainer(resolved, spec, repeated, CPU, channels_last=None))
    assert sum(next(trained) for _ in range(2)) >= 16
    assert repeated.fingerprint() == split.fingerprint()
    assert {way: taken > 0 for way, taken in bench.decoding(split, 3).items()} == dict.fromkeys(
        ["whole, Pillow", "crop, Pillow", "crop, as training reads"], True
    )


def test_a_rate_is_images_over_seconds_without_the_first_batch(bench, monkeypatch):
    clock = iter([100.0, 100.0, 101.0, 102.0, 104.0, 104.0])  # began; three looks; one more that ends it; the end
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.rate(iter([1000, 5, 5, 10]), 3.0, CPU) == 20 / 4


def test_the_verdict_names_the_slower_one(bench):
    assert "the loader is the limit: about 9 workers" in bench.verdict({"loader": 100.0, "network": 200.0}, 4)
    assert "the network is the limit: the loader could feed 2.5" in bench.verdict({"loader": 500.0, "network": 200.0}, 4)


@pytest.mark.slow
def test_it_runs(bench, tmp_path):
    import typer

    app = typer.Typer()
    app.command()(bench.main)
    words = [str(tmp_path / "p"), "--make", "20", "--network", "timm/resnet10t", "--size", "32", "--batch", "4"]
    done = CliRunner().invoke(app, [*words, "--workers", "1", "--seconds", "0.1", "--rounds", "1", "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["images_per_s"].keys() == {"loader", "network", "both"}
    assert all(speed > 0 for speed in found["images_per_s"].values())
    assert "is the limit" in found["verdict"]
