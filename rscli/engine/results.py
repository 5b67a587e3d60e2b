"""Result files: one line an image, append-only while a run lasts, sorted by index when it is finished.

A result file is text, separated by tabs, with a header. Its first six columns are those that the field's tools read (they
come from Cohen et al. 2019); the others are ours, and are missing from files that other tools wrote:

| column | meaning |
|---|---|
| idx, label | index of the image in its split, and its class |
| predict | the certified class, or -1 for an abstention |
| radius | certified radius at full precision, 0 for an abstention |
| correct | 1 if `predict` is `label`, else 0 |
| time | H:MM:SS.ffffff |
| n0, n | samples that selected the class, and samples that certified it |
| count, runner_up | of the n: those of the class under test, and those of the most frequent other class |
| reason | why sampling stopped |
| saturated | 1 if so many samples cannot give a larger radius |

Beside a file `results.tsv` lies `results.tsv.protocol.json`: everything that the rows depend on, and under `info` what they
do not. A line is whole or it does not count: whatever was cut off by a crash is sampled again.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape as glob_escape
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from rscli.api import ABSTAIN
from rscli.engine.files import read_json, write_json, write_text
from rscli.errors import InputError, RscliError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = 1
FIELD_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
COLUMNS = (*FIELD_COLUMNS, "n0", "n", "count", "runner_up", "reason", "saturated")
HEADER = "\t".join(COLUMNS) + "\n"

SYNC_SECONDS = 1.0
"""Rows reach the operating system at once; the disk is waited for this often at most."""

_TIME = re.compile(r"(?:(\d+) days?, )?(\d+):(\d\d):(\d\d(?:\.\d+)?)")


# --- one row -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One image. `seconds` is the column `time`; what a foreign file does not say is None."""

    idx: int
    label: int
    predict: int
    radius: float
    correct: bool
    seconds: float
    n0: int | None = None
    n: int | None = None
    count: int | None = None
    runner_up: int | None = None
    reason: str | None = None
    saturated: bool | None = None


def format_row(row: Row) -> str:
    """The line of `row`, with its line feed. The radius is written so that it reads back to the same bits."""
    reason = " ".join((row.reason or "").split())  # a plugin's text must not bring tabs or line feeds
    field = (row.idx, row.label, row.predict, repr(float(row.radius)), int(row.correct), _clock(row.seconds))
    ours = (row.n0, row.n, row.count, row.runner_up, reason, None if row.saturated is None else int(row.saturated))
    return "\t".join("" if cell is None else str(cell) for cell in (*field, *ours)) + "\n"


def parse_row(line: str, columns: Sequence[str] = COLUMNS) -> Row:
    """The row of a `line` whose cells are `columns`, ours or not. Raises `ValueError` saying what is wrong with it."""
    texts = _cells(line, len(columns))
    if len(texts) != len(columns):
        raise ValueError(f"it has {len(texts)} columns, not {len(columns)}")
    cells = dict(zip(columns, texts, strict=True))

    def integer(name: str) -> int:
        return int(_number(cells[name], name, int))

    def optional(name: str) -> int | None:
        return integer(name) if cells.get(name) else None

    row = Row(
        idx=integer("idx"),
        label=integer("label"),
        predict=integer("predict"),
        radius=_number(cells["radius"], "radius", float),
        correct=_flag(cells["correct"], "correct"),
        seconds=_seconds(cells["time"]),
        n0=optional("n0"),
        n=optional("n"),
        count=optional("count"),
        runner_up=optional("runner_up"),
        reason=cells.get("reason") or None,
        saturated=_flag(cells["saturated"], "saturated") if cells.get("saturated") else None,
    )
    _check(row)
    return row


def _check(row: Row) -> None:
    """Raises `ValueError` for a row that no certification can have written."""
    if row.idx < 0:
        raise ValueError(f"idx is {row.idx}, but an index is never negative")
    if not (math.isfinite(row.radius) and row.radius >= 0):
        raise ValueError(f"radius is {row.radius}, but a radius is finite and never negative")
    if row.correct != (row.predict == row.label):
        raise ValueError(f"correct is {int(row.correct)}, but predict is {row.predict} and label is {row.label}")
    if row.predict == ABSTAIN and row.radius > 0:
        raise ValueError(f"radius is {row.radius}, but an abstention (predict -1) has radius 0")


def _cells(line: str, wanted: int) -> list[str]:
    """The stripped cells of a line, without empty ones beyond `wanted` (some tools end their lines with blanks)."""
    cells = [cell.strip() for cell in line.split("\t")]
    while len(cells) > wanted and not cells[-1]:
        cells.pop()
    return cells


def _number(text: str, name: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, but must be a{' whole' if kind is int else ''} number") from None


def _flag(text: str, name: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(f"{name} is {text!r}, but must be 0 or 1")
    return text == "1"


def _clock(seconds: float) -> str:
    whole, micro = divmod(round(seconds * 1e6), 1_000_000)
    minutes, second = divmod(whole, 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}.{micro:06d}"


def _seconds(text: str) -> float:
    """Seconds of H:MM:SS, with or without a fraction, and with the days that Python's timedelta puts in front."""
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(f"time is {text!r}, but must be H:MM:SS, as in 0:00:16.301146")
    days, hours, minutes, seconds = found.groups()
    return int(days or 0) * 86_400 + int(hours) * 3600 + int(minutes) * 60 + float(seconds)


# --- the protocol ------------------------------------------------------------------------------------------------------------


def protocol_path(path: Path) -> Path:
    """Where the protocol of the result file `path` lies."""
    return path.with_name(f"{path.name}.protocol.json")


def read_protocol(path: Path) -> dict[str, Any] | None:
    """The protocol of the result file `path`; None if it has none. Raises `InputError` if it is broken or of a newer format."""
    beside = protocol_path(path)
    if not beside.exists():
        return None
    protocol = read_json(beside, "protocol file")
    if not isinstance(protocol, dict) or not isinstance(protocol.get("format"), int):
        raise InputError(f"{beside} is not the protocol of a result file: it has no format number")
    if protocol["format"] > FORMAT:
        raise InputError(f"{beside} has format {protocol['format']}, this rscli reads up to {FORMAT}", "Update rscli.")
    return protocol


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One text for each value in which two JSON objects differ, such as `certifier.alpha was 0.001, is now 0.01`."""
    old, new = _flat(before), _flat(now)
    keys = [*old, *(key for key in new if key not in old)]
    return [f"{key} was {_shown(old, key)}, is now {_shown(new, key)}" for key in keys if _shown(old, key) != _shown(new, key)]


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, with dotted keys."""
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return out


def _shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "absent"


# --- writing -----------------------------------------------------------------------------------------------------------------


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
        self._file = self._target.open("ab", buffering=0)
        self._size = self._target.stat().st_size
        self._synced = time.monotonic()

    @classmethod
    def create(cls, path: Path, protocol: dict[str, Any]) -> Self:
        """Begins a new file, its protocol first. Raises `InputError` if there is a file at `path` already."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.open("xb").close()  # claims the name, so that of two processes only one writes a protocol
        except FileExistsError as cause:
            hint = "Go on with it (--resume), or write to another file (--out)."
            raise InputError(f"the result file {path} exists already", hint) from cause
        write_json(protocol_path(path), protocol)
        return cls._begun(path)

    @classmethod
    def resume(cls, path: Path, protocol: dict[str, Any]) -> Self:
        """Goes on with the file at `path`; a last line that is not whole is cut off, and its image is to be done again.

        Parts of the result that other processes left are taken in.

        Raises `InputError` if the file is missing or foreign, a line before the last is broken, or the protocol differs in
        anything but `info`. What differs in `info` goes to `notes`: the protocol file keeps what the run began with.
        """
        if not path.exists() and parts_of(path):
            path.touch()
        rows, whole = _whole_rows(path)
        before = read_protocol(path)
        if before is None and not whole:  # interrupted between claiming the name and writing the protocol
            write_json(protocol_path(path), before := protocol)
        notes = _agree(path, before, json.loads(json.dumps(protocol)))
        if path.stat().st_size > whole:
            os.truncate(path, whole)
        writer = cls(path, _union(path, rows), notes)
        if not whole:
            writer._write(HEADER)
        return writer

    @classmethod
    def join(cls, path: Path, protocol: dict[str, Any], part: str) -> Self:
        """Goes on with one `part` of the result at `path`, or begins it; what is decided elsewhere is known, and only read.

        Raises `InputError` as `resume` does.
        """
        before = read_protocol(path)
        if before is None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(protocol_path(path), before := protocol)
        notes = _agree(path, before, json.loads(json.dumps(protocol)))
        target = part_path(path, part)
        target.touch()
        _, whole = _whole_rows(target)
        os.truncate(target, whole)
        writer = cls(path, _union(path, _whole_rows(path)[0] if path.exists() else []), notes, part)
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
        self.rows = sorted(_union(self.path, self.rows), key=lambda row: row.idx)
        text = HEADER + "".join(format_row(row) for row in self.rows)
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            write_text(self.path, text)
        for part in parts_of(self.path):
            part.unlink()

    def close(self) -> None:
        """Closes the file, with every row on the disk. May be called again."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

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


def part_path(path: Path, part: str) -> Path:
    """Where the part called `part` of the result `path` lies."""
    return path.with_name(f"{path.name}.part-{part}")


def parts_of(path: Path) -> list[Path]:
    """The parts of the result `path` that are there, by name."""
    return sorted(path.parent.glob(f"{glob_escape(path.name)}.part-*"))


def result_of(path: Path) -> Path:
    """The result that `path` is, or is a part of."""
    return path.with_name(path.name.partition(".part-")[0])


def _union(path: Path, rows: list[Row]) -> list[Row]:
    """`rows`, and those of the parts of `path`; an image that two processes did counts once (its rows say the same)."""
    found = {row.idx: row for part in parts_of(path) for row in _whole_rows(part)[0]}
    return list({**found, **{row.idx: row for row in rows}}.values())


def _whole_rows(path: Path) -> tuple[list[Row], int]:
    """The rows of one of our files, and how many of its bytes are whole lines; 0 if not even the header is."""
    try:
        *lines, torn = path.read_bytes().split(b"\n")
    except OSError as cause:
        raise InputError(f"the result file {path} cannot be read: {cause}", "Without --resume a new one is begun.") from cause
    header = HEADER.rstrip().encode()
    if not lines and header.startswith(torn):
        return [], 0
    if not lines or lines[0] != header:
        raise InputError(f"{path} is not a result file that rscli wrote, so it cannot be continued", "Choose another --out.")
    rows: list[Row] = []
    seen: set[int] = set()
    whole = len(lines[0]) + 1
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = parse_row(line.decode())
        except ValueError as cause:
            if number == len(lines) and not torn:  # the last line: a crash may have left it like this
                break
            raise _broken(path, number, cause) from cause
        if row.idx in seen:
            raise _broken(path, number, f"image {row.idx} is in an earlier line already")
        seen.add(row.idx)
        rows.append(row)
        whole += len(line) + 1
    return rows, whole


def _agree(path: Path, before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """What differs in `info`, as notes. Raises `InputError` if there is no protocol, or anything else differs."""
    if before is None:
        raise InputError(
            f"{path} has no protocol beside it ({protocol_path(path).name}), so nobody knows how its rows were made",
            "Put the protocol file back, or choose another --out.",
        )
    info = [dict(protocol.get("info") or {}) for protocol in (before, now)]
    changed = differences({**before, "info": {}}, {**now, "info": {}})
    if changed:
        raise InputError(
            f"{path} was begun with another protocol:\n" + "\n".join(f"  {line}" for line in changed),
            "Rows of one file must be comparable. Use the same model, data and options, or choose another --out.",
        )
    return [f"{path.name}, since it was begun: {line}" for line in differences(*info)]


def _broken(path: Path, number: int, why: object) -> InputError:
    return InputError(f"{path}, line {number}: {why}", "Restore the file, or remove that line.")


# --- reading -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """A result file, ours or another tool's: arrays (images,) in the order of its lines.

    `radius` is >= 0; `seconds` is the column `time`. Our own columns are None unless every row has them. `protocol` is None
    for a file that has none beside it; `notes` are lines that a reader should know of.
    """

    path: Path
    name: str
    idx: NDArray[np.int64]
    label: NDArray[np.int64]
    predict: NDArray[np.int64]
    radius: NDArray[np.float64]
    correct: NDArray[np.bool_]
    seconds: NDArray[np.float64]
    n0: NDArray[np.int64] | None = None
    n: NDArray[np.int64] | None = None
    count: NDArray[np.int64] | None = None
    runner_up: NDArray[np.int64] | None = None
    reason: tuple[str, ...] | None = None
    saturated: NDArray[np.bool_] | None = None
    protocol: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def read_results(path: Path) -> Results:
    """Reads a result file of ours, or one that the field's other tools wrote; a folder stands for its `results.tsv`.

    Understands times with and without microseconds or days, blanks at the ends of lines, CRLF, more columns than it knows.
    A last line of ours without line feed (its run goes on, or was killed) is left out, with a note. Raises `InputError` with
    the line number for every broken line, and for a file that is missing, empty or of another kind.
    """
    path = result_of(path / "results.tsv" if path.is_dir() else path)
    protocol = read_protocol(path)
    if parts := parts_of(path):
        together = _union(path, _whole_rows(path)[0] if path.exists() else [])
        note = f"{path}: its {len(parts)} parts are not put together yet; `rscli certify --resume` does that"
        return _results(path, sorted(together, key=lambda row: row.idx), protocol, (note,))
    header, *lines = _text(path).split("\n")
    columns = _columns(path, header)
    notes: tuple[str, ...] = ()
    if protocol is not None and lines and lines[-1]:  # rscli ends every line; other tools may not end the last
        del lines[-1]
        notes = (f"{path}: the last line is not whole and is left out; its run goes on, or was stopped",)
    rows: dict[int, Row] = {}
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        try:
            row = parse_row(line, columns)
        except ValueError as cause:
            raise _broken(path, number, cause) from cause
        if row.idx in rows:
            raise _broken(path, number, f"image {row.idx} is in an earlier line already")
        rows[row.idx] = row
    if not rows:
        raise InputError(f"{path} has no rows: not one image is certified in it", "`rscli certify --resume` goes on with it.")
    return _results(path, list(rows.values()), protocol, notes)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as cause:
        raise InputError(f"there is no result file {path}", "`rscli certify` writes one.") from cause
    except UnicodeDecodeError as cause:
        raise InputError(f"{path} is not a result file: it is not text", _EXPECTED) from cause
    except OSError as cause:
        raise InputError(f"the result file {path} cannot be read: {cause}") from cause


_EXPECTED = f"A result file has columns separated by tabs, and a header with at least {' '.join(FIELD_COLUMNS)}."


def _columns(path: Path, header: str) -> list[str]:
    """The names in the header. Raises `InputError` if one that is needed is missing, or one is there twice."""
    names = _cells(header, 1)
    missing = [name for name in FIELD_COLUMNS if name not in names]
    if missing:
        found = header.strip()[:80] or "an empty line"
        raise InputError(f"{path} is not a result file: no column {', '.join(missing)}; its first line is {found!r}", _EXPECTED)
    if len(set(names)) < len(names):
        raise InputError(f"{path} has two columns of the same name: {' '.join(names)}", _EXPECTED)
    return names


def _results(path: Path, rows: list[Row], protocol: dict[str, Any] | None, notes: tuple[str, ...]) -> Results:
    def ints(name: str) -> NDArray[np.int64] | None:
        values = [getattr(row, name) for row in rows]
        return None if None in values else np.array(values, np.int64)

    saturated = ints("saturated")
    reasons = tuple(row.reason for row in rows if row.reason is not None)
    return Results(
        path=path,
        name=path.resolve().parent.name if path.name == "results.tsv" else path.stem,
        idx=np.array([row.idx for row in rows], np.int64),
        label=np.array([row.label for row in rows], np.int64),
        predict=np.array([row.predict for row in rows], np.int64),
        radius=np.array([row.radius for row in rows], np.float64),
        correct=np.array([row.correct for row in rows], np.bool_),
        seconds=np.array([row.seconds for row in rows], np.float64),
        n0=ints("n0"),
        n=ints("n"),
        count=ints("count"),
        runner_up=ints("runner_up"),
        reason=reasons if len(reasons) == len(rows) else None,
        saturated=None if saturated is None else saturated.astype(np.bool_),
        protocol=protocol,
        notes=notes,
    )
