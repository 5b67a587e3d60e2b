"""What the tests kill: certifications in processes that are forked in milliseconds, by a server that has imported torch once.

The processes import this module and nothing of the tests, so that it must stay light.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

BEGUN, ROW, TOGETHER, DONE = b"begun", b"row", b"together", b"done"
"""What a victim says: it has begun; a row is written; parts are to be put together; it is through, and waits to be killed."""

STEP_SECONDS = 0.01
"""What each renaming and each removal takes when parts are put together: as on a slow disk, so that a kill can hit it."""

PATIENCE = 60.0
PRELOAD = [
    "rscli.smoothing.certify",
    "rscli_core.architectures.lenet",
    "rscli_core.certifiers.cohen",
    "rscli_core.datasets.digits",
    "rscli_core.noises.gaussian",
    "sklearn.datasets",
    "PIL.Image",
]


@dataclass(frozen=True)
class Killed:
    """What the processes of one run said before they died, and their exit codes."""

    said: list[bytes]
    codes: list[int | None]

    @property
    def rows(self) -> int:
        """How many rows were written for certain."""
        return self.said.count(ROW)

    @property
    def finished(self) -> bool:
        """Whether the kill came too late: the first process was through."""
        return DONE in self.said

    @property
    def moment(self) -> str:
        """Where the kill hit."""
        if TOGETHER in self.said:
            return "putting parts together"
        return "between rows" if self.rows else "before the first row"


def kill(options: Any, world: int, store: Path, source: random.Random, aim: bytes, count: int, within: float) -> Killed:
    """Certifies in `world` processes, and kills them all: `within` so many seconds after `aim` was said `count` times.

    `store` is the file by which the processes share counters; `source` draws the moment, and who dies first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ear, mouth = context.Pipe(duplex=False)
    victims = [
        context.Process(target=_certify, args=(options, rank, world, store, mouth), daemon=True) for rank in range(world)
    ]
    said: list[bytes] = []

    def heard() -> bool:
        """Whether there is more to hear: what is said next, or False when all are dead."""
        assert ear.poll(PATIENCE), f"silent after {said}"
        try:
            said.append(ear.recv_bytes())
        except EOFError:
            return False
        return True

    try:
        for victim in victims:
            victim.start()
        mouth.close()
        while said.count(aim) < count and DONE not in said and heard():
            pass
        time.sleep(source.uniform(0, within))
    finally:
        for victim in source.sample(victims, world):
            if victim.pid is not None:
                victim.kill()
                victim.join()
    while heard():
        pass
    return Killed(said, [victim.exitcode for victim in victims])


def _certify(options: Any, rank: int, world: int, store: Path, mouth: Connection) -> None:
    """One process of a run; it never ends by itself, so that whoever dies later cannot end otherwise than by the kill."""
    import torch
    from torch.distributed import FileStore

    from rscli.results.writer import ResultWriter
    from rscli.runtime.progress import Silent
    from rscli.smoothing import certify as certifying
    from rscli.smoothing.work_queue import Together

    mouth.send_bytes(BEGUN)
    torch.set_num_threads(1)
    append, finish = ResultWriter.append, ResultWriter.finish

    def append_and_say(writer: ResultWriter, row: Any) -> None:
        append(writer, row)
        mouth.send_bytes(ROW)

    def say_and_finish(writer: ResultWriter) -> None:
        mouth.send_bytes(TOGETHER)
        Path.replace, Path.unlink = _slow(Path.replace), _slow(Path.unlink)  # type: ignore[method-assign]
        finish(writer)

    ResultWriter.append, ResultWriter.finish = append_and_say, say_and_finish  # type: ignore[method-assign]
    if world > 1:
        certifying.join = lambda *_: Together(FileStore(str(store), world), rank, world)
    certifying.certify(options, Silent())
    if rank == 0:
        mouth.send_bytes(DONE)
    signal.pause()


def _slow(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        time.sleep(STEP_SECONDS)
        return call(*arguments, **named)

    return run
