"""The trial before a run: it changes nothing but the speed, and a run that goes on follows it."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from rscli.config.layers import resolve
from rscli.errors import Stopped
from rscli.runtime.progress import Silent
from rscli.training import autotune
from rscli.training.train import train
from runs import Interrupting, train_options

SETS = ["epochs=2", "batch=200", "data.name=digits"]


def weights(folder):
    return load_file(folder / "model.safetensors")


def chosen(folder):
    return json.loads((folder / "environment.json").read_text())["execution"]


@pytest.mark.parametrize("contiguous_is_faster", [False, True])
def test_the_faster_layout_is_chosen_and_trains_as_if_it_had_been_given(tmp_path, monkeypatch, contiguous_is_faster):
    clock = {autotune.Execution(True, False): 2.0, autotune.Execution(False, False): 1.0 if contiguous_is_faster else 1.95}
    monkeypatch.setattr(autotune, "_timed", lambda *_: dict(clock))
    monkeypatch.setattr(autotune, "LONG", 1e9)
    resolved = resolve("digits-cons-0.25", sets=SETS)
    train(resolved, train_options(tmp_path / "tried", autotune=True), Silent())
    train(resolved, train_options(tmp_path / "given", channels_last=not contiguous_is_faster), Silent())
    assert chosen(tmp_path / "tried") == {"channels_last": not contiguous_is_faster, "compile": False}
    ours, theirs = weights(tmp_path / "tried"), weights(tmp_path / "given")
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_run_that_goes_on_follows_the_first_trial(tmp_path, monkeypatch):
    resolved = resolve("digits-cons-0.25", sets=SETS)
    with pytest.raises(Stopped):
        train(resolved, train_options(tmp_path / "run", autotune=True), Interrupting(3))
    monkeypatch.setattr("rscli.training.train.fastest", lambda *_, **__: pytest.fail("tried again"))
    before = chosen(tmp_path / "run")
    train(resolved, train_options(tmp_path / "run", autotune=True, resume=True), Silent())
    assert chosen(tmp_path / "run") == before


def test_a_long_run_tries_to_compile_and_only_a_clear_gain_counts(monkeypatch):
    monkeypatch.setattr(autotune, "unsafe_in_channels_last", lambda network: None)
    times = {(True, False): 1.0, (False, False): 1.2, (True, True): 0.97}
    monkeypatch.setattr(autotune, "_timed", lambda *given: {way: times[tuple(way)] for way in given[-1]})
    import torch

    how = {"rows": 2, "steps": 10_000}
    assert autotune.fastest(None, None, None, torch.device("cpu"), Silent(), **how) == (True, False)
    times[(True, True)] = 0.5
    assert autotune.fastest(None, None, None, torch.device("cpu"), Silent(), **how) == (True, True)
    assert autotune.fastest(None, None, None, torch.device("cpu"), Silent(), **{**how, "steps": 10}) == (True, False)
