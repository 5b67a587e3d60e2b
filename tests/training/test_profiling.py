"""`--profile`: a trace of a few steps, which changes nothing of what is learned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import together
from rscli.config.layers import resolve
from rscli.errors import Stopped
from rscli.runtime.run_files import RunFiles
from rscli.training.profiling import SKIPPED, STEPS
from rscli.training.train import train
from runs import Interrupting, Listening
from runs import train_options as options
from support import process

SETS = [*together.BASE, "batch=8"]


@pytest.fixture(autouse=True)
def _plugins() -> Iterator[None]:
    together.announce()
    yield
    together.forget()


def profiled_steps(path: Path) -> int:
    """Steps of the optimiser in a trace."""
    events = json.loads(path.read_text())["traceEvents"]
    assert any("convolution" in str(event.get("name")) for event in events)
    return sum(str(event.get("name")).startswith("Optimizer.step") and event.get("ph") == "X" for event in events)


def test_a_trace_of_a_few_steps_and_the_same_weights(tmp_path):
    listening = Listening()
    plain = train(resolve(sets=[*SETS, "limit=160"]), options(tmp_path / "plain"), listening)
    assert listening.notes == []
    model = train(resolve(sets=[*SETS, "limit=160"]), options(tmp_path / "run", profile=True), listening)
    assert model.read_bytes() == plain.read_bytes()
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == (tmp_path / "plain/checkpoint.pt").read_bytes()
    assert not RunFiles(tmp_path / "plain").trace.exists()
    assert profiled_steps(tmp_path / "run/trace.json") == STEPS
    assert [note for note in listening.notes if note.startswith(f"profile: {tmp_path / 'run/trace.json'}; open it in")]
    assert not [*(tmp_path / "run").glob(".*")]


@pytest.mark.parametrize(("steps", "found"), [(1, None), (SKIPPED, None), (SKIPPED + 2, 2), (SKIPPED + STEPS, STEPS)])
def test_a_run_of_few_steps(tmp_path, steps, found):
    listening = Listening()
    train(resolve(sets=[*SETS, f"limit={8 * steps}"]), options(tmp_path / "run", profile=True), listening)
    assert (tmp_path / "run/trace.json").exists() == (found is not None)
    if found is None:
        assert listening.warnings == [f"no profile is written: this run has no more than {SKIPPED} steps"]
    else:
        assert profiled_steps(tmp_path / "run/trace.json") == found
        assert listening.warnings == []


def test_a_stop_keeps_what_there_is_and_the_run_goes_on_to_the_same_bits(tmp_path):
    whole = train(resolve(sets=[*SETS, "limit=160"]), options(tmp_path / "whole"), Listening())
    with pytest.raises(Stopped):
        train(resolve(sets=[*SETS, "limit=160"]), options(tmp_path / "run", profile=True), Interrupting(SKIPPED + 1))
    assert (tmp_path / "run/trace.json").exists()
    model = train(resolve(sets=[*SETS, "limit=160"]), options(tmp_path / "run", resume=True, profile=True), Listening())
    assert model.read_bytes() == whole.read_bytes()
    assert profiled_steps(tmp_path / "run/trace.json") == STEPS


def test_overwrite_removes_it(tmp_path):
    how = {"overwrite": True}
    train(resolve(sets=[*SETS, "limit=80"]), options(tmp_path / "run", profile=True), Listening())
    train(resolve(sets=[*SETS, "limit=80", "seed=1"]), options(tmp_path / "run", **how), Listening())
    assert not (tmp_path / "run/trace.json").exists()


@pytest.mark.slow
def test_the_first_of_two_processes_writes_it(tmp_path):
    assert together.run([*SETS, "limit=96"], tmp_path / "run", 2, profile=True) == [0, 0]
    assert profiled_steps(tmp_path / "run/trace.json") == STEPS


@pytest.mark.slow
def test_the_option(tmp_path):
    words = ["train", "--preset", "digits-gaussian-0.25", "--data-limit", "160", "--set", "batch=8", "--set", "epochs=1"]
    done = process(*words, "--device", "cpu", "--workers", 0, "--out", "run", "--profile", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "profile: run/trace.json; open it in chrome://tracing" in " ".join(done.stderr.split())
    assert profiled_steps(tmp_path / "run/trace.json") == STEPS
