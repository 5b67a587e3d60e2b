"""The log of a run as JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from rscli.api import Logger, LogWriter, Run


class JsonLines(Logger):
    """One JSON object per epoch, in a file of the run folder."""

    file: str = Field("metrics.jsonl", pattern=r"^[\w-][\w.-]*$", max_length=100, description="name in the run folder")

    def open(self, run: Run) -> LogWriter:
        """Goes on with the file: lines of epochs that were not saved before a kill are dropped, and so is a torn last one."""
        path = run.folder / self.file
        lines = path.read_bytes().split(b"\n")[: run.epoch] if path.exists() else []
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        beside.write_bytes(b"".join(line + b"\n" for line in lines if line))
        beside.replace(path)
        return _Lines(path)


class _Lines(LogWriter):
    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one line."""
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line) + "\n")
