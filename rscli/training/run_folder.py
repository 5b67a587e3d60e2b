"""The folder of a training run, and how a run continues in it.

config.json        the resolved configuration, with the source of every value
environment.json   versions, device, threads
metrics.jsonl      one line an epoch
running.txt        while a process trains here, and after one that was killed or crashed: what to do then
failed.txt         why a run failed, until it goes on
checkpoint.pt      where the run is: weights, optimiser, position; replaced after every epoch and when the run is stopped
loss-*.safetensors what the loss keeps (soft labels, say), if anything; written again only when the loss has changed it
model.safetensors  the finished model
curves.png         loss and accuracy against the epoch, of a finished run
trace.json         with --profile, where the time of a few steps went: a Chrome trace
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from io import BytesIO
from pickle import UnpicklingError
from typing import Any

import torch

from rscli.config.layers import as_now, decisive
from rscli.config.settings import changes
from rscli.errors import InputError, PluginError, RscliError, Stopped, reason
from rscli.runtime.files import check_regular, explained, read_json, replacing, write_json, write_text
from rscli.runtime.progress import Progress
from rscli.runtime.run_files import IF_IT_CRASHED, RunFiles, Worker
from rscli.runtime.signals import COME_BACK, INTERRUPTED
from rscli.runtime.torchrun import launched
from rscli.training.checkpoint import check_data, check_position, check_seal, remedy, seal
from rscli.training.loss_state import LossStateFile
from rscli.training.processes import EndedByAnother


class RunFolder(RunFiles):
    """The files of a run, and the rules for starting and continuing it."""

    @cached_property
    def loss_state(self) -> LossStateFile:
        """The file with what the loss keeps."""
        return LossStateFile(self.path)

    def open(
        self, config: dict[str, Any], data: dict[str, Any], *, resume: bool, overwrite: bool = False
    ) -> dict[str, Any] | None:
        """The checkpoint to go on from, or None for a fresh start, which `start` begins; nothing is written here.

        `config` is {"config": ..., "sources": ..., "plugin_files": ..., "init_sha256": ...}, `data` what `training_data` says.
        Raises `InputError` as `admit` does, and if the checkpoint is damaged or of other data.
        """
        self.admit(config, resume=resume, overwrite=overwrite)
        if overwrite or not self.config.exists():
            return None
        for torn in self.path.glob(".*.part"):  # what a kill in the middle of a write left behind
            torn.unlink(missing_ok=True)
        if not self.checkpoint.exists():
            return None
        state = self.load()
        check_data(state.get("data"), data, self.checkpoint)
        return state

    def admit(self, config: dict[str, Any], *, resume: bool, overwrite: bool = False) -> None:
        """Raises `InputError` if a run of `config` may not begin or go on here; reads no checkpoint, writes nothing.

        So it is if there is a run already, and neither `resume` nor `overwrite` is asked for; if a process trains here; to
        resume, if the run has another configuration (naming the differences); to overwrite, if there is anything that a run
        did not write.
        """
        if not self.config.exists():
            if self.path.is_file():
                raise InputError(f"{self.path} is a file, not a folder for a run", "Choose another --out.")
            if self.model.exists():
                hint = "Choose another --out."
                raise InputError(f"{self.model} already exists, and no run in this folder wrote it", hint)
            return
        if not (resume or overwrite):
            hint = "Add --resume to continue it, --overwrite to replace it, or choose another folder with --out."
            raise InputError(f"{self.path} already holds a training run", hint)
        if worker := self._busy():
            raise InputError(f"{worker.text} is training in {self.path} right now", "Wait for it, or end it first.")
        if overwrite:
            self._check_removable()
        else:
            self._same(config)

    def _busy(self) -> Worker | None:
        """Another process that trains here now; a process of the same torchrun is none."""
        worker = self.worker()
        return worker if worker and worker.alive and worker.process != os.getpid() and launched().rank == 0 else None

    def _check_removable(self) -> None:
        strangers = self.strangers(self._recorded())
        if strangers:
            more = ", ..." if len(strangers) > 5 else ""
            raise InputError(
                f"{self.path} is not overwritten: besides the run it holds {', '.join(strangers[:5])}{more}",
                "Move or remove what a run does not write itself, or choose another folder with --out.",
            )

    def _recorded(self) -> dict[str, Any]:
        """The configuration of the run that is here; empty if it cannot be read."""
        try:
            config = read_json(self.config, "configuration of the run").get("config")
        except (InputError, AttributeError):
            return {}
        return config if isinstance(config, dict) else {}

    @contextmanager
    def at_work(self, progress: Progress) -> Iterator[None]:
        """While the body runs, the folder says that this process trains here; notes it if the one before has left no word."""
        if self.running.exists():
            progress.note(f"the previous run was killed, or crashed. {IF_IT_CRASHED}")
        self.mark()
        self.failed.unlink(missing_ok=True)
        try:
            yield
        except Stopped:
            raise
        except EndedByAnother as cause:
            if cause.code not in (COME_BACK, INTERRUPTED):
                self._say_failed(cause.why)
            raise
        except Exception as cause:
            self._say_failed(cause.message if isinstance(cause, RscliError) else reason(cause))
            raise
        finally:
            self.running.unlink(missing_ok=True)

    def _say_failed(self, why: str) -> None:
        with suppress(OSError, RscliError):  # the disk may be what failed
            write_text(self.failed, f"{why}\n")

    def save(self, state: dict[str, Any]) -> None:
        """Replaces the checkpoint. Raises `RscliError` if there is no room for it; the one before is kept."""
        try:
            sealed = seal(self.loss_state.put(state))
        except TypeError as cause:
            hint = "Callbacks and losses may keep tensors, text and plain Python numbers: float(x), not a NumPy number."
            raise PluginError(f"the state of the run cannot be saved: {cause}", hint) from cause
        content = BytesIO()  # writing to the disk itself, torch would say of a full one only that a position is unexpected
        torch.save(sealed, content)
        with replacing(self.checkpoint) as beside:
            beside.write_bytes(content.getbuffer())
        self.loss_state.tidy()

    def load(self) -> dict[str, Any]:
        """The checkpoint, tensors on the CPU. Raises `InputError` if it is broken; never runs code from the file."""
        try:
            check_regular(self.checkpoint)
            loaded = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except InputError:
            raise
        except OSError as cause:  # the file may be whole: nothing is to be removed
            raise explained(cause, f"the checkpoint {self.checkpoint} cannot be read") from cause
        except Exception as cause:  # torch raises many kinds for a broken file
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            if isinstance(cause, UnpicklingError):  # torch would advise to load it all the same
                reason = "it is damaged, or holds more than tensors and plain values"
            raise InputError(f"the checkpoint {self.checkpoint} cannot be read: {reason}", remedy(self.checkpoint)) from cause
        state = check_seal(loaded, self.checkpoint)
        check_position(state, self.checkpoint)
        return self.loss_state.take(state, self.checkpoint)

    def start(self, config: dict[str, Any], environment: dict[str, Any], *, overwrite: bool = False) -> None:
        """Begins a run: from now on the folder holds one. With `overwrite`, what another run wrote here is removed first."""
        if overwrite and self.config.exists():
            self.remove(self._recorded())
        write_json(self.environment, environment)
        write_json(self.config, config)  # last: its presence says that there is a run

    def _same(self, record: dict[str, Any]) -> None:
        before = read_json(self.config, "configuration of the run")
        if not isinstance(before, dict):
            raise InputError(f"{self.config} is not the configuration of a run", "Choose another --out.")
        old, new = (
            _what_counts(config, one, record)
            for one, config in ((before, as_now(before.get("config", {}))), (record, record["config"]))
        )
        differences = [f"  {key}: {a!r} in {self.path}, {b!r} now" for key, a, b in changes(old, new)]
        if differences:
            text = "\n".join([f"{self.path} was started with another configuration:", *differences])
            raise InputError(text, "Use the same preset and settings to resume, or another --out for another run.")


def _what_counts(config: Any, one: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """What two runs must share to be one: the configuration, and the digests of files, as far as the new `record` has them."""
    digests = {key: one.get(key) for key in ("init_sha256",) if key in record}
    return {**decisive(config), "plugin_files": one.get("plugin_files", {}), **digests}
