"""A preset of ImageNet as its user runs it, under torchrun: from a folder of JPEGs to an answer with a class name."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images

from launcher import ENVIRONMENT, ended, ours, started, torchrun, wait_for
from rscli.models.modelfile import load_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix" or shutil.which("pgrep") is None, reason="signals and processes as POSIX has them"),
]
CLASSES = ("n01440764", "n02123045", "n03394916")
IMAGES = {"train": 8, "val": 4}
SIZES = ((500, 375), (375, 500), (500, 333))
PRESET = ["train", "--preset", "imagenet-cons-0.5", "--set", "batch=8", "--set", "data.classes=3", "--device", "cpu"]
SMALL = ["--set", "arch.name=timm/test_resnet", "--set", "optimizer.lr=0.001", "--set", "epochs=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with imagenet/{train,val}/WNID/*.JPEG: parts of two photographs, upright and grey ones among them."""
    root, source = tmp_path_factory.mktemp("data"), random.Random(0)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for split, count in IMAGES.items():
        for label, name in enumerate(CLASSES):
            folder = root / "imagenet" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                part = _part(photographs[label % 2], source)
                part.convert("L" if label == 2 else "RGB").save(folder / f"{name}_{number}.JPEG", quality=92)
    return root


def _part(photograph: Image.Image, source: random.Random) -> Image.Image:
    width, height = source.choice(SIZES)
    scale = max(1.0, height / photograph.height)
    whole = photograph.resize((round(photograph.width * scale), round(photograph.height * scale)))
    left, top = source.randint(0, whole.width - width), source.randint(0, whole.height - height)
    return whole.crop((left, top, left + width, top + height))


def rscli(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rscli", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def stopped(words: list[object], cwd: Path, folder: Path) -> None:
    """Trains in two processes, and asks them to stop in the middle of the first epoch."""
    with started(2, *words, cwd=cwd) as process:
        wait_for((folder / "config.json").exists, process)  # before the first batch is there
        process.terminate()
        done = ended(process)
    said = ours(done.stderr)
    assert any(line.startswith("stopped as asked, at epoch 1, batch ") for line in said), done.stderr
    assert said[-1].startswith(("The same command with --resume goes on", "train "))
    assert not (folder / "model.safetensors").exists()


def test_the_preset_runs_from_jpegs_to_a_named_answer(data, tmp_path):
    """ResNet-50 at 224x224: trained, stopped, resumed, certified on every sixth image, asked what a photograph shows."""
    run = tmp_path / "run"
    words = [*PRESET, "--set", "epochs=1", "--workers", "1", "--data-dir", data, "--out", "run"]
    stopped(words, tmp_path, run)
    resumed = torchrun(2, *words, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    said = ours(resumed.stderr)
    assert sum(line.startswith("resumed after epoch 0, batch ") for line in said) == 1
    assert said[-1] == "model: run/model.safetensors"
    model = load_model(run / "model.safetensors")
    assert (model.class_names, model.shape) == (CLASSES, (3, 224, 224))

    certified = rscli(
        "certify", "run", "--skip", 6, "--n", 24, "--n0", 8, "--batch", 16, "--data-dir", data, "--json", cwd=tmp_path
    )
    assert json.loads(certified.stdout)["images"] == 2
    rows = [line.split("\t") for line in (run / "results.tsv").read_text().splitlines()]
    assert [row[:2] for row in rows[1:]] == [["0", "0"], ["6", "1"]], "every sixth image of val/, class by class"

    photograph = data / "imagenet/val" / CLASSES[1] / f"{CLASSES[1]}_0.JPEG"
    answer = rscli("predict", "run", photograph, "--n", 24, "--batch", 8, "--alpha", 0.5, "--json", cwd=tmp_path)
    assert json.loads(answer.stdout)["class"] in CLASSES


def test_stopped_and_resumed_the_weights_are_those_of_an_undisturbed_run(data, tmp_path):
    """With a small network: to the last bit of one in as many processes, and of one process as far as float32 lets it."""
    words = [*PRESET, *SMALL, "--data-dir", data, "--out"]
    stopped([*words, "stopped", "--workers", "1"], tmp_path, tmp_path / "stopped")
    for folder, more in (("stopped", ["--workers", "1", "--resume"]), ("whole", ["--workers", "0"])):
        done = torchrun(2, *words, folder, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    rscli(*words, "alone", "--workers", "1", cwd=tmp_path)
    ours_, whole, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole", "alone"))
    assert all(ours_[name].equal(whole[name]) for name in whole)
    assert all(whole[name].allclose(alone[name], rtol=1e-3, atol=1e-4) for name in alone)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("stopped", "alone")
    ]
    assert [line["loss"] for line in logs[0]] == pytest.approx([line["loss"] for line in logs[1]], rel=1e-4)
