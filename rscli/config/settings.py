"""Settings as flat dotted keys, each with the layer it came from; layers are stacked one over the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rscli.config.decode import DEEPEST, BoundError
from rscli.config.schema import SECTIONS
from rscli.config.words import read_word
from rscli.errors import PluginError
from rscli.registry import installed

Key = tuple[str, ...]
"""A dotted key, split: `loss.lbd` is `("loss", "lbd")`."""


@dataclass(frozen=True)
class Setting:
    """A value and the layer that it came from."""

    value: Any
    source: str


Settings = dict[Key, Setting]
"""Every value that was given, flat: no key is the beginning of another."""


def dotted(key: Key) -> str:
    """The key as a user writes it."""
    return ".".join(key)


def shortened(text: str, length: int = 120) -> str:
    """The beginning of a text that is too long for a message."""
    return text if len(text) <= length else f"{text[:length]}..."


def flatten(values: Mapping[str, Any], source: str) -> Settings:
    """Nested tables as flat settings. An empty section says nothing; an empty table inside a section is a value."""
    return {key: Setting(value, source) for key, value in leaves(values) if not (value == {} and len(key) == 1)}


def stack(lower: Settings, higher: Settings) -> Settings:
    """`higher` over `lower`: fields of a plugin that `higher` replaces by another are dropped.

    A table inside a section that has a `name` is taken for a plugin, too: the architectures that another one is made of. With
    its fields go their ramps.
    """
    replaced = [
        key[:-1]
        for key, setting in higher.items()
        if key[-1] == "name" and key[0] in SECTIONS and key in lower and _others(key, setting.value, lower[key].value)
    ]
    replaced += [("ramps", *table) for table in replaced]
    kept = {key: setting for key, setting in lower.items() if not any(key[: len(table)] == table for table in replaced)}
    return _overlay(kept, higher)


def _others(key: Key, one: Any, other: Any) -> bool:
    """Whether two names mean different plugins, or variants: `rscli:step` and `step` may be the same."""
    if one == other:
        return False
    kind = SECTIONS[key[0]]
    try:
        return installed().find(kind, str(one)) != installed().find(kind, str(other))
    except PluginError:
        return True


def parse_sets(sets: Iterable[str], types: Callable[[Key], Any] = lambda _: Any) -> tuple[Settings, list[str]]:
    """The settings in `key=value` texts, the last one of a key winning; and a line for each text of another shape.

    A value is read as `read_word` says, for a field of the type `types(key)`; `Any`, where it is not known.
    """
    settings: Settings = {}
    malformed = []
    for text in sets:
        key, equals, value = text.partition("=")
        parts = tuple(part.strip() for part in key.split("."))
        if not equals or not all(parts):
            malformed.append(f"--set {shortened(text)!r}: must be KEY=VALUE, such as --set loss.lbd=5")
            continue
        if len(parts) > DEEPEST:
            malformed.append(f"--set {shortened(text)!r}: the key has {len(parts)} parts, and at most {DEEPEST} are read")
            continue
        try:
            nested: Any = read_word(value.strip(), types(parts))
        except BoundError as error:
            malformed.append(f"--set {shortened(text)!r}: {error}")
            continue
        for part in reversed(parts):
            nested = {part: nested}
        settings = _overlay(settings, flatten(nested, "--set"))
    return settings, malformed


def nest(settings: Settings) -> dict[str, Any]:
    """Flat settings as nested tables."""
    nested: dict[str, Any] = {}
    for key, setting in settings.items():
        table = nested
        for part in key[:-1]:
            table = table.setdefault(part, {})
        table[key[-1]] = setting.value
    return nested


def leaves(values: Mapping[str, Any], start: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every value that is no table, or an empty one, with its key."""
    for part, value in values.items():
        key = (*start, str(part))
        if isinstance(value, Mapping) and value:
            yield from leaves(value, key)
        else:
            yield key, value


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The leaves in which two nested tables differ: (dotted key, old value, new value); None for a missing one."""
    before, now = ({dotted(key): value for key, value in leaves(table)} for table in (old, new))
    return [(key, before.get(key), now.get(key)) for key in {**before, **now} if before.get(key) != now.get(key)]


def scalars(value: Any) -> Iterator[Any]:
    """Every value inside lists and tables, or the value itself."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from scalars(item)
    elif isinstance(value, Mapping):
        yield from scalars(list(value.values()))
    else:
        yield value


def _overlay(lower: Settings, higher: Settings) -> Settings:
    """`higher` over `lower`; a value replaces a table of the same key, and the other way round."""
    starts = {key[:length] for key in higher for length in range(1, len(key) + 1)}
    kept = {
        key: setting
        for key, setting in lower.items()
        if key not in starts and not any(key[:n] in higher for n in range(len(key)))
    }
    return {**kept, **higher}
