"""JSON and TOML from outside, decoded within bounds: size, depth, integers of 64 bits, and no key twice.

What comes out can be walked recursively, written as JSON and turned into floats without a surprise.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEEPEST = 32
"""Tables and lists inside each other, at most; also the parts of a dotted key."""

LARGEST_JSON = 64 * 2**20
LARGEST_TOML = 2**20
"""Size of a text, at most, in bytes of a file or characters."""

_STRINGS = re.compile(r'"""(?:[^\\]|\\.)*?"""|\'\'\'.*?\'\'\'|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|#[^\n]*', re.DOTALL)
_BETWEEN_KEYS = re.compile(r"[\n=\[\]{},]")


class BoundError(ValueError):
    """A text that asks for more than is read: too long, too deep, or a number that is too large."""


def check_size(path: Path, largest: int) -> None:
    """Raises `BoundError` if the file `path` has more than `largest` bytes, and `OSError` if the system refuses to say."""
    if (size := path.stat().st_size) > largest:
        raise BoundError(f"it has {size:,} bytes, and at most {largest:,} are read")


def decode_json(text: str) -> Any:
    """The value of a JSON text. Raises `ValueError` for broken JSON and a key given twice, and `BoundError`."""
    _check_length(text, LARGEST_JSON)
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_int=_integer)
    except RecursionError:
        raise _too_deep() from None
    check_value(value)
    return value


def decode_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises `ValueError` for broken TOML and a key given twice, and `BoundError`."""
    _check_length(text, LARGEST_TOML)
    if any(piece.count(".") > DEEPEST for piece in _BETWEEN_KEYS.split(_STRINGS.sub("", text))):
        raise _too_deep()  # beforehand: tomllib needs quadratic time for a key of many parts
    try:
        value = tomllib.loads(text)
    except RecursionError:
        raise _too_deep() from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as cause:  # int() of thousands of digits, or a date that is none
        if "digits" not in str(cause):
            raise
        raise BoundError("an integer in it does not fit in 64 bits") from None
    check_value(value)
    return value


def check_value(value: Any) -> None:
    """Raises `BoundError` if a decoded value is nested too deep, or holds an integer of more than 64 bits."""
    level, depth = [value], 0
    while level:
        below: list[Any] = []
        for each in level:
            if isinstance(each, int) and each.bit_length() > 64:
                raise BoundError("an integer in it does not fit in 64 bits")
            if isinstance(each, Mapping):
                below += each.values()
            elif isinstance(each, list | tuple):
                below += each
        level, depth = below, depth + 1
        if depth > DEEPEST + 1 and level:
            raise _too_deep()


def _check_length(text: str, largest: int) -> None:
    if len(text) > largest:
        raise BoundError(f"it has {len(text):,} characters, and at most {largest:,} are read")


def _too_deep() -> BoundError:
    return BoundError(f"it is nested more than {DEEPEST} levels deep")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} is given twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 21:
        raise BoundError(f"an integer in it, {digits[:20]}... of {len(digits)} digits, does not fit in 64 bits")
    return int(digits)
