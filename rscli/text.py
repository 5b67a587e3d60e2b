"""Text that comes from outside (names of files and classes, metadata) on its way to the eye, to JSON and to comparisons.

One way in: paths keep their bytes (`surrogateescape`, as Python reads them), and names are compared by `same`.
One way out: `visible` writes what an eye cannot see, or a terminal would obey, as JSON's `\\uXXXX`. The escape is the same for
the eye and in JSON, so that escaped JSON is still the same JSON: a byte of a file name that is not UTF-8 is `\\udcXX` in both,
and Python's `os.fsencode(json.loads(text))` gives the name back.
"""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from typing import Any

_UNSEEN = (
    "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # control characters, the escape of terminals among them, but for \t \n \r
    "\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # no width, or another direction
    "\ud800-\udfff\U000e0000-\U000e007f"  # lone surrogates, and letters that are only tags
)
_COLOUR = "\x1b\\[[0-9;]*m"
"""How a terminal is told a colour: nothing else is to pass from an unknown writer."""

_EVERY = re.compile(f"[{_UNSEEN}\r]")
_LINE = re.compile(f"[{_UNSEEN}\r\n\t]")
_WRITTEN = re.compile(f"[{_UNSEEN}]")
_COLOURED = re.compile(f"{_COLOUR}|[{_UNSEEN}]")

PLAIN = {
    **{"σ": "sigma", "α": "alpha", "±": "+/-", "≥": ">=", "≤": "<=", "−": "-", "–": "-", "—": "-", "…": "...", "×": "x"},
    **{"“": '"', "”": '"', "‘": "'", "’": "'", "·": ".", "•": "*", "→": "->", "\xa0": " "},
    **{"─": "-", "━": "-", "│": "|", "╭": "+", "╮": "+", "╰": "+", "╯": "+", "╸": "-", "╺": "-"},
}
"""What our own signs become where they cannot be encoded."""

ERRORS = "rscli.plain"
"""The error handler for streams and files that cannot encode a character: `PLAIN`, or an escape."""


def visible(text: str) -> str:
    """`text`, with whatever an eye cannot see, or a terminal would obey, as `\\uXXXX`; line feeds and tabs are kept."""
    return _EVERY.sub(_escape, text)


def one_line(text: str) -> str:
    """`text` as `visible` makes it, with line feeds and tabs escaped as well: for a cell, or a name in the middle of a line."""
    return _LINE.sub(_escape, text)


def written(text: str, *, colours: bool) -> str:
    """What reaches a stream from a writer that may be anybody: carriage returns pass, and `colours` where they are wanted."""
    if colours:
        return _COLOURED.sub(lambda found: found[0] if len(found[0]) > 1 else _escape(found), text)
    return _WRITTEN.sub(_escape, text)


def plain(text: str, encoding: str) -> str:
    """`text` as a stream of this `encoding` shows it. To be done before a table is set, since it changes the width."""
    try:
        return text.encode(encoding, ERRORS).decode(encoding)
    except (LookupError, UnicodeError):
        return text


def to_json(value: Any, *, ascii_only: bool = False, **options: Any) -> str:
    """`value` as JSON that is valid, encodable and safe to look at, whatever its texts hold; `json.loads` gives them back.

    JSON has line feeds between its values only, so that what is escaped here is always inside a text.
    """
    return _WRITTEN.sub(_escape, json.dumps(value, ensure_ascii=ascii_only, **options))


def same(name: str) -> str:
    """What two names have in common that look the same: the NFC form (macOS hands out NFD). For comparison, not for use."""
    return unicodedata.normalize("NFC", name)


def _escape(found: re.Match[str]) -> str:
    return "".join(_code(unit) for unit in _units(found[0]))


def _units(text: str) -> list[int]:
    """UTF-16 code units, which are what JSON escapes."""
    data = text.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(data[at : at + 2]) for at in range(0, len(data), 2)]


def _code(unit: int) -> str:
    return f"\\u{unit:04x}"


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """What Python calls for the characters that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(letter) or "".join(map(_code, _units(letter))) for letter in lacking), error.end


codecs.register_error(ERRORS, _replace)
