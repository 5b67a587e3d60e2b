"""`rscli` under torchrun, as a user starts it, and what it says without torchrun's own lines."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "100"}
"""OMP_NUM_THREADS, since torchrun sets it, with a banner, where it is not set."""
PATIENCE = 300
ITS_LINE = re.compile(r"[WE]\d{4} .*/torch/distributed/elastic/")
ITS_TRACEBACK = 'Traceback (most recent call last):\n  File "<frozen runpy>"'


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def torchrun(world: int, *words: object, cwd: Path, port: int | None = None) -> subprocess.CompletedProcess[str]:
    """`rscli WORDS` in `world` processes, to the end."""
    with started(world, *words, cwd=cwd, port=port) as process:
        return ended(process)


@contextmanager
def started(world: int, *words: object, cwd: Path, port: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """`rscli WORDS` in `world` processes, which are gone in any case when the body is left."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", world, "--master-port", port or free_port()]
    command = [str(word) for word in (*launcher, "-m", "--", "rscli", *words)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=cwd, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            for rank in (process.pid, *ranks(process)):  # torchrun may give each a session of its own
                os.kill(rank, signal.SIGKILL)
            process.wait()


def ranks(process: subprocess.Popen[str]) -> list[int]:
    """The ids of the processes that torchrun has started, the first one first."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], stdout=subprocess.PIPE, text=True, check=False).stdout
    return sorted(map(int, found.split()))


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """What the processes said, all together."""
    out, err = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until `ready`, while the processes run."""
    until = time.monotonic() + PATIENCE
    while not ready() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
    assert ready()


def ours(err: str) -> list[str]:
    """The lines of `err` that are not torchrun's."""
    return [line for line in err.partition(ITS_TRACEBACK)[0].splitlines() if not ITS_LINE.match(line)]


def codes(err: str) -> dict[int, int]:
    """The exit codes of the ranks, as torchrun tells them after a failure."""
    found = re.findall(r"rank +: (\d+) \(local_rank.*\n +exitcode +: (-?\d+) ", err)
    return {int(rank): int(code) for rank, code in found}
