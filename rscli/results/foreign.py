"""Logs as people have them: other tools' forms, and what editors and spreadsheets make of a file. Only what is unambiguous.

Whatever is not read as it stands is counted, and said in a note.
"""

from __future__ import annotations

import codecs
import csv
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rscli.api import ABSTAIN
from rscli.errors import InputError
from rscli.results.rows import FIELD_COLUMNS, Row, cells_of, parse_row
from rscli.runtime.files import check_regular, explained

NEEDED = FIELD_COLUMNS[:-1]
"""No figure needs the time."""

EXPECTED = f"A result file has columns separated by tabs, and a header with at least {' '.join(NEEDED)}."

GIVEN_OPEN = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
"""Paths of what this process was started with, open."""

SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "": "spaces"}

_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
_WHOLE = re.compile(r"(-?\d+)\.0*")
_TENSOR = re.compile(r"tensor\(\[?([^\],()]+)\]?(?:, [^()]*)?\)")
_TRUTH = {"true": "1", "false": "0"}


def read_text(path: Path) -> tuple[str, list[str]]:
    """The text of a result file, with line feeds, and notes of what was not plain about it. Raises `InputError`.

    A pipe is read only if this process was given it open, as a shell's `<(command)` does: any other may wait for ever.
    """
    try:
        if not os.path.abspath(path).startswith(GIVEN_OPEN):  # noqa: PTH100 - links are left as they are
            check_regular(path)
        content = path.read_bytes()
    except FileNotFoundError as cause:
        raise InputError(f"there is no result file {path}", "`rscli certify` writes one.") from cause
    except OSError as cause:
        raise explained(cause, f"the result file {path} cannot be read") from cause
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as cause:
        raise InputError(f"{path} is not a result file: it is not text", EXPECTED) from cause
    done = []
    if encoding == "utf-16":
        done.append("is in UTF-16")
    elif content.startswith(codecs.BOM_UTF8):
        done.append("begins with a byte order mark")
    if "\r" in text:
        done.append("has CR line endings" if "\n" not in text else "has Windows line endings (CRLF)")
        text = text.replace("\r\n", "\n")
        text = text if "\n" in text else text.replace("\r", "\n")
    return text, [f"{path}: it {' and '.join(done)}; read as such"] if done else []


class Table:
    """The header of a log, and how to read its lines. `ours`: a protocol lies beside it, so that only its form may be changed.

    Raises `InputError` for what is not a log of certification, saying what it is if that can be told.
    """

    def __init__(self, path: Path, header: str, *, ours: bool) -> None:
        self.path, self.ours = path, ours
        self.separator = next((one for one in SEPARATORS if set(NEEDED) <= set(_names(header, one))), "\t")
        self.columns = _names(header, self.separator)
        self.changes: Counter[str] = Counter()
        if not set(NEEDED) <= set(self.columns):
            raise _not_a_log(path, header)
        if len(set(self.columns)) < len(self.columns):
            raise InputError(f"{path} has two columns of the same name: {' '.join(self.columns)}", EXPECTED)
        if self.separator != "\t":
            self.changes[f"columns separated by {SEPARATORS[self.separator]}"] = 0
        if '"' in header:
            self.changes["a header in quotation marks"] = 0
        if any(name not in header for name in NEEDED):
            self.changes["a header in capital letters"] = 0
        if "time" not in self.columns:
            self.changes["no column time: how long it took is unknown"] = 0

    def row(self, line: str) -> Row | None:
        """The row of a line; None for a comment, or a header again. Raises `ValueError` as `parse_row` does."""
        try:
            return parse_row(self._plain(line), self.columns, foreign=not self.ours)
        except ValueError:
            if line.startswith("#"):
                self.changes["lines that begin with #, which are ignored"] += 1
                return None
            if _names(line, self.separator) == self.columns:
                self.changes["headers between the rows, which are ignored"] += 1
                return None
            fixed, changes = self._fixed(line)
            if not changes:
                raise
            row = parse_row("\t".join(fixed), self.columns, foreign=not self.ours)
            self.changes.update(changes)
            return row

    def notes(self) -> list[str]:
        """What was read otherwise than it stands, if anything was."""
        texts = [text if not count else f"{text} (lines: {count:,})" for text, count in self.changes.items()]
        return [f"{self.path}: read with {'; '.join(texts)}"] if texts else []

    def _plain(self, line: str) -> str:
        return line if self.separator == "\t" and '"' not in line else "\t".join(self._cells(line))

    def _cells(self, line: str) -> list[str]:
        if '"' in line:
            self.changes["cells in quotation marks"] += 1
        return _split(line, self.separator, len(self.columns))

    def _fixed(self, line: str) -> tuple[list[str], list[str]]:
        """The cells with what is unambiguous in them made plain, and what that was."""
        texts = cells_of(self._plain(line), len(self.columns))
        if len(texts) != len(self.columns):
            return texts, []
        cells, changes = dict(zip(self.columns, texts, strict=True)), []
        for name in {"radius", "time"} & set(cells):
            if _DECIMAL_COMMA.fullmatch(cells[name].rpartition(":")[2]):
                cells[name] = cells[name].replace(",", ".")
                changes.append("decimal commas")
        if not self.ours:
            changes += _as_meant(cells)
        return list(cells.values()), list(dict.fromkeys(changes))


def _as_meant(cells: dict[str, str]) -> list[str]:
    """Makes plain what other tools write, in place; what that was."""
    changes = []
    for name in NEEDED:
        if found := _TENSOR.fullmatch(cells[name]):
            cells[name] = found[1].strip()
            changes.append("tensor(...) around numbers")
    if cells["correct"].lower() in _TRUTH:
        cells["correct"] = _TRUTH[cells["correct"].lower()]
        changes.append("True and False for 1 and 0")
    for name in ("idx", "label", "predict", "correct"):
        if found := _WHOLE.fullmatch(cells[name]):
            cells[name] = found[1]
            changes.append("whole numbers with a decimal point")
    right = cells["correct"] == "1" or cells["predict"] == cells["label"]
    if re.fullmatch(r"-1(\.0*)?", cells["radius"]) and not right:
        cells |= {"radius": "0", "predict": str(ABSTAIN)}
        changes.append("a radius of -1 for an abstention")
    return changes


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _names(header: str, separator: str) -> list[str]:
    return [name.lower() for name in _split(header, separator, 1)]


def _split(line: str, separator: str, wanted: int) -> list[str]:
    """The cells of a line, without quotation marks and without empty ones beyond `wanted`."""
    if not separator:
        return line.replace('"', "").split()
    cells = next(csv.reader([line], delimiter=separator), []) if '"' in line else line.split(separator)
    return cells_of("\t".join(cells), wanted)


def _not_a_log(path: Path, header: str) -> InputError:
    """What the file is instead, as far as its first line and its name tell."""
    separator = next((one for one in SEPARATORS if len(_names(header, one)) > 1), "\t")
    names = _names(header, separator)
    missing = [name for name in NEEDED if name not in names]
    first = header.strip()[:80] or "an empty line"
    if missing == ["radius"]:
        text = (
            f"{path} is a log of predictions (predict.py of the field's tools), not of certification: it has no column radius"
        )
        return InputError(text, "Give the log of the same model that certify.py wrote.")
    if "epoch" in names:
        return InputError(f"{path} is a training log, not a result file: its first line is {first!r}", EXPECTED)
    if path.stem.endswith("_acc") or any(name.endswith(("acc", "accuracy")) for name in names):
        text = f"{path} is a table of accuracies (an _acc file), not a log of certification: its first line is {first!r}"
        return InputError(text, "Give the log that it was computed from: one line per image, with its radius.")
    return InputError(f"{path} is not a result file: no column {', '.join(missing)}; its first line is {first!r}", EXPECTED)
