"""Writes result files: append-only while a run lasts, one file sorted by index when it is finished.

A line is whole or it does not count: whatever a crash cut off is sampled again.
"""

from __future__ import annotations

import codecs
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rscli.errors import InputError, RscliError
from rscli.results.protocol import agree, claim, protocol_path, read_protocol
from rscli.results.rows import HEADER, Row, format_row, parse_row
from rscli.results.shards import missing_shards, part_head, part_path, parts_of, torn_of, union, whole_rows
from rscli.runtime.files import opening, replacing, sync, write_text, writing

SYNC_SECONDS = 1.0
"""Rows reach the operating system at once; the disk is waited for this often at most."""


class ResultWriter:
    """Appends rows to a result file; begin with `create`, `resume` or `join`, and use it in a `with` block.

    Several processes that work on one result write a part each, beside the result and under its protocol; `finish` makes one
    file of them. `rows` are those of the result so far, of all its parts; `done` are their indices, `protocol` is what lies
    beside the result, and `notes` are lines that a user who resumes should read.
    """

    def __init__(
        self, path: Path, rows: list[Row], notes: list[str], protocol: dict[str, Any], part: str | None = None
    ) -> None:
        self.path, self.rows, self.notes, self.protocol = path, rows, notes, protocol
        self.done = {row.idx for row in rows}
        self._target = path if part is None else part_path(path, part)
        with writing(self._target):
            self._file = self._target.open("ab", buffering=0)
        self._size = self._target.stat().st_size
        self._synced = time.monotonic()

    @classmethod
    def create(cls, path: Path, protocol: dict[str, Any]) -> Self:
        """Begins a new file, its protocol first.

        Raises `InputError` if there is a file at `path` already, or the protocol of another run (of two processes that begin at
        once, only one does).
        """
        if path.exists():
            raise _exists(path)
        with opening(path):
            there = claim(path, protocol)
        try:
            notes = agree(path, there, json.loads(json.dumps(protocol)))
        except InputError as cause:
            hint = f"Choose another --out; or remove {protocol_path(path)}, if the run that wrote it is abandoned."
            raise InputError(cause.message, hint) from cause
        with writing(path):
            try:
                # of two processes under one protocol, only one writes rows here; through a link that leads nowhere yet
                Path(os.path.realpath(path)).open("xb").close()
            except FileExistsError as cause:
                raise _exists(path) from cause
        writer = cls(path, [], notes, there)
        writer._write(HEADER)
        return writer

    @classmethod
    def resume(cls, path: Path, protocol: dict[str, Any]) -> Self:
        """Goes on with the file at `path`; a last line that is not whole is cut off, and its image is to be done again.

        Parts of the result that other processes left are taken in. Line ends and marks that an editor put in are taken out.

        Raises `InputError` if the file is missing or foreign, a line before the last is broken, a row cannot be under the
        protocol, or the protocol differs in anything but `info`. What differs in `info` goes to `notes`: the protocol file
        keeps what the run began with.
        """
        before = read_protocol(path)
        repaired = _repaired(path)
        if before is None and not _anything(path, repaired):  # interrupted before the protocol was written
            with opening(path):
                before = claim(path, protocol)
        notes = agree(path, before, json.loads(json.dumps(protocol))) + _missing(path)
        assert before is not None
        elsewhere = union(path, [], before)
        if repaired is not None:
            with replacing(path) as beside:
                beside.write_bytes(repaired)
            notes.append(f"{path.name}: an editor had changed its line endings or its encoding; this is repaired")
        rows, whole = whole_rows(path, before) if path.exists() or not elsewhere else ([], 0)
        if path.exists() and path.stat().st_size > whole:
            os.truncate(path, whole)
        writer = cls(path, union(path, rows, before), notes, before)
        if not whole:
            writer._write(HEADER)
        return writer

    @classmethod
    def join(cls, path: Path, protocol: dict[str, Any], part: str) -> Self:
        """Goes on with one `part` of the result at `path`, or begins it; what is decided elsewhere is known, and only read.

        Raises `InputError` as `resume` does.
        """
        begun = _anything(path, None)  # before the protocol is looked for: whoever has written a row wrote that first
        before = read_protocol(path)
        if before is None and not begun:
            with opening(path):
                before = claim(path, protocol)
        notes = agree(path, before, json.loads(json.dumps(protocol)))
        assert before is not None
        notes += [] if part.startswith("shard") else _missing(path)
        done = union(path, whole_rows(path, before)[0] if path.exists() else [], before)
        target = part_path(path, part)
        with writing(target):
            target.touch()
        _, whole = whole_rows(target, before)
        os.truncate(target, whole)
        writer = cls(path, done, notes, before, part)
        if not whole:
            writer._write(part_head(before))
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
        self.rows = sorted(union(self.path, self.rows, self.protocol), key=lambda row: row.idx)
        text = HEADER + "".join(format_row(row) for row in self.rows)
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            write_text(self.path, text)
        for part in (*parts_of(self.path), *torn_of(self.path)):
            part.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the file, with every row on the disk; a part without rows is removed. May be called again."""
        if not self._file.closed:
            with writing(self._target), self._file:
                sync(self._file.fileno())
            if self._target != self.path and self._size == len(part_head(self.protocol)):
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
                sync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as cause:
            hint = "The rows before it are saved. Make room, and run the same command with --resume."
            raise RscliError(f"cannot write to {self.path}: {cause}", hint) from cause

    def _alone(self) -> None:
        """Raises `RscliError` if somebody else has written to the file since we did."""
        size = self._target.stat().st_size if self._target.exists() else 0
        if size != self._size:
            raise RscliError(
                f"{self._target} was changed while this run wrote to it: {self._size} bytes were expected, {size} are there",
                "Another process certifies into the same file. Give each its own --out, then run this one with --resume.",
            )


def _anything(path: Path, repaired: bytes | None) -> bool:
    """Whether the result `path` has a header, or a part of it has rows. Raises as `whole_rows` does."""
    if repaired is not None or (path.exists() and whole_rows(path, None)[1] > 0):
        return True
    return any(whole_rows(part, None)[0] for part in parts_of(path))


def _repaired(path: Path) -> bytes | None:
    """What rscli wrote to `path`, if an editor has changed its line ends or encoding, and nothing else; None if it has not.

    Only a file whose first line is then our header is repaired.
    """
    if not path.is_file():
        return None
    try:
        content = path.read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None  # whoever reads it says what is wrong
    plain = text.replace("\r\n", "\n").replace("\r", "\n").encode()
    return plain if plain != content and plain.startswith(HEADER.encode()) else None


def _missing(path: Path) -> list[str]:
    """A note if shards are missing, for whoever puts the others together: it may be much work."""
    missing = missing_shards(path)
    return [] if missing is None else [f"{path.name}: missing shards: {missing}; their images are certified now"]


def _exists(path: Path) -> InputError:
    return InputError(f"the result file {path} already exists", "Continue it (--resume), or write to another file (--out).")
