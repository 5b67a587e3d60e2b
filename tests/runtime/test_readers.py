"""Processes that read: whatever ends their parent ends them, within seconds, and one that dies is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.utils import data as torch_data

from rscli.errors import RscliError
from rscli.runtime.readers import read, stay_in_the_background

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
PATIENCE = 60.0

PARENT = """
import multiprocessing, os, signal, sys, time
import torch
from contextlib import closing
from torch.utils import data
from rscli.cli import interrupts
from rscli.runtime.readers import read, stay_in_the_background
from rscli.runtime.signals import stop_requests

how, workers, slow = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "slow"

class Numbers(data.Dataset):
    def __getitem__(self, index):
        if index > 3 and slow:
            time.sleep(3600)  # in the middle of a batch, which nobody waits for
        return torch.full((100,), index)

def main():
    options = dict(num_workers=workers, worker_init_fn=stay_in_the_background)
    loader = data.DataLoader(Numbers(), sampler=range(1_000_000), batch_size=None, **options)
    for number, _ in enumerate(read(loader)):
        if number < 3:
            continue
        if number == 3:
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        if how == "KeyError":
            raise KeyError("a defect of a plugin")
        if how == "exit":
            sys.exit(3)
        if how == "_exit":
            os._exit(3)
        if how in ("killed", "terminated", "abandoned"):
            time.sleep(3600)
        # "reader": goes on until it is told that a reader died

with interrupts.heard():
    main()
"""
CASES = list(product(["KeyError", "exit", "_exit", "killed", "terminated", "reader"], [1, 3], ["slow", "busy"]))


def gone(pid: int) -> bool:
    """Whether there is no such process, or only what is left of it until somebody asks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def within(seconds: float, pids: list[int]) -> bool:
    until = time.monotonic() + seconds
    while not all(map(gone, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return all(map(gone, pids))


@pytest.mark.slow
@pytest.mark.parametrize(("how", "workers", "speed"), CASES, ids=lambda value: str(value))
def test_what_ends_the_parent_ends_its_readers(tmp_path, how, workers, speed):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(script), how, str(workers), speed],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        readers = [int(word) for word in process.stdout.readline().split()]
        assert len(readers) == workers
        if how == "reader":
            os.kill(readers[-1], signal.SIGKILL)
        if how == "killed":
            process.kill()
        if how == "terminated":
            process.terminate()
        _, err = process.communicate(timeout=PATIENCE)
        assert within(10, readers), "readers outlive their parent"
    finally:
        process.kill()
        for pid in readers:
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)
    codes = {"KeyError": 1, "exit": 3, "_exit": 3, "killed": -9, "terminated": 75, "reader": 1}
    assert process.returncode == codes[how], err
    if how == "reader":
        assert "a process that reads images was killed (signal 9): the system is probably out of memory" in err


class Numbers(torch_data.Dataset[torch.Tensor]):
    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


class Leaving(Numbers):
    """A reader that ends of itself."""

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 2:
            os._exit(7)
        return torch.tensor(index)


class Failing(Numbers):
    def __getitem__(self, index: int) -> torch.Tensor:
        raise RuntimeError("a defect")


def loader(source: Numbers, workers: int = 2) -> torch_data.DataLoader[torch.Tensor]:
    return torch_data.DataLoader(
        source, sampler=range(20), batch_size=None, num_workers=workers, worker_init_fn=stay_in_the_background
    )


@pytest.fixture
def children() -> Iterator[None]:
    """No reader is left when the test is over."""
    import multiprocessing

    yield
    assert within(10, [child.pid or 0 for child in multiprocessing.active_children() if child.daemon])


@pytest.mark.usefixtures("children")
@pytest.mark.parametrize("workers", [0, 2])
def test_everything_is_read_in_order(workers):
    assert [int(item) for item in read(loader(Numbers(), workers))] == list(range(20))


@pytest.mark.usefixtures("children")
def test_readers_are_gone_when_no_more_is_wanted():
    items = read(loader(Numbers()))
    assert int(next(items)) == 0
    items.close()


@pytest.mark.usefixtures("children")
def test_a_reader_that_ends_is_said_where_the_next_batch_is_wanted():
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(RscliError, match=r"a process that reads images ended \(exit code 7\)") as caught:
        list(read(loader(Leaving())))
    assert "fewer --workers" in (caught.value.hint or "")
    assert signal.getsignal(signal.SIGCHLD) is handler


@pytest.mark.usefixtures("children")
def test_an_error_in_a_reader_stays_what_it_is():
    with pytest.raises(RuntimeError, match="a defect"):
        list(read(loader(Failing())))


class Kept(torch_data.DataLoader):
    """A loader that keeps its iterator."""

    def __iter__(self):
        self.iterator = super().__iter__()
        return self.iterator


def test_a_worker_that_is_killed_while_it_looks_at_torchs_event_holds_nobody_up():
    """It dies with the lock of that event, which torch then asks for: seen once, when a whole run of the tests hung."""
    loader = Kept(torch.arange(100), batch_size=None, num_workers=1, worker_init_fn=stay_in_the_background)
    items = read(loader)
    next(items)
    loader.iterator._workers_done_event._cond._lock.acquire()  # as the dead worker would have left it

    def end() -> None:
        items.close()
        del loader.iterator

    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    ending.join(30)
    assert not ending.is_alive()
