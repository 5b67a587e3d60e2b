"""Processes that read for this one: they end when it ends, however it ends, and when one of them dies, that is said.

torch's own `DataLoader` waits at exit for workers that ignore SIGTERM, as ours do, and reports a worker that died by raising
from a signal handler, in the middle of whatever the main thread is doing.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import TypeVar
from weakref import WeakSet

from torch.utils.data import DataLoader

from rscli.errors import RscliError
from rscli.runtime.signals import STOPPING

T = TypeVar("T")
_PR_SET_PDEATHSIG = 1
_started: WeakSet[BaseProcess] = WeakSet()


def read(loader: DataLoader[T]) -> Generator[T]:
    """What `loader` gives; its workers, if it has any, are gone when this iterator is closed or the process exits.

    Give the loader `worker_init_fn=stay_in_the_background`. Raises `RscliError` if a worker dies.
    """
    before = set(multiprocessing.active_children())
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    items = iter(loader)
    workers = set(multiprocessing.active_children()) - before
    if not workers:
        yield from items
        return
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)  # torch's would raise anywhere; it also looks when it waits for a batch
    _started.update(workers)
    atexit.unregister(_kill_readers)
    atexit.register(_kill_readers)  # last, so that it comes before torch and multiprocessing wait for them
    try:
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except Exception as cause:  # of many kinds, as the connection to a process that dies breaks off here or there
                ended = wait([worker.sentinel for worker in workers], timeout=1)  # its connections end before the process does,
                for worker in workers:
                    if worker.sentinel in ended:
                        worker.join(timeout=1)  # and its sentinel before the system knows its exit code
                died = [worker for worker in workers if worker.exitcode]
                if not died:
                    raise
                raise _died(died[0]) from cause
            yield item
    finally:
        for worker in workers:
            worker.kill()
        # When the loader's iterator goes, it tells its workers by an event of all processes, and one that was killed while it
        # looked at that event holds its lock for ever.
        if hasattr(items, "_workers_done_event"):
            items._workers_done_event = threading.Event()


def _died(worker: BaseProcess) -> RscliError:
    code = worker.exitcode or 0
    how = f"was killed (signal {-code})" if code < 0 else f"ended (exit code {code})"
    reason = "shared memory (/dev/shm) is probably too small" if code == -7 else "the system is probably out of memory"
    hint = "Use fewer --workers (0 reads in the process itself) or a smaller batch; a run that has begun goes on with --resume."
    return RscliError(f"a process that reads images {how}: {reason}", hint)


def _kill_readers() -> None:
    for worker in list(_started):
        if worker.is_alive():
            worker.kill()


def stay_in_the_background(_worker: int) -> None:
    """In a worker, before it begins: what asks a run to stop is left to the parent, and the parent's end is the worker's."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere, torch's workers notice within five seconds
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():  # it died before the system was told
            os._exit(1)
