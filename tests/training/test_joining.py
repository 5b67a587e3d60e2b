"""What processes that train together do around the training itself: where they run, how they watch each other and stop."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

import runs
from rscli.api import LogWriter
from rscli.config.layers import resolve
from rscli.errors import InputError, Stopped
from rscli.runtime.progress import Silent
from rscli.runtime.torchrun import Launch
from rscli.training import processes, train
from rscli.training.context import SetupContext
from rscli.training.processes import Processes, Several
from rscli_core.loggers.jsonl import JsonLines


def launch(rank: int, world: int = 2) -> Launch:
    return Launch(rank, world, "127.0.0.1", 1)


# --- devices -----------------------------------------------------------------------------------------------------------------


def checked(monkeypatch, *where: tuple[str, str]) -> list[str]:
    """What each process is told, of those on the devices and with the visible GPUs of `where`; GPUs are pretended."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"))
    store, told = distributed.HashStore(), []
    for worlds in (0, len(where)):  # first what each of them says, and then what each of them reads
        told = []
        for rank, (name, visible) in enumerate(where):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
            try:
                processes._check_devices(launch(rank, worlds), store, torch.device(name))
            except InputError as error:
                told.append(error.message)
    return told


def test_two_processes_on_one_gpu_are_refused_in_both(monkeypatch):
    told = checked(monkeypatch, ("cuda:1", ""), ("cuda:0", ""), ("cuda:1", ""))
    assert len(told) == 3
    assert len(set(told)) == 1
    assert "the processes 0 and 2 would share the GPU cuda:1 of " in told[0]


def test_gpus_of_their_own_and_a_cpu_for_all_are_taken(monkeypatch):
    assert checked(monkeypatch, ("cuda:0", ""), ("cuda:1", "")) == []
    assert checked(monkeypatch, ("cuda:0", "0"), ("cuda:0", "1")) == []
    assert checked(monkeypatch, ("cpu", ""), ("cpu", "")) == []


def test_a_machine_without_a_gpu_among_others_is_said(monkeypatch):
    told = checked(monkeypatch, ("cuda:0", ""), ("cpu", ""))
    assert told == ["the processes are on different kinds of devices: cpu and cuda"] * 2


# --- watching ----------------------------------------------------------------------------------------------------------------


def test_a_process_that_waits_for_a_key_hears_that_another_one_fails(monkeypatch):
    """As NCCL does at its first collective: the connection is taken until the key is there."""
    ended = threading.Event()
    monkeypatch.setattr(processes, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    store = distributed.TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=4), wait_for_workers=False)
    other = store.clone()

    def wait_in_vain() -> None:
        with suppress(distributed.DistStoreError):
            store.get("never")

    waiting = threading.Thread(target=wait_in_vain)
    waiting.start()
    time.sleep(0.2)
    several = Several(launch(1), store)
    other.set("failed", "0 1")
    heard = ended.wait(2)
    several._over.set()
    waiting.join()
    assert heard


# --- stopping ----------------------------------------------------------------------------------------------------------------


class Recording(Processes):
    """One process that is told what another one hears, and keeps when it waited for it."""

    def __init__(self, said: list[str], asked: bool = False) -> None:
        self.said, self.asked = said, asked

    def any(self, flags):
        return [True] if self.asked and len(flags) == 1 else list(flags)

    def wait(self) -> None:
        self.said.append("waited")


def small():
    return resolve("digits-gaussian-0.25", sets=["epochs=1", "batch=512"])


def test_a_stopped_process_waits_until_the_first_one_has_closed_its_logs(tmp_path, monkeypatch):
    """One that ended earlier would have the first one ended in the middle of sending its log."""
    said: list[str] = []

    class Log(LogWriter):
        def write(self, line):
            pass

        def close(self):
            said.append("closed")

    monkeypatch.setattr(JsonLines, "open", lambda self, run: Log())
    monkeypatch.setattr(train, "joined", lambda *_: Recording(said))
    with pytest.raises(Stopped):
        train.train(small(), runs.train_options(tmp_path / "run"), runs.Interrupting(1))
    assert said[-2:] == ["closed", "waited"]


def test_a_stop_that_one_process_hears_in_the_last_batch_stops_all(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "joined", lambda *_: Recording([], asked=True))
    with pytest.raises(Stopped, match="was just finished") as caught:
        train.train(small(), runs.train_options(tmp_path / "run"), Silent())
    assert caught.value.exit_code == 75
    assert (tmp_path / "run/model.safetensors").exists()


# --- what only one of them needs ---------------------------------------------------------------------------------------------


def test_the_fingerprint_of_the_data_is_taken_when_a_loss_asks():
    """Of a million files it is a million look-ups, and only the first process needs it."""
    taken = []
    spec = SimpleNamespace(class_names=("a",))

    class Split(list):
        def fingerprint(self):
            taken.append(1)
            return "f"

    split = Split([1, 2])
    split.spec = spec
    context = SetupContext(split, None, torch.device("cpu"), 0, Silent(), None)
    assert not taken
    assert context.data_sha256 == "f"
