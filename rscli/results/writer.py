"""Writes result files: append-only while a run lasts, one file sorted by index when it is finished.

A line is whole or it does not count: whatever a crash cut off is sampled again.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rscli.errors import InputError, RscliError
from rscli.results.protocol import agree, protocol_path, read_protocol
from rscli.results.rows import HEADER, Row, format_row, parse_row
from rscli.results.shards import missing_shards, part_path, parts_of, torn_of, union, whole_rows
from rscli.runtime.files import behind_links, opening, write_json, write_text, writing

SYNC_SECONDS = 1.0
"""Rows reach the operating system at once; the disk is waited for this often at most."""


class ResultWriter:
    """Appends rows to a result file; begin with `create`, `resume` or `join`, and use it in a `with` block.

    Several processes that work on one result write a part each, beside the result and under its protocol; `finish` makes one
    file of them. `rows` are those of the result so far, of all its parts; `done` are their indices, and `notes` are lines that
    a user who resumes should read.
    """

    def __init__(self, path: Path, rows: list[Row], notes: list[str], part: str | None = None) -> None:
        self.path, self.rows, self.notes = path, rows, notes
        self.done = {row.idx for row in rows}
        self._target = path if part is None else part_path(path, part)
        with writing(self._target):
            self._file = self._target.open("ab", buffering=0)
        self._size = self._target.stat().st_size
        self._synced = time.monotonic()

    @classmethod
    def create(cls, path: Path, protocol: dict[str, Any]) -> Self:
        """Begins a new file, its protocol first. Raises `InputError` if there is a file at `path` already."""
        if path.exists():
            raise _exists(path)
        with opening(path):
            try:
                behind_links(path).open("xb").close()  # claims the name, so that of two processes only one writes a protocol
            except FileExistsError as cause:
                raise _exists(path) from cause
        try:
            write_json(protocol_path(path), protocol)
        except RscliError:
            behind_links(path).unlink(missing_ok=True)  # an empty result would stand in the way of the next try
            raise
        return cls._begun(path)

    @classmethod
    def resume(cls, path: Path, protocol: dict[str, Any]) -> Self:
        """Goes on with the file at `path`; a last line that is not whole is cut off, and its image is to be done again.

        Parts of the result that other processes left are taken in.

        Raises `InputError` if the file is missing or foreign, a line before the last is broken, or the protocol differs in
        anything but `info`. What differs in `info` goes to `notes`: the protocol file keeps what the run began with.
        """
        elsewhere = union(path, [])
        rows, whole = whole_rows(path) if path.exists() or not parts_of(path) else ([], 0)
        before = read_protocol(path)
        if before is None and not whole and not elsewhere:  # interrupted between claiming the name and writing the protocol
            write_json(protocol_path(path), before := protocol)
        notes = agree(path, before, json.loads(json.dumps(protocol))) + _missing(path)
        if path.exists() and path.stat().st_size > whole:
            os.truncate(path, whole)
        writer = cls(path, union(path, rows), notes)
        if not whole:
            writer._write(HEADER)
        return writer

    @classmethod
    def join(cls, path: Path, protocol: dict[str, Any], part: str) -> Self:
        """Goes on with one `part` of the result at `path`, or begins it; what is decided elsewhere is known, and only read.

        Raises `InputError` as `resume` does.
        """
        begun = bool(union(path, [])) or (path.exists() and path.stat().st_size > 0)  # before the protocol is looked for:
        before = read_protocol(path)  # whoever has written a row wrote that first
        if before is None and not begun:
            write_json(protocol_path(path), protocol)
            before = read_protocol(path)  # another process may have written its own at the same moment
        notes = agree(path, before, json.loads(json.dumps(protocol)))
        notes += [] if part.startswith("shard") else _missing(path)
        target = part_path(path, part)
        with writing(target):
            target.touch()
        _, whole = whole_rows(target)
        os.truncate(target, whole)
        writer = cls(path, union(path, whole_rows(path)[0] if path.exists() else []), notes, part)
        if not whole:
            writer._write(HEADER)
        return writer

    @classmethod
    def _begun(cls, path: Path) -> Self:
        writer = cls(path, [], [])
        writer._write(HEADER)
        return writer

    def append(self, row: Row) -> None:
        """Writes one row, at once. Raises `RscliError` if the disk is full or another process writes to the file.

        A row that could not be read back, or whose image is in the file already, is a defect of the caller: `ValueError`.
        """
        if row.idx in self.done:
            raise ValueError(f"image {row.idx} is in {self.path} already")
        line = format_row(row)
        as_read = parse_row(line)
        self._write(line)
        self.rows.append(as_read)
        self.done.add(row.idx)

    def finish(self) -> None:
        """One file of all rows, sorted by index, atomically; parts are removed. Leaves alone what is finished already."""
        self.close()
        self._alone()
        self.rows = sorted(union(self.path, self.rows), key=lambda row: row.idx)
        text = HEADER + "".join(format_row(row) for row in self.rows)
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            write_text(self.path, text)
        for part in (*parts_of(self.path), *torn_of(self.path)):
            part.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the file, with every row on the disk; a part without rows is removed. May be called again."""
        if not self._file.closed:
            with writing(self._target), self._file:
                os.fsync(self._file.fileno())
            if self._target != self.path and self._size == len(HEADER):
                self._target.unlink(missing_ok=True)
                self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _write(self, text: str) -> None:
        self._alone()
        rest = text.encode()
        self._size += len(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as cause:
            hint = "The rows before are saved. Make room, and run the same command with --resume."
            raise RscliError(f"cannot write to {self.path}: {cause}", hint) from cause

    def _alone(self) -> None:
        """Raises `RscliError` if somebody else has written to the file since we did."""
        size = self._target.stat().st_size if self._target.exists() else 0
        if size != self._size:
            raise RscliError(
                f"{self._target} was changed while this run wrote to it: {self._size} bytes were expected, {size} are there",
                "Another process certifies into the same file. Give each its own --out, then run this one with --resume.",
            )


def _missing(path: Path) -> list[str]:
    """A note if shards are missing, for whoever puts the others together: it may be much work."""
    missing = missing_shards(path)
    return [] if missing is None else [f"{path.name}: missing shards: {missing}; their images are certified now"]


def _exists(path: Path) -> InputError:
    return InputError(f"the result file {path} exists already", "Go on with it (--resume), or write to another file (--out).")
