"""Several processes, one certification: torchrun starts them, a shared counter hands out the images.

Images can differ a hundredfold in cost, so nobody is given a share beforehand: whoever needs another image takes the next one.
But nobody has more of them open than an even share of those that are left: a process opens many to fill its batches, and a few
processes with large batches could take them all at once.
The processes share nothing but torchrun's key-value store; there are no collectives that could wait for a dead peer, and it
makes no difference whether they run on CPUs or GPUs. When one dies, torchrun ends the others, and `--resume` goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from rscli.errors import Stopped
from rscli.runtime.rendezvous import POLL_SECONDS, meet
from rscli.runtime.signals import StopRequest
from rscli.runtime.torchrun import launched

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store


class Ranks(Protocol):
    """The processes of a run, seen from one of them."""

    rank: int
    world: int

    def hand_out(self, images: Sequence[int], opened: Callable[[], int]) -> Iterator[int | None]:
        """The images that this process is to do, of a list that is the same in all; each image goes to one process.

        None says: not now, ask again when some of the images that this process has open (`opened` says how many) are done.
        """

    def add(self, name: str, amount: int) -> int:
        """Adds to the counter `name` of all processes, and returns its value."""

    def meet(self, name: str, stop: StopRequest | None = None) -> None:
        """Waits until every process is here; each `name` is good for one meeting. Raises `Stopped` if `stop` is requested."""

    def leave(self, stop: StopRequest | None = None) -> None:
        """The last word of every process: nobody counts or meets any more. Raises as `meet` does."""


class Alone:
    """A single process."""

    rank, world = 0, 1

    def __init__(self) -> None:
        self._counters: dict[str, int] = {}

    def hand_out(self, images: Sequence[int], opened: Callable[[], int]) -> Iterator[int | None]:
        """All of them."""
        return iter(images)

    def add(self, name: str, amount: int) -> int:
        """Counts here."""
        self._counters[name] = self._counters.get(name, 0) + amount
        return self._counters[name]

    def meet(self, name: str, stop: StopRequest | None = None) -> None:
        """Nobody to wait for."""

    def leave(self, stop: StopRequest | None = None) -> None:
        """Nobody waits for it."""


class Together:
    """One of several processes that torchrun started."""

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self._store, self.rank, self.world = store, rank, world

    def hand_out(self, images: Sequence[int], opened: Callable[[], int]) -> Iterator[int | None]:
        """The next image that nobody has taken, unless as many are open here as an even share of those."""
        while (left := len(images) - self.add("next image", 0)) > 0:
            if opened() >= max(1, left / self.world):
                yield None
            elif (place := self.add("next image", 1) - 1) < len(images):
                yield images[place]

    def add(self, name: str, amount: int) -> int:
        """Counts in the store."""
        return int(self._store.add(name, amount))

    def meet(self, name: str, stop: StopRequest | None = None) -> None:
        """Arrives, and waits for the others; torchrun ends the wait, by a signal, if one of them has died."""
        self.add(f"meet {name}", 1)
        self._wait(f"meet {name}", stop)

    def leave(self, stop: StopRequest | None = None) -> None:
        """Goes; the first process, which keeps the store where torchrun does not, waits for the others to have gone."""
        self.add("gone", 1)
        if self.rank == 0:
            self._wait("gone", stop)

    def _wait(self, name: str, stop: StopRequest | None) -> None:
        """Until the counter `name` says that it was everybody."""
        while self.add(name, 0) < self.world:
            if stop is not None and stop.requested:
                hint = "Run the same command with --resume to merge the parts, or to continue with what is missing."
                raise Stopped("stopped while waiting for the other processes", hint, exit_code=stop.exit_code)
            time.sleep(POLL_SECONDS)


def join(waiting: Callable[[str], None], stop: StopRequest) -> Ranks:
    """The processes that torchrun started (see `rscli.runtime.torchrun`), when all are here; or this one alone.

    `waiting` is told, after some seconds, what is waited for. Raises `InputError` if the variables are wrong, the port is
    taken, or somebody does not come in time, and `Stopped` if `stop` is requested.
    """
    launch = launched()
    if launch.note is not None:
        waiting(launch.note)
    if launch.world == 1:
        return Alone()
    return Together(meet(launch, "rscli", waiting, stop), launch.rank, launch.world)
