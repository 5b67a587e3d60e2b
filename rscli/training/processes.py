"""The processes that train one model together: torchrun starts them, each has its part of every optimiser step.

The first of them speaks: it alone writes the run folder, logs, and calls callbacks. All of them make the same decisions at the
same step: whoever is asked to stop says so, and all hear it before the next step. Small messages go between CPUs (gloo), so
that no host waits for a device; gradients go between the devices (NCCL between GPUs).
"""

from __future__ import annotations

import atexit
import inspect
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from rscli.errors import InputError, RscliError, reason
from rscli.runtime.rendezvous import meet
from rscli.runtime.signals import StopRequest
from rscli.runtime.torchrun import Launch, launched
from rscli.training.batch_norm import SharedStatistics
from rscli.training.metrics import Diverged

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long a process waits for the others in the middle of a run: a probe may take long, and those that fail say so."""
WATCH_SECONDS = 0.5
GRACE_SECONDS = 2.0
"""How long a process that waits for one that has failed may take to notice by itself."""


class EndedByAnother(SystemExit):
    """The quiet end of a process, with the exit code of another one that has failed; `why` is what that one says."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(code)
        self.why = why


class Processes:
    """A process that trains alone."""

    rank, world = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each of `flags`, whether it is set in any process."""
        return list(flags)

    def sum(self, table: Tensor) -> Tensor:
        """The sum of `table` (any shape) over all processes."""
        return table

    def share(self, value: T) -> T:
        """What the first process has as `value`: plain values and tensors on the CPU."""
        return value

    def rows(self, rows: Tensor, *, first: int, size: int) -> Tensor:
        """`rows` (images, ...) and those of all other processes, in the order of their places in a step of `size` images; these
        are those from place `first` on.
        """
        return rows

    def check_gradients(self, trained: Iterable[tuple[str, Tensor]]) -> None:
        """Raises `InputError` if one of the parameters `trained` (any shape), by name, has no gradient to average."""

    def wait(self) -> None:
        """Until all processes are here."""

    def failing_together(self) -> AbstractContextManager[object]:
        """While the body runs: a process that fails ends the others, too."""
        return nullcontext()

    def average(self, module: nn.Module, device: torch.device, *, shared_statistics: bool) -> nn.Module:
        """`module`, whose gradients become the mean over all processes.

        With `shared_statistics`, `together` keeps the buffers equal; otherwise each step begins with the first process's.
        """
        return module

    def gathering(self, module: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """While the body runs what `average` gave, forward and backward: gradients are gathered, and averaged in the `last`."""
        return nullcontext()

    def together(self, *, shared_statistics: bool) -> AbstractContextManager[object]:
        """While the body runs an objective, forward and backward: batch normalisation over all processes, if its statistics are
        shared.
        """
        return nullcontext()


class Several(Processes):
    """One of several processes."""

    def __init__(self, launch: Launch, store: Store) -> None:
        self.rank, self.world = launch.rank, launch.world
        # A connection of its own: torch may wait on the other one, for a key of NCCL's, say. (Older versions have no clone.)
        self._store = store.clone() if hasattr(store, "clone") else store
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """See `Processes.any`; between hosts, a fraction of a millisecond."""
        from torch import distributed

        found = torch.tensor(flags, dtype=torch.uint8)
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
        return [bool(flag) for flag in found.tolist()]

    def sum(self, table: Tensor) -> Tensor:
        """See `Processes.sum`: of `table`, of any shape."""
        from torch import distributed

        table = table.clone()
        distributed.all_reduce(table)
        return table

    def share(self, value: T) -> T:
        """See `Processes.share`."""
        from torch import distributed

        box: list[Any] = [value]
        distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        found: T = box[0]
        return found

    def rows(self, rows: Tensor, *, first: int, size: int) -> Tensor:
        """See `Processes.rows`: (images, ...); what no process has, such as images of another micro-batch, is left out."""
        table, there = rows.new_zeros(size, *rows.shape[1:]), torch.zeros(size, device=rows.device)
        table[first : first + len(rows)] = rows
        there[first : first + len(rows)] = 1
        return self.sum(table)[self.sum(there) > 0]

    def check_gradients(self, trained: Iterable[tuple[str, Tensor]]) -> None:
        """See `Processes.check_gradients` (any shape). torch would say so at the next step, in its own words, or hang."""
        missing = [name for name, parameter in trained if parameter.grad is None]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            named = ", ".join(f'"{name}"' for name in missing[:3])
            raise InputError(
                f"{self.world} processes cannot train {', '.join(missing[:3])}{more}: no gradient reaches it from the loss",
                f"Freeze what takes no part: --set 'freeze=[{named}]'; or train in one process.",
            )

    def wait(self) -> None:
        """See `Processes.wait`."""
        self.any([False])

    def average(self, module: nn.Module, device: torch.device, *, shared_statistics: bool) -> nn.Module:
        """See `Processes.average`."""
        from torch.nn.parallel import DistributedDataParallel

        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        buffers: Any = {"forward_sync_buffers" if new else "broadcast_buffers": not shared_statistics}
        return DistributedDataParallel(
            module,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **buffers,
        )

    def gathering(self, module: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """See `Processes.gathering`."""
        wait: AbstractContextManager[object] = nullcontext() if last else module.no_sync()  # type: ignore[operator]
        return wait

    def together(self, *, shared_statistics: bool) -> AbstractContextManager[object]:
        """See `Processes.together`."""
        return SharedStatistics() if shared_statistics else nullcontext()

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """While the body runs: a process that fails says so in its own words, and the others end quietly, at once.

        Raises `EndedByAnother` instead of the error of a process that another one has forestalled, or that the error of another
        one has reached through torch. What all find together, `Diverged`, ends nobody: the next run may begin. May be nested.
        """
        try:
            yield
        except (Diverged, EndedByAnother):
            raise
        except BaseException as cause:
            if ended := self._forestalled(cause):
                raise ended from None
            if _of_another(cause):
                hint = "See what it said, or whether the system killed it. The same command with --resume goes on."
                error = RscliError(f"another of the {self.world} processes has ended in the middle of the run", hint)
                error.said_by = "this"
                raise error from cause
            if isinstance(cause, RscliError):
                cause.said_by = "this"
            raise

    def leave(self) -> None:
        """The end of the process: nobody watches any more."""
        from torch import distributed

        self._over.set()
        distributed.destroy_process_group()

    def _forestalled(self, cause: BaseException) -> EndedByAnother | None:
        """The end that another process brings, which failed before; or None, and the others are told that this one fails."""
        self._over.set()
        if _of_another(cause):
            time.sleep(2 * WATCH_SECONDS)  # it may say so only now
        code, why = (cause.exit_code, cause.message) if isinstance(cause, RscliError) else (1, reason(cause))
        try:
            said = self._store.compare_set("failed", "", f"{self.rank} {code} {why}").decode()
        except RuntimeError:  # the store is gone, and with it the process that kept it
            return None
        rank, its_code, its_reason = said.split(" ", 2)
        return None if int(rank) == self.rank else EndedByAnother(int(its_code), its_reason)

    def _watch(self) -> None:
        """Ends this process soon after another one has said that it fails: torch would wait for it."""
        while not self._over.wait(WATCH_SECONDS):
            try:
                if not self._store.check(["failed"]):
                    continue
                code = int(self._store.get("failed").decode().split()[1])
            except (RuntimeError, ValueError, IndexError):
                return
            if not self._over.wait(GRACE_SECONDS):
                os._exit(code)


_joined: Processes | None = None


def joined(stop: StopRequest, waiting: Callable[[str], None], device: torch.device) -> Processes:
    """The processes that train together, when all of them are here; this one alone where no launcher started several.

    They stay together for the life of the process: a command may train one run after another. Raises `InputError` if the
    launcher's variables are wrong, if somebody does not come in time, or if two processes would share a GPU.
    """
    global _joined
    launch = launched()
    if launch.note is not None:
        waiting(launch.note)
    if launch.world == 1:
        return Processes()
    if _joined is None:
        _joined = _join(launch, stop, waiting, device)
    return _joined


def _join(launch: Launch, stop: StopRequest, waiting: Callable[[str], None], device: torch.device) -> Processes:
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "").strip() or 1)
    if device.type == "cuda" and here > torch.cuda.device_count():
        raise InputError(
            f"{here} processes were started on this machine, which has {torch.cuda.device_count()} GPUs",
            "Start one process for each GPU: torchrun --nproc-per-node gpu.",
        )
    store = meet(launch, "train", waiting, stop)
    _check_devices(launch, store, device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(
        backend, store=PrefixStore("group", store), rank=launch.rank, world_size=launch.world, timeout=PATIENCE
    )
    several = Several(launch, store)
    atexit.register(several.leave)
    return several


def _check_devices(launch: Launch, store: Store, device: torch.device) -> None:
    """Raises `InputError`, in every process, if two would share a GPU, or not all are on the same kind of device."""
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    where = [device.type, gpu, os.environ.get("CUDA_VISIBLE_DEVICES", ""), socket.gethostname(), str(device)]
    store.set(f"device {launch.rank}", "\n".join(where))
    found = [store.get(f"device {rank}").decode().split("\n") for rank in range(launch.world)]
    if len(kinds := sorted({kind for kind, *_ in found})) > 1:
        hint = "Name one that every machine has: --device cpu, say."
        raise InputError(f"the processes are on different kinds of devices: {' and '.join(kinds)}", hint)
    for rank, each in enumerate(found):
        if device.type == "cuda" and each in found[:rank]:
            raise InputError(
                f"the processes {found.index(each)} and {rank} would share the GPU {each[-1]} of {each[-2]}",
                "Leave the number out of --device, start one process for each GPU, and set LOCAL_RANK for each.",
            )


def _of_another(cause: BaseException) -> bool:
    """Whether the error is torch's way of saying that another process is gone."""
    text = str(cause)
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "ncclSystemError")
    return isinstance(cause, RuntimeError) and any(sign in text for sign in signs)
