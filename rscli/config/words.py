"""The words of `--set KEY=VALUE`, read as the field that they are for takes them.

- A field of text takes the text as it stands, quoted or not: `data.path=2024-01-05`, `data.augment=none`. Where text may be
  left out, the word none leaves it out, unless it is one of the field's choices; `"none"` in quotes is always text.
- Every other field takes TOML, and the usual ways to write the same: `.01`, `1_000`, 1e3 for a whole number, True, yes or
  off for a truth value, null or None for none, `31,61` for a list.
- A field that takes text and other values takes TOML, True, False, None and `.01`; all else is text.
- Where no field is known, TOML; what is not TOML is text.
"""

from __future__ import annotations

import datetime
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from rscli.config.decode import BoundError, check_value, decode_toml

TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOTHING = ("none", "null")

_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][+-]?\d+)?", re.ASCII)


def read_word(text: str, annotation: Any = Any) -> Any:
    """The value that `text` has for a field of the type `annotation` (`Any`: unknown). Raises `BoundError` if it is absurd.

    A text that fits no reading comes back as it is; the field then says what it wants.
    """
    members = _members(annotation)
    if any(word == text for member in members for word in _choices(member)):
        return text
    if not members or Any in members:
        return None if text == "none" else _toml(text)
    has_text = any(map(_is_text, members))
    if has_text and all(_is_text(member) or member is types.NoneType for member in members):
        if text == "none" and types.NoneType in members:
            return None
        return _toml(text) if text[:1] in ("'", '"') else text
    return _mixed(text, members) if has_text else _value(text, members)


def field_type(model: type[BaseModel], path: Sequence[str]) -> Any:
    """The type of the field at `path` below `model`, through sections and tables; `Any` if there is no such field."""
    annotation: Any = model
    for part in path:
        inside: Any = Any
        for member in _members(annotation):
            if isinstance(member, type) and issubclass(member, BaseModel):
                inside = member.model_fields[part].annotation if part in member.model_fields else Any
            elif get_origin(member) in (dict, Mapping) and len(get_args(member)) == 2:
                inside = get_args(member)[1]
        annotation = inside
    return annotation


def _value(text: str, members: list[Any]) -> Any:
    """The value for a field that takes no text."""
    word = text.lower()
    if word in NOTHING:
        return None
    kinds = {type(choice) for member in members for choice in get_args(member) if get_origin(member) is Literal}
    kinds |= {member for member in members if isinstance(member, type)}
    if bool in kinds and word in TRUTHS:
        return TRUTHS[word]
    items = next((member for member in members if _is_list(member)), None)
    if items is not None:
        return _list(text, items)
    value = _toml(text)
    if isinstance(value, str) and value == text and kinds & {int, float}:
        value = _number(text)
    if int in kinds and float not in kinds and isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    return value


def _mixed(text: str, members: list[Any]) -> Any:
    """The value for a field that takes text and other values."""
    word, value = text.lower(), _toml(text)
    if word in NOTHING and types.NoneType in members:
        return None
    if text in ("True", "False") and bool in members:
        return text == "True"
    if isinstance(value, str) and value == text and {int, float} & set(members):
        return _number(text)
    return text if isinstance(value, datetime.date | datetime.time) else value


def _list(text: str, annotation: Any) -> Any:
    value = _toml(text)
    if not isinstance(value, str):
        return value if isinstance(value, list | dict) else [read_word(text, _item(annotation))]
    inner = text[1:-1] if text[:1] + text[-1:] in ("[]", "()") else text
    if not inner or any(sign in inner for sign in "[](){}'\""):
        return value
    return [read_word(part.strip(), _item(annotation)) for part in inner.removesuffix(",").split(",")]


def _item(annotation: Any) -> Any:
    return next(iter(get_args(annotation)), Any)


def _number(text: str) -> Any:
    """Numbers as Python writes them; anything else stays text. Not-a-number is read, so that it can be named."""
    if text.lstrip("+-").lower() in ("nan", "inf", "infinity"):
        return float(text)
    if not _NUMBER.fullmatch(text):
        return text
    try:
        value = int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text
    check_value(value)
    return value


def _toml(text: str) -> Any:
    try:
        parsed = decode_toml(f"value = {text}")
    except BoundError:
        raise
    except ValueError:
        return text
    return parsed["value"] if len(parsed) == 1 else text  # a line break could smuggle in another key


def _members(annotation: Any) -> list[Any]:
    """The types that a union is made of, however it is written."""
    if isinstance(annotation, types.NoneType) or annotation is None:
        return [types.NoneType]
    if hasattr(annotation, "__value__"):  # a type alias
        return _members(annotation.__value__)
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _is_text(member: Any) -> bool:
    if get_origin(member) is Literal:
        return any(isinstance(choice, str) for choice in get_args(member))
    return isinstance(member, type) and issubclass(member, str | PurePath)


def _is_list(member: Any) -> bool:
    return member in (list, tuple) or get_origin(member) in (list, tuple, Sequence)


def _choices(member: Any) -> list[str]:
    return [choice for choice in get_args(member) if isinstance(choice, str)] if get_origin(member) is Literal else []
