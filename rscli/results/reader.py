"""Reads result files: our own, and those that the field's other tools wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rscli.errors import InputError
from rscli.results.check import check_rows, unchecked
from rscli.results.foreign import Table, lines_of, read_text
from rscli.results.protocol import read_protocol
from rscli.results.rows import Row, broken
from rscli.results.shards import missing_shards, parts_of, result_of, union, whole_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Results:
    """A result file, ours or another tool's: arrays (images,) in the order of its lines.

    `radius` is >= 0; `seconds` is the column `time`, NaN where it is unknown. Our own columns are None unless every row has
    them. `protocol` is None for a file that has none beside it; `notes` are lines that a reader should know of.
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

    Reads what is unambiguous of other tools' forms, and of what editors and spreadsheets make of a file: any time or none,
    True and False, other separators and line ends (`rscli.results.foreign`), and says so in `notes`. A last line of ours
    without line feed (its run goes on, or was killed) is left out, with a note. Raises `InputError` with the line number for
    every broken line and every row that cannot be under the protocol beside it (`rscli.results.check`), for a part of another
    protocol, and for a file that is missing, empty or of another kind.
    """
    path = result_of(path / "results.tsv" if path.is_dir() else path)
    protocol = read_protocol(path)
    why_not = None if protocol is None else unchecked(protocol)
    notes = [f"{path}: its rows are not checked by recomputing them: {why_not}"] if why_not else []
    if parts := parts_of(path):
        together = union(path, whole_rows(path, protocol)[0] if path.exists() else [], protocol)
        missing = missing_shards(path)
        those = "1 part is" if len(parts) == 1 else f"{len(parts)} parts are"
        notes.append(f"{path}: its {those} not merged yet; `rscli certify --resume` merges them")
        notes += [] if missing is None else [f"{path}: missing shards: {missing}; their images are left out"]
        return _results(path, sorted(together, key=lambda row: row.idx), protocol, notes)
    text, formal = read_text(path)
    notes += formal
    if protocol is not None and "\n" in text and not text.endswith("\n"):  # rscli ends every line; others may not end the last
        text = text[: text.rindex("\n") + 1]
        notes.append(f"{path}: the last line is incomplete and is left out; its run is still going, or was stopped")
    rows, lines, changes = _rows(path, text, ours=protocol is not None)
    if not rows:
        raise InputError(f"{path} has no rows: no image has been certified yet", "`rscli certify --resume` continues it.")
    if protocol is not None:
        check_rows(path, rows, lines, protocol)
    return _results(path, rows, protocol, notes + changes)


def _rows(path: Path, text: str, *, ours: bool) -> tuple[list[Row], list[int], list[str]]:
    """The rows of a text, their line numbers, and notes."""
    numbered = lines_of(text)
    _, header = next(((number, line) for number, line in numbered if ours or not line.startswith("#")), (1, ""))
    table = Table(path, header, ours=ours)
    rows: dict[int, Row] = {}
    lines: list[int] = []
    for number, line in numbered:
        try:
            row = table.row(line)
        except ValueError as cause:
            raise broken(path, number, cause) from cause
        if row is None:
            continue
        if row.idx in rows:
            raise broken(path, number, f"image {row.idx} is already on an earlier line")
        rows[row.idx] = row
        lines.append(number)
    return list(rows.values()), lines, table.notes()


def _results(path: Path, rows: list[Row], protocol: dict[str, Any] | None, notes: list[str]) -> Results:
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
        notes=tuple(notes),
    )
