"""Reads result files: our own, and those that the field's other tools wrote."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rscli.errors import InputError
from rscli.results.protocol import read_protocol
from rscli.results.rows import FIELD_COLUMNS, Row, broken, cells_of, parse_row
from rscli.results.shards import missing_shards, parts_of, result_of, union, whole_rows
from rscli.runtime.files import open_regular
from rscli.system import system_error

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
    notes: tuple[str, ...] = ()
    if parts := parts_of(path):
        together = union(path, whole_rows(path)[0] if path.exists() else [])
        missing = missing_shards(path)
        those = "1 part is" if len(parts) == 1 else f"{len(parts)} parts are"
        notes = (f"{path}: its {those} not put together yet; `rscli certify --resume` does that",)
        notes += () if missing is None else (f"{path}: missing shards: {missing}; their images are left out",)
        return _results(path, sorted(together, key=lambda row: row.idx), protocol, notes)
    header, *lines = _text(path).split("\n")
    columns = _columns(path, header)
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
            raise broken(path, number, cause) from cause
        if row.idx in rows:
            raise broken(path, number, f"image {row.idx} is in an earlier line already")
        rows[row.idx] = row
    if not rows:
        raise InputError(f"{path} has no rows: not one image is certified in it", "`rscli certify --resume` goes on with it.")
    return _results(path, list(rows.values()), protocol, notes)


def _text(path: Path) -> str:
    try:
        with open_regular(path, "result file", "`rscli certify` writes one.") as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise InputError(f"{path} is not a result file: it is not text", _EXPECTED) from cause
    except OSError as cause:
        raise system_error(cause, path, "read the result file") from cause


_EXPECTED = f"A result file has columns separated by tabs, and a header with at least {' '.join(FIELD_COLUMNS)}."


def _columns(path: Path, header: str) -> list[str]:
    """The names in the header. Raises `InputError` if one that is needed is missing, or one is there twice."""
    names = cells_of(header, 1)
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
        name=Path(os.path.realpath(path)).parent.name if path.name == "results.tsv" else path.stem,
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
