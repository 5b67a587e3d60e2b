"""The folder of a training run, and how a run continues in it.

config.json        the resolved configuration, with the source of every value
environment.json   versions, device, threads
metrics.jsonl      one line an epoch
checkpoint.pt      where the run is: weights, optimiser, position; replaced after every epoch and when the run is stopped
model.safetensors  the finished model
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from rscli.errors import InputError
from rscli.runtime.files import read_json, replacing, sweep, write_json, write_text, writing
from rscli.system import system_error
from rscli.training.checkpoint import check_position, remedy

CHECKPOINT_FORMAT = 1


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run, and the rules for starting and continuing it."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """The metrics, JSON lines."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        """The position of an unfinished run."""
        return self.path / "checkpoint.pt"

    @property
    def model(self) -> Path:
        """The finished model."""
        return self.path / "model.safetensors"

    def files(self) -> list[Path]:
        """Every file that a run writes here."""
        return [self.config, self.path / "environment.json", self.metrics, self.checkpoint, self.model]

    def begin(self, config: dict[str, Any], environment: dict[str, Any], *, resume: bool) -> dict[str, Any] | None:
        """Opens the folder; returns the checkpoint to go on from, or None for a fresh start.

        `config` is {"config": ..., "sources": ...}. Raises `InputError` if there is a run already and `resume` is not asked
        for, or the run there has another configuration (naming the differences).
        """
        if not self.config.exists():
            if self.path.is_file():
                raise InputError(f"{self.path} is a file, not a folder for a run", "Choose another --out.")
            if self.model.exists():
                hint = "Choose another --out."
                raise InputError(f"{self.model} is there already, and no run in this folder wrote it", hint)
            self._start(config, environment)
            return None
        if not resume:
            hint = "Add --resume to go on with it, choose another folder with --out, or remove this one."
            raise InputError(f"{self.path} holds a training run already", hint)
        self._same(config["config"])
        for file in self.files():
            sweep(file)
        if not self.checkpoint.exists():
            self._start(config, environment)
            return None
        state = self.load()
        self._keep_metrics(state["epoch"])
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replaces the checkpoint. Raises `RscliError` if there is no room for it; the one before is kept."""
        content = BytesIO()  # writing to the disk itself, torch would say of a full one only that a position is unexpected
        torch.save({"format": CHECKPOINT_FORMAT, **state}, content)
        with replacing(self.checkpoint) as beside:
            beside.write_bytes(content.getbuffer())

    def load(self) -> dict[str, Any]:
        """The checkpoint, tensors on the CPU. Raises `InputError` if it is broken; never runs code from the file."""
        hint = remedy(self.checkpoint)
        try:
            state: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except OSError as cause:  # it may be whole: nothing to remove
            raise system_error(cause, self.checkpoint, "read the checkpoint") from cause
        except Exception as cause:  # torch raises many kinds for a broken file
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            if isinstance(cause, UnpicklingError):  # torch would advise to load it all the same
                reason = "it is damaged, or holds more than tensors and plain values"
            raise InputError(f"the checkpoint {self.checkpoint} cannot be read: {reason}", hint) from cause
        needed = {"epoch", "batch", "model", "optimizer", "meter"}
        if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT or not needed <= set(state):
            raise InputError(f"{self.checkpoint} is not a checkpoint of this version of rscli", hint)
        check_position(state, self.checkpoint)
        return state

    def log(self, line: dict[str, Any]) -> None:
        """Appends one line of metrics."""
        with writing(self.metrics), self.metrics.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line) + "\n")

    def _start(self, config: dict[str, Any], environment: dict[str, Any]) -> None:
        write_json(self.path / "environment.json", environment)
        write_text(self.metrics, "")
        write_json(self.config, config)  # last: its presence says that there is a run

    def _same(self, config: dict[str, Any]) -> None:
        before = read_json(self.config, "configuration of the run")
        if not isinstance(before, dict):
            raise InputError(f"{self.config} is not the configuration of a run", "Choose another --out.")
        differences = [
            f"  {key}: {old!r} in {self.path}, {new!r} now" for key, old, new in _differences(before.get("config", {}), config)
        ]
        if differences:
            text = "\n".join([f"{self.path} was started with another configuration:", *differences])
            raise InputError(text, "Use the same preset and settings to resume, or another --out for another run.")

    def _keep_metrics(self, epochs: int) -> None:
        """Drops lines of epochs that were not saved before the run was killed, and a torn last line."""
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        write_text(self.metrics, "".join(line + "\n" for line in lines[:epochs]))


def _differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The leaves in which two nested dictionaries differ: (dotted key, old value, new value); None for a missing one."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [(prefix, old, new)]
    found = []
    for key in sorted({*old, *new}):
        found += _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    return found
