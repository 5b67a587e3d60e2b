"""The folder of a training run, and how a run continues in it.

config.json        the resolved configuration, with the source of every value
environment.json   versions, device, threads
metrics.jsonl      one line an epoch
running.txt        while a process trains here, and after one that was killed or crashed: what to do then
checkpoint.pt      where the run is: weights, optimiser, position; replaced after every epoch and when the run is stopped
loss-*.safetensors what the loss keeps (soft labels, say), if anything; written again only when the loss has changed it
model.safetensors  the finished model
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch

from rscli.api import Callback
from rscli.config.layers import rebuild
from rscli.config.schema import GROUPS
from rscli.config.settings import changes
from rscli.errors import InputError, PluginError, RscliError
from rscli.registry import installed
from rscli.runtime.files import check_regular, explained, read_json, replacing, write_json, write_text
from rscli.runtime.progress import Progress
from rscli.training.checkpoint import check_data, check_position, check_seal, remedy, seal
from rscli.training.loss_state import LossStateFile

IF_IT_CRASHED = (
    "After a crash in native code (exit code 134 or 139), try --contiguous, --workers 0, or another version of torch; "
    "killed silently (137), it probably ran out of memory."
)


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run, and the rules for starting and continuing it."""

    path: Path

    @cached_property
    def loss_state(self) -> LossStateFile:
        """The file with what the loss keeps."""
        return LossStateFile(self.path)

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.json"

    @property
    def checkpoint(self) -> Path:
        """The position of an unfinished run."""
        return self.path / "checkpoint.pt"

    @property
    def model(self) -> Path:
        """The finished model."""
        return self.path / "model.safetensors"

    @property
    def running(self) -> Path:
        """The mark of a process that trains here."""
        return self.path / "running.txt"

    def files(self) -> list[Path]:
        """Every file that a run writes here, but for those of its loggers and callbacks."""
        return [self.config, self.path / "environment.json", self.checkpoint, self.model]

    def open(self, config: dict[str, Any], data: dict[str, Any], *, resume: bool) -> dict[str, Any] | None:
        """The checkpoint to go on from, or None for a fresh start, which `start` begins; nothing is written here.

        `config` is {"config": ..., "sources": ..., "plugin_files": ..., "init_sha256": ...}, `data` what `training_data` says.
        Raises `InputError` if there is a run already and `resume` is not asked for, if the run there has another configuration
        or other data (naming the differences), or if its checkpoint is damaged.
        """
        if not self.config.exists():
            if self.path.is_file():
                raise InputError(f"{self.path} is a file, not a folder for a run", "Choose another --out.")
            if self.model.exists():
                hint = "Choose another --out."
                raise InputError(f"{self.model} already exists, and no run in this folder wrote it", hint)
            return None
        if not resume:
            hint = "Add --resume to continue it, choose another folder with --out, or remove this one."
            raise InputError(f"{self.path} already holds a training run", hint)
        self._same(config)
        for torn in self.path.glob(".*.part"):  # what a kill in the middle of a write left behind
            torn.unlink(missing_ok=True)
        if not self.checkpoint.exists():
            return None
        state = self.load()
        check_data(state.get("data"), data, self.checkpoint)
        return state

    @contextmanager
    def at_work(self, progress: Progress) -> Iterator[None]:
        """While the body runs, the folder says that this process trains here; notes it if the one before has left no word."""
        if self.running.exists():
            progress.note(f"the previous run was killed, or crashed. {IF_IT_CRASHED}")
        word = "If it is gone, it was killed, or crashed: continue with --resume."
        write_text(self.running, f"Process {os.getpid()} trains here. {word} {IF_IT_CRASHED}\n")
        try:
            yield
        finally:
            self.running.unlink(missing_ok=True)

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

    def start(self, config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Begins a run: from now on the folder holds one."""
        write_json(self.path / "environment.json", environment)
        write_json(self.config, config)  # last: its presence says that there is a run

    def _same(self, record: dict[str, Any]) -> None:
        before = read_json(self.config, "configuration of the run")
        if not isinstance(before, dict):
            raise InputError(f"{self.config} is not the configuration of a run", "Choose another --out.")
        old, new = (
            {**_decisive(config), "plugin_files": one.get("plugin_files", {}), "init_sha256": one.get("init_sha256")}
            for one, config in ((before, _as_now(before.get("config", {}))), (record, record["config"]))
        )
        differences = [f"  {key}: {a!r} in {self.path}, {b!r} now" for key, a, b in changes(old, new)]
        if differences:
            text = "\n".join([f"{self.path} was started with another configuration:", *differences])
            raise InputError(text, "Use the same preset and settings to resume, or another --out for another run.")


def _as_now(config: Any) -> Any:
    """A recorded configuration in the words of this version; unchanged where it does not hold any more."""
    try:
        return rebuild(config).as_dict()
    except (RscliError, AttributeError, TypeError, ValueError):
        return config


def _decisive(config: Any) -> Any:
    """Without what only looks on, and may differ in a run that is resumed: loggers, and callbacks that say so of themselves."""
    if not isinstance(config, dict):
        return config
    callbacks = {name: fields for name, fields in (config.get("callbacks") or {}).items() if not _looks_on(name)}
    kept = {key: value for key, value in config.items() if key not in (*GROUPS, "init")}  # its digest counts, not its path
    return {**kept, "callbacks": callbacks} if callbacks else kept


def _looks_on(callback: str) -> bool:
    try:
        return cast(type[Callback], installed().load("callbacks", callback)).looks_on
    except PluginError:
        return False
