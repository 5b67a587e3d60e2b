r"""Text from outside, made safe for the eye: what a name says reaches a terminal or a table, what it does there does not.

Names of files come from the system as bytes; those that are not UTF-8 are kept as lone surrogates (PEP 383), which open the
file again but cannot be printed. They, control characters, and the marks that turn the direction of writing (Unicode
Technical Report 36, section 2.5) are shown as Python escapes them: `caf\udce9.png`, `\x1b[2J`, `\u202e`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

_UNSEEN = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_HARMFUL = re.compile(f"[{_UNSEEN}]")
_HARMFUL_IN_LINE = re.compile(f"[{_UNSEEN}\t\n]")
_SURROGATE = re.compile("[\ud800-\udfff]")

ASCII = str.maketrans(
    {
        "σ": "sigma",
        "α": "alpha",
        "ε": "eps",
        "λ": "lambda",
        "η": "eta",
        "±": "+-",
        "≥": ">=",
        "≤": "<=",
        "−": "-",
        "–": "-",
        "—": "-",
        "×": "x",
        "…": "...",
        "→": "->",
        "•": "*",
        "∞": "inf",
        "‖": "||",
        "ℓ": "l",
        "‘": "'",
        "’": "'",
        "“": '"',
        "”": '"',
    }
)
"""The signs of our messages and tables where a stream cannot encode them."""


def visible(text: str) -> str:
    """`text` of one or more lines: whatever a terminal would obey or could not show is escaped; tabs and line feeds stay."""
    return _HARMFUL.sub(_escape, text)


def one_line(text: str) -> str:
    """`text` for one cell of a table: as `visible`, with tabs and line feeds escaped as well."""
    return _HARMFUL_IN_LINE.sub(_escape, text)


def encodable(text: str, encoding: str) -> str:
    """`text` in characters that `encoding` has: our own signs in ASCII where it lacks them, any other character escaped."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        spelled = "".join(each if _has(encoding, each) else each.translate(ASCII) for each in text)
        return spelled.encode(encoding, "backslashreplace").decode(encoding)
    return text


def json_text(value: Any, *, indent: int | None = 2, ascii_only: bool = False, default: Any = None) -> str:
    """`value` as JSON that any stream or file can encode: lone surrogates, or with `ascii_only` all but ASCII, are escaped.

    What reads it back gets the same strings. Raises `TypeError` for a value that JSON does not know,
    unless `default` makes one of it that it knows.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only, default=default)
    return _SURROGATE.sub(_escape, text)


def same_name(name: str) -> str:
    """`name` for comparison: composed (NFC), since file systems differ in how they keep an accent."""
    return unicodedata.normalize("NFC", name)


def _escape(found: re.Match[str]) -> str:
    r"""One character: `\n`, `\x1b` or `\u202e`."""
    return found[0].encode("unicode_escape").decode("ascii")


def _has(encoding: str, character: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
