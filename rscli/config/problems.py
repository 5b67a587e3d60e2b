"""Collects everything that is wrong with a configuration, one line per key, so that it can be said at once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rscli.config.schema import SECTIONS, Ramp
from rscli.config.settings import Key, Settings, dotted, shortened
from rscli.errors import MOST_TOLD, ConfigError, did_you_mean

FINITE = "must be a finite number"


class Problems:
    """What is wrong with `settings`, after the lines `malformed` of what could not even be read.

    `models` holds the class behind each section (`""`: the top level), as far as known.
    """

    def __init__(self, settings: Settings, malformed: Iterable[str] = ()) -> None:
        self.settings = settings
        self._lines = list(malformed)
        self.models: dict[str, type[BaseModel]] = {}
        self._rules: dict[Key, list[str]] = {}
        self._unknown: list[Key] = []

    def add(self, key: Key, rule: str) -> None:
        """The value of `key`, or its absence, breaks `rule`."""
        rules = self._rules.setdefault(key, [])
        if rule not in rules and FINITE not in rules:  # NaN breaks every rule; the first thing to say is enough
            rules.append(rule)

    def add_errors(self, error: ValidationError, section: Key, given: Mapping[str, Any]) -> None:
        """Everything that pydantic found in `section` with the fields `given`."""
        for detail in error.errors(include_url=False, include_context=False):
            key = section + _path(detail["loc"], given)
            if detail["type"] == "extra_forbidden":
                whole = key in self.settings or len(self._unknown) > MOST_TOLD  # those are only counted: no search for each
                self._unknown += [key] if whole else [leaf for leaf in self.settings if leaf[: len(key)] == key]
            elif detail["type"] == "missing":
                self.add(key, self._missing(key))
            else:
                self.add(key, rule_of(detail))

    def check(self) -> None:
        """Raises `ConfigError` with a line for every problem, if there is any."""
        for place, key in enumerate(self._unknown):
            self.add(key, self._unknown_rule(key) if place < MOST_TOLD else "unknown key")
        order = {key: place for place, key in enumerate(self.settings)}
        keys = sorted(self._rules, key=lambda key: order.get(key, len(order)))
        lines = self._lines + [f"{self._where(key)}: {' or '.join(self._rules[key])}" for key in keys]
        if lines:
            raise ConfigError(lines)

    def _where(self, key: Key) -> str:
        setting = self.settings.get(key)
        name = shortened(dotted(key))
        return name if setting is None else f"{name} = {_shown(setting.value)} ({setting.source})"

    def _missing(self, key: Key) -> str:
        model = self.models.get(key[0] if len(key) > 1 else "")
        field = model.model_fields.get(key[-1]) if model else None
        about = f" ({field.description})" if field and field.description else ""
        return f"is missing{about}; write --set {dotted(key)}=VALUE"

    def _unknown_rule(self, key: Key) -> str:
        known = sorted(self._known())
        near = nearest(dotted(key), known)
        if near:
            return f"unknown key. {did_you_mean([near])}"
        section = f"{key[0]}."
        here = [name for name in known if name.startswith(section)] or [name for name in known if "." not in name]
        return f"unknown key. The keys here are {', '.join(here)}"

    def _known(self) -> Iterable[str]:
        """Every key that could be written, given the plugins that are named, and what is ramped."""
        ramped = {key[:3] for key in self.settings if key[0] == "ramps" and len(key) > 3}
        yield from (dotted((*key, name)) for key in ramped for name in Ramp.model_fields)
        for section, model in self.models.items():
            for name in model.model_fields:
                if section:
                    yield f"{section}.{name}"
                elif name not in self.models and name not in SECTIONS:
                    yield name
        yield from (
            f"{section}.name" for section in {**SECTIONS, **self.models} if section not in ("", "optimizer", "schedule")
        )


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known dotted key that `key` most likely means: its last part right, or a small slip anywhere. None: none is near."""
    key = key[-100:]  # likeness takes time with the square of the length
    last = key.rpartition(".")[2]

    def likeness(other: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, key, other).ratio()
        part = difflib.SequenceMatcher(None, last, other.rpartition(".")[2]).ratio()
        return max(part, 0.0 if "." in key else whole), whole  # a shared section says little; it decides between equals

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= 0.6 else None


def faults(error: ValidationError) -> list[str]:
    """One line for everything that pydantic found in a file of ours: `info.batch = "x" must be a valid integer`."""
    found = []
    for detail in error.errors(include_url=False, include_context=False):
        key = ".".join(map(str, detail["loc"]))
        given = "" if isinstance(detail["input"], dict | list) else f" = {_shown(detail['input'])[:80]}"
        found.append(f"{key} is missing" if detail["type"] == "missing" else f"{key}{given} {rule_of(detail)}")
    return found


def _path(loc: tuple[int | str, ...], given: Any) -> Key:
    """The part of pydantic's location that is a key: it goes on into list items and branches of unions, which no user wrote."""
    path: list[str] = []
    for part in loc:
        if not isinstance(given, Mapping):
            break
        path.append(str(part))
        given = given.get(part)
    return tuple(path)


def rule_of(detail: ErrorDetails) -> str:
    """Pydantic's message as a rule: `must be greater than 0`."""
    if detail["type"] == "model_type":
        return "is a section with keys of its own, not a value"
    message = detail["msg"].removeprefix("Value error, ")
    for theirs, ours in (
        ("Input should ", "must "),
        ("String should ", "must "),
        ("List should ", "must "),
        ("Tuple should ", "must "),
    ):
        message = message.replace(theirs, ours)
    return message


def _shown(value: Any) -> str:
    return shortened(json.dumps(value, ensure_ascii=False, default=str))
