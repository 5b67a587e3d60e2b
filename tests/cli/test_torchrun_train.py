"""`rscli train` under torchrun, from the outside: one voice, one run folder, one end for all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from launcher import ENVIRONMENT, codes, ended, free_port, ours, ranks, started, torchrun, wait_for
from rscli.report.runs import look

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix" or shutil.which("pgrep") is None, reason="signals and processes as POSIX has them"),
]
TRAIN = ["train", "--preset", "digits-gaussian-0.25", "--device", "cpu", "--workers", "0", "--set", "schedule.milestones=[]"]
FILES = {"config.json", "environment.json", "metrics.jsonl", "checkpoint.pt", "model.safetensors", "curves.png"}
SECONDS = 20
"""Within which the others end after one has failed: some seconds, on a machine that does other things, too."""

PARTS = '''
import os, time
from rscli.api import Callback
from rscli_core.losses.gaussian import GaussianLoss as _Loss


class FailsInRankOne(_Loss):
    """Raises in the second process, in the second epoch."""

    def step(self, step):
        if os.environ.get("RANK") == "1" and step.position.epoch == 1:
            raise RuntimeError("words of the plugin's own")
        return super().step(step)


class Slow(Callback):
    """Sleeps after each step."""

    def after_step(self, run, state):
        time.sleep(0.1)
'''


@pytest.fixture
def slow(tmp_path: Path) -> list[object]:
    """Options that make each step take a while."""
    file = tmp_path / "parts.py"
    file.write_text(PARTS)
    return ["--plugin", file, "--set", "callbacks.slow.name=slow"]


def model_of(folder: Path):
    return load_file(folder / "model.safetensors")


def epochs(folder: Path) -> list[int]:
    """Of the lines of the log, as far as there is one."""
    log = folder / "metrics.jsonl"
    return [json.loads(line)["epoch"] for line in log.read_text().splitlines()] if log.exists() else []


def test_one_voice_one_folder_one_answer_and_again_on_the_same_port(tmp_path):
    """A note (of an old name of a setting), a warning, progress, the end: once each; and nothing of torch's or gloo's."""
    port = free_port()
    for name in ("one", "two"):
        words = [*TRAIN, "--set", "epochs=2", "--set", "schedule.milestones=[9]", "--out", name, "--json"]
        done = torchrun(2, *words, cwd=tmp_path, port=port)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"model": f"{name}/model.safetensors", "folder": name}
        warning, progress, model = ours(done.stderr)
        assert warning.startswith("warning: the milestone 9 of the schedule never comes in a run of 2 epochs")
        assert progress.startswith("train 24/24 batch, epoch 2, ")
        assert model == f"model: {name}/model.safetensors"
        assert {each.name for each in (tmp_path / name).iterdir()} == FILES
        assert epochs(tmp_path / name) == [1, 2]
    one, two = model_of(tmp_path / "one"), model_of(tmp_path / "two")
    assert all(one[key].equal(two[key]) for key in one)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*TRAIN, "--set", "loss.nope=3"], "  loss.nope = 3 (--set): unknown key. The keys here are "),
        ([*TRAIN, "--nope"], "│ No such option: --nope"),
        ([*TRAIN, "--plugin", "none.py"], "error: --plugin is none.py, "),
        (
            ["train", "--preset", "mnist-cons-0.5", "--data-dir", "none", "--device", "cpu"],
            "error: MNIST is not complete: none/MNIST",
        ),
    ],
    ids=["a setting", "an option", "a plugin file", "the data"],
)
def test_what_is_wrong_is_said_once(tmp_path, words, says):
    done = torchrun(2, *words, "--out", "run", cwd=tmp_path)
    said = ours(done.stderr)
    assert sum(line.startswith(says) for line in said) == 1, done.stderr
    assert "\n".join(said).lower().count("error") == 1
    assert "stopped" not in "\n".join(said)
    assert 2 in codes(done.stderr).values()
    assert set(codes(done.stderr).values()) <= {2, -signal.SIGTERM}, "torchrun ends the others"
    assert (done.returncode, done.stdout) == (1, ""), "torchrun's own code"
    assert not (tmp_path / "run").exists()


def test_a_process_that_raises_ends_the_others_with_its_own_words(tmp_path, slow):
    words = [*TRAIN, *slow[:2], "--set", "loss.name=fails-in-rank-one", "--set", "epochs=3", "--out", "run"]
    done = torchrun(2, *words, cwd=tmp_path)
    why = "RuntimeError: words of the plugin's own"
    (error,) = [line for line in ours(done.stderr) if line.startswith("error: ")]
    assert error.startswith("error: the loss fails-in-rank-one of parts.py sha256:")
    assert error.endswith(why)
    assert 2 in codes(done.stderr).values()
    assert set(codes(done.stderr).values()) <= {2, -signal.SIGTERM}
    assert epochs(tmp_path / "run") == [1]
    state = look(tmp_path / "run")
    assert state.state == "failed"
    assert why in state.why


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_others(tmp_path, slow, victim):
    with started(2, *TRAIN, *slow, "--set", "epochs=9", "--out", "run", cwd=tmp_path) as process:
        wait_for((tmp_path / "run/checkpoint.pt").exists, process)
        killed = time.monotonic()
        os.kill(ranks(process)[victim], signal.SIGKILL)
        done = ended(process)
        assert time.monotonic() - killed < SECONDS
    errors = [line for line in ours(done.stderr) if line.startswith("error: ")]
    assert errors == ["error: another of the 2 processes has ended in the middle of the run"]
    assert "See what it said, or whether the system killed it. The same command with --resume goes on." in done.stderr
    assert codes(done.stderr) == {victim: -signal.SIGKILL, 1 - victim: 1}
    assert look(tmp_path / "run").state == "failed"


def test_stopped_by_sigterm_it_goes_on_in_other_numbers_of_processes(tmp_path, slow):
    words = [*TRAIN, *slow, "--set", "epochs=4", "--set", "optimizer.lr=0.01", "--out"]
    for world, more in ((2, []), (3, ["--resume"])):
        begun = len(epochs(tmp_path / "run"))
        with started(world, *words, "run", *more, cwd=tmp_path) as process:
            wait_for(lambda begun=begun: len(epochs(tmp_path / "run")) > begun, process)
            process.terminate()
            done = ended(process)
        (stopped,) = [line for line in ours(done.stderr) if line.startswith("stopped")]
        assert stopped.endswith("; saved in run")
        assert not any(line.startswith("error") for line in ours(done.stderr))
        assert done.returncode == 1, "torchrun's own code: not 75"
        assert look(tmp_path / "run").state == "stopped"
    command = [sys.executable, "-m", "rscli", *map(str, words)]
    last = subprocess.run(
        [*command, "run", "--resume"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert last.returncode == 0, last.stderr
    assert epochs(tmp_path / "run") == [1, 2, 3, 4]
    subprocess.run([*command, "alone"], cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    ours_, theirs = model_of(tmp_path / "run"), model_of(tmp_path / "alone")
    assert all(ours_[name].allclose(theirs[name], atol=1e-5) for name in theirs)


def test_seeds_and_sweeps_run_one_after_the_other(tmp_path):
    words = ["--set", "epochs=1", "--seeds", "0-1", "--sweep", "noise.sigma=0.1,0.5", "--out", "runs", "--json"]
    done = torchrun(2, *TRAIN, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folders = [f"runs/noise.sigma={sigma}/seed{seed}" for sigma in ("0.1", "0.5") for seed in (0, 1)]
    assert [run["folder"] for run in json.loads(done.stdout)["runs"]] == folders
    assert [line for line in ours(done.stderr) if line.startswith("model: ")] == [
        f"model: {each}/model.safetensors" for each in folders
    ]
    assert all({each.name for each in (tmp_path / folder).iterdir()} == FILES for folder in folders)


def test_a_run_that_diverges_does_not_keep_the_next_from_its_turn(tmp_path):
    words = ["--set", "epochs=1", "--sweep", "optimizer.lr=1000000,0.01", "--out", "runs"]
    done = torchrun(2, *TRAIN, *words, cwd=tmp_path)
    said = ours(done.stderr)
    (warning,) = [line for line in said if line.startswith("warning: ")]
    assert "runs/optimizer.lr=1000000/seed0 failed: the loss is no longer finite at epoch 1" in warning
    assert [line for line in said if line.startswith("error: ")] == [
        "error: 1 of 2 runs failed: runs/optimizer.lr=1000000/seed0"
    ]
    assert (tmp_path / "runs/optimizer.lr=0.01/seed0/model.safetensors").exists()
    assert set(codes(done.stderr).values()) <= {1, -signal.SIGTERM}


def test_a_dry_run_is_shown_once(tmp_path):
    done = torchrun(2, *TRAIN, "--set", "epochs=1", "--dry-run", "--json", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
    assert not (tmp_path / "run").exists()


def test_a_rank_without_a_world_is_ignored_and_said(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "rscli", *TRAIN, "--set", "epochs=1", "--out", "run"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "RANK": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.splitlines()[0] == "RANK is '1', but WORLD_SIZE is not set: RANK is ignored, and this process works alone"
    )
    assert (tmp_path / "run/model.safetensors").exists()
