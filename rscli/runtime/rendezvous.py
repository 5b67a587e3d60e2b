"""Where processes meet that torchrun, or a cluster's own launcher, started: the key-value store that they share."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from rscli.errors import InputError, Stopped
from rscli.runtime.signals import StopRequest
from rscli.runtime.torchrun import LEFTOVER, SECONDS, Launch, patience

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

POLL_SECONDS = 0.02
SAY_SECONDS = 5.0


def meet(launch: Launch, purpose: str, waiting: Callable[[str], None], stop: StopRequest) -> Store:
    """The key-value store of the processes of `launch`, more than one, when all of them are here; keys belong to `purpose`.

    `waiting` is told, after some seconds, what is waited for. Raises `InputError` if the port is taken, or somebody does not
    come in time, and `Stopped` if `stop` is requested.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    wait = _Wait(launch, waiting, stop)
    store = PrefixStore(
        f"{purpose} {launch.attempt}", _connect(launch, wait)
    )  # torchrun keeps it when it starts them all again
    store.add("here", 1)
    while (here := int(store.add("here", 0))) < launch.world:
        wait.more(f"{launch.world - here} of {launch.world} processes to join at {wait.place}")
        time.sleep(POLL_SECONDS)
    return store


class _Wait:
    """How long the beginning takes: says what it is waiting for after `SAY_SECONDS`, and fails when that takes too long."""

    def __init__(self, launch: Launch, say: Callable[[str], None], stop: StopRequest) -> None:
        self.place = f"{launch.address}:{launch.port} (MASTER_ADDR and MASTER_PORT)"
        self._say, self._stop, self._said = say, stop, False
        self._begun, self._most = time.monotonic(), patience()

    def more(self, what: str) -> None:
        """Once more. Raises `InputError` when it has been long enough, and `Stopped` when asked to stop."""
        if self._stop.requested:
            raise Stopped(f"stopped while waiting for {what}", exit_code=self._stop.exit_code)
        waited = time.monotonic() - self._begun
        if waited > self._most:
            hint = f"Start all processes with the same variables, or this one without any; {SECONDS} says how long they wait."
            raise InputError(f"waited {self._most} seconds for {what}", hint)
        if waited > SAY_SECONDS and not self._said:
            self._said = True
            self._say(f"waiting for {what}; at most {self._most} seconds")


def _connect(launch: Launch, wait: _Wait) -> Store:
    """The key-value store, which the first process keeps, unless torchrun does."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        socket.getaddrinfo(launch.address, launch.port)
    except (OSError, UnicodeError) as cause:
        raise InputError(f"MASTER_ADDR is {launch.address!r}, which this machine cannot find: {cause}", LEFTOVER) from cause
    keeps = launch.rank == 0 and not launch.kept
    if keeps:
        _check_free(launch)
    while not keeps and not _listens(launch):  # torch's own tries print a page each
        wait.more(f"the first of {launch.world} processes, at {wait.place}")
        time.sleep(POLL_SECONDS)
    try:
        within = timedelta(seconds=patience())
        store: Store = TCPStore(launch.address, launch.port, launch.world, keeps, within, wait_for_workers=False)
        return store
    except RuntimeError as cause:  # torch's, of several kinds
        said = str(cause).strip().partition("\n")[0]
        raise InputError(f"cannot reach the other processes at {wait.place}: {said}", LEFTOVER) from cause


def _listens(launch: Launch) -> bool:
    try:
        socket.create_connection((launch.address, launch.port), timeout=SAY_SECONDS).close()
    except OSError:
        return False
    return True


def _check_free(launch: Launch) -> None:
    """Raises `InputError` if the port is taken; torch would say so in a warning of its own, too."""
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(("", launch.port))
            trial.listen()
    except OSError as cause:
        hint = "Choose another port, the same for all processes."
        raise InputError(f"cannot listen on the port MASTER_PORT = {launch.port}: {cause.strerror}", hint) from cause
