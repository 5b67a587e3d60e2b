"""The installed distributions, each read by itself: one that is damaged is reported, and hides or breaks no other.

Only the standard library is used here: this is read before pydantic and torch, which look through the same metadata when they
are imported, and fail over a file that nobody but them needs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

LARGEST = 4 * 2**20
"""Bytes of a metadata file above which it is taken for damaged. The largest of known packages have some 100 KiB."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with the metadata in the folder `where`, and what to do about it."""

    where: str
    text: str
    hint: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


@dataclass(frozen=True)
class Distribution:
    """A distribution whose metadata is whole: name, version, and the entry points of rscli as (group, name, target)."""

    name: str
    version: str
    points: tuple[tuple[str, str, str], ...]
    where: str
    recorded: bool


@dataclass(frozen=True)
class Environment:
    """The distributions that count, one of a name, and the problems of the others."""

    distributions: tuple[Distribution, ...]
    problems: tuple[Problem, ...]
    broken: frozenset[str]
    """The folders of metadata that cannot be read."""


def normalised(name: str) -> str:
    """The one spelling of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def environment() -> Environment:
    """Everything installed that Python finds, read once a process."""
    return read(metadata.distributions())


def read(found: Iterable[metadata.Distribution]) -> Environment:
    """Reads each of `found` by itself, in the order of sys.path. Never raises."""
    whole: list[Distribution] = []
    problems: dict[str, Problem] = {}
    for one in _each(found):
        where = _where(one)
        if Path(where).name.startswith("~"):  # what pip left of an upgrade that was interrupted; pip ignores it, too
            continue
        try:
            whole.append(_read(one, where))
        except Exception as cause:  # a file of anybody's: whatever it does, the others count
            hint = f"Install {_guess(where)} again, or remove {where} if it is a leftover; nothing else is affected."
            text = str(cause) if isinstance(cause, _DamagedError) else f"{type(cause).__name__}: {cause}"
            problems[where] = Problem(where, text, hint)
    chosen, hidden = _one_of_a_name(whole)
    return Environment(tuple(chosen), (*problems.values(), *hidden), frozenset(problems))


def leave_out_broken() -> None:
    """Hides damaged distributions from every library of this process, and of those that it starts.

    pydantic, torch and matplotlib look for plugins of theirs in all installed packages, and end in a traceback over one
    whose metadata cannot be read. Where nothing is damaged, nothing is changed.
    """
    broken = environment().broken
    if not broken:
        return
    original = metadata.MetadataPathFinder.find_distributions

    def find(context: metadata.DistributionFinder.Context | None = None) -> Iterator[metadata.Distribution]:
        every = original() if context is None else original(context)
        return (one for one in every if _where(one) not in broken)

    metadata.MetadataPathFinder.find_distributions = staticmethod(find)  # type: ignore[method-assign,assignment]
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # for processes that begin without this module
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


class _DamagedError(Exception):
    """Metadata that cannot be used, in words."""


def _each(found: Iterable[metadata.Distribution]) -> Iterator[metadata.Distribution]:
    """The distributions, until the search itself fails."""
    try:
        yield from found
    except Exception:  # a finder of somebody else's
        return


def _where(one: metadata.Distribution) -> str:
    return str(getattr(one, "_path", "an unknown place"))


def _guess(where: str) -> str:
    return Path(where).name.partition("-")[0] or "the package"


def _read(one: metadata.Distribution, where: str) -> Distribution:
    headers = _headers(one)
    for key in ("name", "version"):
        if not headers.get(key):
            raise _DamagedError(f"its METADATA has no {key.capitalize()}")
    points = tuple(_points(_text(one, "entry_points.txt") or ""))
    recorded = bool(_text_or_none(one, "RECORD"))
    return Distribution(headers["name"], headers["version"], points, where, recorded)


def _headers(one: metadata.Distribution) -> dict[str, str]:
    for name in ("METADATA", "PKG-INFO", ""):
        text = _text(one, name)
        if text:
            break
    else:
        raise _DamagedError("METADATA is missing or empty")
    found: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip():
            break  # the description follows
        key, colon, value = line.partition(":")
        if colon and not line[0].isspace():
            found.setdefault(key.strip().lower(), value.strip())
    return found


def _text(one: metadata.Distribution, name: str) -> str | None:
    path = getattr(one, "_path", None)
    if isinstance(path, Path):
        file = path / name if name else path
        if file.exists() and not file.is_file():
            if not name:
                return None
            raise _DamagedError(f"{name} is not a regular file")
        if file.is_file() and file.stat().st_size > LARGEST:
            raise _DamagedError(f"{name} has {file.stat().st_size:,} bytes, and is considered damaged above {LARGEST:,}")
    try:
        text = one.read_text(name)
    except UnicodeDecodeError as cause:
        raise _DamagedError(f"{name} is not UTF-8 (byte {cause.start})") from cause
    if text and "\0" in text:
        raise _DamagedError(f"{name} is binary")
    return text


def _text_or_none(one: metadata.Distribution, name: str) -> str | None:
    """A file whose content nobody needs."""
    path = getattr(one, "_path", None)
    if isinstance(path, Path):
        return name if (path / name).is_file() and (path / name).stat().st_size else None
    return None


def _points(text: str) -> Iterator[tuple[str, str, str]]:
    """The entry points of rscli. Every line must be readable, since other libraries read all of them."""
    parser = ConfigParser(delimiters=("=",), comment_prefixes=("#",), strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[method-assign,assignment]  # names are as they are written
    try:
        parser.read_string(text)
    except ConfigParserError as cause:
        lines = getattr(cause, "errors", None)  # (line number, text) of each
        said = f"line {lines[0][0]} is {lines[0][1]}, without '='" if lines else str(cause).splitlines()[0]
        raise _DamagedError(f"entry_points.txt cannot be read: {said}") from cause
    for group in parser.sections():
        for name, target in parser.items(group):
            if group.startswith("rscli."):
                yield group, name, target


def _one_of_a_name(whole: list[Distribution]) -> tuple[list[Distribution], list[Problem]]:
    """One distribution of each name: the first on sys.path; within one folder the one whose record is whole, then the newest.

    One that announces plugins is preferred to an older copy that announces none. Copies that say the same are no problem.
    """
    groups: dict[str, list[Distribution]] = {}
    for one in whole:
        groups.setdefault(normalised(one.name), []).append(one)
    chosen, problems = [], []
    for copies in groups.values():
        folders = list(dict.fromkeys(Path(one.where).parent for one in copies))
        best = copies[0]
        for one in copies[1:]:
            if _rank(one, folders) > _rank(best, folders):
                best = one
        chosen.append(best)
        for one in copies:
            if (one.version, one.points) != (best.version, best.points) and (one.points or best.points):
                hint = f"Remove {one.where} if it is a leftover."
                text = f"{one.name} {one.version} is installed twice, and ignored in favour of {best.version} in {best.where}"
                problems.append(Problem(one.where, text, hint))
    return chosen, problems


def _rank(one: Distribution, folders: list[Path]) -> tuple[bool, int, bool, list[int]]:
    numbers = [int(number) for number in re.findall(r"\d{1,9}", one.version)]
    return bool(one.points), -folders.index(Path(one.where).parent), one.recorded, numbers
