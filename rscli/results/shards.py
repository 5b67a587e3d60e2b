"""The parts of a result that several processes write, and the whole rows of each file."""

from __future__ import annotations

import re
from glob import escape as glob_escape
from pathlib import Path
from typing import Any

from rscli.errors import InputError
from rscli.results.check import check_rows
from rscli.results.protocol import digest
from rscli.results.rows import HEADER, Row, broken, parse_row

_PART = re.compile(r"\.part-(shard|rank)-[\w-]+$")
_SHARD = re.compile(r"\.part-shard-(\d+)-of-(\d+)")

_UNDER = b"# protocol "
"""Begins the first line of a part: the digest of the protocol under which its rows were written."""

NAMED = 8
"""So many missing shards are named."""


def part_path(path: Path, part: str) -> Path:
    """Where the part called `part` of the result `path` lies."""
    return path.with_name(f"{path.name}.part-{part}")


def parts_of(path: Path) -> list[Path]:
    """The parts of the result `path` that are there, by name."""
    return sorted(path.parent.glob(f"{glob_escape(path.name)}.part-*"))


def torn_of(path: Path) -> list[Path]:
    """What kills in the middle of a write left beside the result `path`, of itself and of its protocol."""
    names = (path.name, f"{path.name}.protocol.json")
    return [torn for name in names for torn in path.parent.glob(f".{glob_escape(name)}.????????.part")]


def result_of(path: Path) -> Path:
    """The result that `path` is, or is a part of."""
    return path.with_name(_PART.sub("", path.name))


def missing_shards(path: Path) -> str | None:
    """Which shards of the result `path` are not there, such as "2/16, 5/16", if others are; None if none misses.

    Shards that extend a result need not all have something to do: where there is one already, none is missed.
    """
    if path.exists():
        return None
    there = {(int(found[2]), int(found[1])) for part in parts_of(path) if (found := _SHARD.search(part.name))}
    all_of_them = [(count, number) for count in sorted({count for count, _ in there}) for number in range(1, count + 1)]
    missing = [f"{number}/{count}" for count, number in all_of_them if (count, number) not in there]
    if not missing:
        return None
    return ", ".join(missing[:NAMED]) + ", ..." * (len(missing) > NAMED)


def part_head(protocol: dict[str, Any]) -> str:
    """What a part begins with: the digest of the protocol that it is written under, and the header."""
    return f"{_UNDER.decode()}{digest(protocol)}\n{HEADER}"


def union(path: Path, rows: list[Row], protocol: dict[str, Any] | None) -> list[Row]:
    """`rows`, and those of the parts of `path`; an image that two processes did counts once (its rows say the same).

    Raises `InputError` for a part that was written under another `protocol`, and as `whole_rows` does.
    """
    found = {row.idx: row for part in parts_of(path) for row in whole_rows(part, protocol)[0]}
    return list({**found, **{row.idx: row for row in rows}}.values())


def whole_rows(path: Path, protocol: dict[str, Any] | None = None) -> tuple[list[Row], int]:
    """The rows of one of our files, and how many of its bytes are whole lines; 0 if not even the header is.

    Raises `InputError` for a file that is not ours, a broken line, a row that cannot be under `protocol` (None: unknown), and a
    part of another protocol.
    """
    if path.exists() and not path.is_file():  # a device may have no end
        raise InputError(f"{path} is not a file, so it cannot be continued", "Choose another --out.")
    try:
        content = path.read_bytes()
    except OSError as cause:
        raise InputError(f"the result file {path} cannot be read: {cause}", "Without --resume a new one is started.") from cause
    header = HEADER.encode()
    if header.startswith(content) and content != header:
        return [], 0
    before, content = _without_digest(path, content, protocol)
    *lines, torn = content.split(b"\n")
    if before and not lines and header.startswith(torn):
        return [], 0
    if not lines or lines[0] != header.rstrip():
        raise InputError(f"{path} cannot be continued: {_foreign(content)}", "Choose another --out.")
    rows: list[Row] = []
    seen: set[int] = set()
    first = 2 + before.count(b"\n")
    whole = len(before) + len(header)
    for number, line in enumerate(lines[1:], start=first):
        try:
            row = parse_row(line.decode())
        except ValueError as cause:
            if number == first + len(lines) - 2 and not torn:  # the last line: a crash may have left it like this
                break
            raise broken(path, number, cause) from cause
        if row.idx in seen:
            raise broken(path, number, f"image {row.idx} is already on an earlier line")
        seen.add(row.idx)
        rows.append(row)
        whole += len(line) + 1
    if protocol is not None:
        check_rows(path, rows, range(first, first + len(rows)), protocol)
    return rows, whole


def _without_digest(path: Path, content: bytes, protocol: dict[str, Any] | None) -> tuple[bytes, bytes]:
    """The first line of a part, with the digest of its protocol, and the rest; nothing and all of a file without."""
    if not _PART.search(path.name):
        return b"", content
    line, end, rest = content.partition(b"\n")
    if not line.startswith(_UNDER):
        if not end and _UNDER.startswith(line):  # a crash left no more
            return line, b""
        if protocol is not None and protocol["format"] > 1:
            raise InputError(f"{path} does not say under which protocol its rows were written", _OTHER_PART)
        return b"", content
    if not end:
        return line, b""
    said = line.removeprefix(_UNDER).decode(errors="replace")
    if protocol is not None and said != digest(protocol):
        text = f"{path} was written under another protocol (sha256 {said}) than the one beside it ({digest(protocol)})"
        raise InputError(text, _OTHER_PART)
    return line + end, rest


_OTHER_PART = "Rows of one file must be comparable. Restore the protocol or the part that belongs here, or remove the part."


def _foreign(content: bytes) -> str:
    """What tells a file that is none of ours, or no longer, from one that rscli wrote."""
    line = content.split(b"\n", 1)[0]
    if line.replace(b'"', b"") == HEADER.rstrip().encode():
        return (
            "its cells are in quotation marks, as a spreadsheet writes them, and numbers may be changed too. Restore the file"
        )
    if line.strip().replace(b",", b"\t").replace(b";", b"\t").split() == HEADER.encode().split():
        return "its columns are not separated by tabs, as rscli writes them. Restore the file"
    return "it is not a result file that rscli wrote"
