"""Training that is killed again and again ends with the weights of training that is not."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from trainees import run

PRESET = "digits-cons-0.25"
SETS = ["epochs=3", "batch=100", "arch.name=cifar-resnet", "arch.depth=8", "loss.lbd=5", "data.name=digits"]
MODEL = "model.safetensors"


def same(one: Path, other: Path) -> bool:
    ours, theirs = load_file(one / MODEL), load_file(other / MODEL)
    return all(ours[name].equal(theirs[name]) for name in ours)


def lines(folder: Path) -> list[dict[str, float]]:
    """The log, without what the clock says."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "images_per_s")} for line in read]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_training_ends_with_the_same_weights(tmp_path, world):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    assert run(PRESET, SETS, whole, world) == [0] * world
    seconds = time.monotonic() - began
    source, kills = random.Random(world), 0
    while not (killed / MODEL).exists() and kills < 15:
        codes = run(PRESET, SETS, killed, world, kill_after=source.uniform(0.1, 0.6) * seconds)
        kills += any(codes)
    if not (killed / MODEL).exists():
        assert run(PRESET, SETS, killed, world) == [0] * world
    assert kills
    assert same(whole, killed)
    assert lines(whole) == lines(killed)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """Two epochs on two processes, then one on three: what one process computes, as far as float32 lets it."""
    sets = ["epochs=3", "loss.name=gaussian", "optimizer.lr=0.01", "data.name=digits"]
    assert run("digits-gaussian-0.25", sets, tmp_path / "alone") == [0]
    run("digits-gaussian-0.25", sets, tmp_path / "mixed", 2, kill_after=3.0)
    assert run("digits-gaussian-0.25", sets, tmp_path / "mixed", 3) == [0, 0, 0]
    ours, theirs = (load_file(tmp_path / folder / MODEL) for folder in ("alone", "mixed"))
    assert all(ours[name].allclose(theirs[name], atol=1e-5) for name in ours)
