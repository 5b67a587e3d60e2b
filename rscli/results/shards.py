"""The parts of a result that several processes write, and the whole rows of each file."""

from __future__ import annotations

import re
from glob import escape as glob_escape
from pathlib import Path

from rscli.errors import InputError
from rscli.results.rows import HEADER, Row, broken, parse_row

_PART = re.compile(r"\.part-(shard|rank)-[\w-]+$")
_SHARD = re.compile(r"\.part-shard-(\d+)-of-(\d+)")

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


def union(path: Path, rows: list[Row]) -> list[Row]:
    """`rows`, and those of the parts of `path`; an image that two processes did counts once (its rows say the same)."""
    found = {row.idx: row for part in parts_of(path) for row in whole_rows(part)[0]}
    return list({**found, **{row.idx: row for row in rows}}.values())


def whole_rows(path: Path) -> tuple[list[Row], int]:
    """The rows of one of our files, and how many of its bytes are whole lines; 0 if not even the header is."""
    if path.exists() and not path.is_file():  # a device may have no end
        raise InputError(f"{path} is not a file, so it cannot be continued", "Choose another --out.")
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
            raise broken(path, number, cause) from cause
        if row.idx in seen:
            raise broken(path, number, f"image {row.idx} is in an earlier line already")
        seen.add(row.idx)
        rows.append(row)
        whole += len(line) + 1
    return rows, whole
