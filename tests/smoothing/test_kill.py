"""Real processes, really killed: whatever ends a run, --resume reaches the bytes of an uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from runs import rows

pytestmark = pytest.mark.slow

PATIENCE = 60.0
TRAIN = ["train", "--preset", "digits-cons-0.25", "--set", "epochs=4", "--device", "cpu", "--workers", "0"]
CERTIFY = ["--n", "800", "--n0", "50", "--skip", "9", "--batch", "64", "--device", "cpu"]
IMAGES = 40
POSIX_SIGNALS = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}


def finished(*arguments: str) -> None:
    """Runs rscli to its end, in this process: importing torch once more would tell nothing."""
    from rscli.cli.app import app

    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output


def interrupted(arguments: list[str], ready: Callable[[], bool], number: int) -> tuple[int, str]:
    """Starts rscli, sends it a signal as soon as `ready`, and returns its exit code and what it said."""
    command = [sys.executable, "-m", "rscli", *arguments]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + PATIENCE
        while not ready() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        assert process.poll() is None, f"it ended before it could be killed:\n{process.communicate()[1]}"
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert out == ""
    return process.returncode, err


def says_how_to_go_on(err: str) -> None:
    assert "stopped as asked" in err
    assert "--resume" in err
    assert "Traceback" not in err


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("model")
    finished(*TRAIN, "--quiet", "--out", str(folder))
    return folder / "model.safetensors"


@POSIX_SIGNALS
def test_training_killed_interrupted_and_terminated_reaches_the_same_model(model, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    run = [*TRAIN, "--out", str(tmp_path)]

    code, err = interrupted(run, lambda: lines(metrics) >= 1, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert "Traceback" not in err

    code, err = interrupted([*run, "--resume"], lambda: lines(metrics) >= 2, signal.SIGINT)
    assert code == 130
    says_how_to_go_on(err)

    code, err = interrupted([*run, "--resume"], lambda: lines(metrics) >= 3, signal.SIGTERM)
    assert code == 75
    says_how_to_go_on(err)
    assert not (tmp_path / "model.safetensors").exists()

    finished(*run, "--resume")
    assert (tmp_path / "model.safetensors").read_bytes() == model.read_bytes()


@POSIX_SIGNALS
def test_certification_killed_at_random_moments_gives_the_same_rows(model, tmp_path):
    whole, out = tmp_path / "whole.tsv", tmp_path / "results.tsv"
    finished("certify", str(model), *CERTIFY, "--out", str(whole))
    assert len(rows(whole)) == IMAGES

    source = random.Random(0)
    run = ["certify", str(model), *CERTIFY, "--out", str(out), "--resume"]
    begun = 1
    for number, expected in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 75)):
        begun += source.randrange(2, 8)  # rows and the header, this time
        code, err = interrupted(run, lambda wanted=begun: lines(out) >= wanted, number)
        assert code == expected, err
        if number != signal.SIGKILL:
            says_how_to_go_on(err)
        assert begun <= lines(out) < 1 + IMAGES
        assert set(rows(out)[: begun - 1]) <= set(rows(whole))
        begun = lines(out)
    with out.open("ab") as file:
        file.write(b"333\t4\t4\t0.1")  # what a crash in the middle of a row leaves

    finished(*run)
    assert rows(out) == rows(whole)
