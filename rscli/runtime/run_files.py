"""The files of a run folder by name, and the mark of the process that trains there; knows no torch, for quick listings."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rscli.runtime.files import write_text

IF_IT_CRASHED = (
    "After a crash in native code (exit code 134 or 139), try --contiguous, --workers 0, or another version of torch; "
    "killed silently (137), it probably ran out of memory."
)

_MARK = re.compile(r"Process (\d{1,10})(?: on (\S+))? trains here\.")


@dataclass(frozen=True)
class RunFiles:
    """The paths of a run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        """Versions, device, threads."""
        return self.path / "environment.json"

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

    @property
    def running(self) -> Path:
        """The mark of a process that trains here."""
        return self.path / "running.txt"

    @property
    def failed(self) -> Path:
        """Why the run before ended, if it failed."""
        return self.path / "failed.txt"

    @property
    def curves(self) -> Path:
        """Loss and accuracy against the epoch, drawn."""
        return self.path / "curves.png"

    @property
    def trace(self) -> Path:
        """The profile of a few steps, if one was asked for: a Chrome trace."""
        return self.path / "trace.json"

    def files(self) -> list[Path]:
        """Every file that a finished run leaves here, but for those of its loggers and callbacks."""
        return [self.config, self.environment, self.checkpoint, self.model, self.curves]

    def logs(self, config: Mapping[str, Any]) -> list[Path]:
        """Where its loggers may have kept JSON lines: the usual file, and those that `config`, as recorded, names."""
        loggers = config.get("loggers")
        tables = loggers.values() if isinstance(loggers, dict) else ()
        named = (value for table in tables if isinstance(table, dict) for value in table.values())
        inside = (value for value in named if isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]*\.jsonl", value))
        return [*dict.fromkeys([self.metrics, *(self.path / value for value in inside)])]

    def strangers(self, config: Mapping[str, Any]) -> list[str]:
        """The names of what is in the folder, and was not written by a run of the recorded `config`."""
        ours = {file.name for file in self._removable(config)}
        return sorted(each.name for each in self.path.iterdir() if each.name not in ours or each.is_dir())

    def remove(self, config: Mapping[str, Any]) -> None:
        """Removes what a run of the recorded `config` wrote here; the configuration, whose presence says that there is a run,
        last.
        """
        for file in self._removable(config):
            if file != self.config:
                file.unlink(missing_ok=True)
        self.config.unlink(missing_ok=True)

    def _removable(self, config: Mapping[str, Any]) -> Iterable[Path]:
        torn = self.path.glob(".*.part")  # what a kill in the middle of a write left behind
        models = [*self.path.glob("loss-*.safetensors"), *self.path.glob("model-*.safetensors")]
        return [*self.files(), self.running, self.failed, self.trace, *models, *self.logs(config), *torn]

    def mark(self) -> None:
        """Says that this process trains here."""
        word = "If it is gone, it was killed, or crashed: go on with --resume."
        here = re.sub(r"\s", "-", socket.gethostname()) or "localhost"
        write_text(self.running, f"Process {os.getpid()} on {here} trains here. {word} {IF_IT_CRASHED}\n")

    def worker(self) -> Worker | None:
        """The process that the mark names; None without a mark, or with one that names none."""
        try:
            text, written = self.running.read_text(encoding="utf-8", errors="replace")[:1000], self.running.stat().st_mtime
        except OSError:
            return None
        found = _MARK.match(text)
        return None if found is None else Worker(int(found[1]), found[2], written)


@dataclass(frozen=True)
class Worker:
    """A process by its number, the machine it is on (None: an older version did not say), and when it said so (seconds)."""

    process: int
    machine: str | None
    since: float

    @property
    def alive(self) -> bool | None:
        """Whether it still runs; None if it is on another machine, where nobody can tell from here."""
        if self.machine not in (None, socket.gethostname()):
            return None
        try:
            os.kill(self.process, 0)
        except PermissionError:
            pass  # it is there, and somebody else's
        except (OSError, OverflowError):
            return False
        began = _began(self.process)
        return began is None or began <= self.since + 60  # a later process was given the number of one that is gone

    @property
    def text(self) -> str:
        """For messages."""
        return f"process {self.process}" + (f" on {self.machine}" if self.machine else "")


def _began(process: int) -> float | None:
    """When a process began, in seconds since 1970; None where the system does not say (all but Linux)."""
    with suppress(OSError, ValueError, IndexError):
        ticks = int(Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")
    return None
