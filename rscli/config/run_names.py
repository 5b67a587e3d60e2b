"""What runs are called: a folder's name says what was run, and a grid of settings is spelled out run by run.

runs/mnist-cons-0.5-loss.name=js/seed0      a preset, and what departs from it
runs/mnist-cons-0.5/loss.lbd=5/seed0        one point of a sweep
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rscli.config.layers import Resolved, decisive, resolve
from rscli.config.settings import dotted, leaves
from rscli.errors import ConfigError, InputError

LONGEST = 100
"""Bytes of a name that settings make; a longer one is cut, and ends in a digest of the whole."""

MOST_RUNS = 10_000
"""Runs that one command may ask for."""


def name_of(resolved: Resolved, preset: str | None, config_file: Path | None = None, swept: Iterable[str] = ()) -> str:
    """The name of the folder under runs: the preset's, or what the configuration is mainly about, and what departs from it.

    What departs: every value that decides the weights and is not that of the preset (without one: of the `config_file`), but
    for the seed and the keys that are `swept`.
    """
    config = resolved.config
    name = preset or f"{config.data['name']}-{config.loss['name']}-{resolved.noise.sigma:g}"
    base = _base(preset, config_file)
    changed = {} if base is None else departures(resolved, base, leave_out={"seed", *swept})
    return folder_name("-".join([name, *([settings_text(changed)] if changed else [])]))


def older_name(resolved: Resolved, preset: str | None) -> str:
    """What the folder was called before names said what departs from a preset."""
    name = preset or f"{resolved.config.data['name']}-{resolved.config.loss['name']}-{resolved.noise.sigma:g}"
    return name.replace("/", "-").replace(":", "-")


def _base(preset: str | None, config_file: Path | None) -> dict[str, Any] | None:
    try:
        if preset is not None:
            return resolve(preset=preset).as_dict()
        return None if config_file is None else resolve(config_file=config_file).as_dict()
    except ConfigError:  # it is whole only with further settings: there is nothing to depart from
        return None


def departures(resolved: Resolved, base: Mapping[str, Any], leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """The decisive values by dotted key that were given, and are not those of `base`, in the order of a configuration.

    Defaults are not told: where they differ, another plugin was named, and its name says so.
    """
    before = {dotted(key): value for key, value in leaves(decisive(base))}
    now = {dotted(key): value for key, value in leaves(decisive(resolved.as_dict()))}
    given = {key: value for key, value in now.items() if resolved.sources.get(key, "default") != "default"}
    left_out = set(leave_out)
    return {key: value for key, value in given.items() if key not in left_out and before.get(key, _MISSING) != value}


_MISSING = object()


def settings_text(values: Mapping[str, Any]) -> str:
    """`loss.name=js-epochs=5`, in the order given."""
    return "-".join(f"{key}={value_text(value)}" for key, value in values.items())


def value_text(value: Any) -> str:
    """A value as a name and a table say it: 5 for 5.0, none, true, 31,61."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, list | tuple):
        return ",".join(map(value_text, value))
    return str(value)


def folder_name(text: str) -> str:
    """`text` as the name of a folder: characters that mean something to a shell or a file system become a hyphen; a long one is
    cut, and ends in a digest of the whole.
    """
    name = re.sub(r"[^\w.,=+@-]+", "-", text).strip("-.") or "run"
    if len(name.encode()) <= LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name.encode()[: LONGEST - 9].decode(errors='ignore').rstrip('-.,=')}-{digest}"


# --- several runs at once ----------------------------------------------------------------------------------------------------


def read_seeds(text: str) -> list[int]:
    """The seeds of `0,1,2`, `0-2` or `0,2,5-7`. Raises `InputError` unless they are distinct whole numbers."""
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,30})\s*(?:-\s*([0-9]{1,30})\s*)?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if last < first or last - first >= MOST_RUNS:
            seeds = []
            break
        seeds += range(first, last + 1)
    if not seeds or len(set(seeds)) < len(seeds) or len(seeds) > MOST_RUNS:
        hint = "As in --seeds 0,1,2, --seeds 0-2 or --seeds 0,2,5-7"
        raise InputError(f"--seeds is {text!r}, but must be distinct whole numbers, 0 or more", hint)
    return seeds


def read_sweeps(sweeps: Sequence[str]) -> list[dict[str, str]]:
    """The points of the grid that `KEY=V1,V2,...` texts span: one {key: value as text} each, the last key fastest.

    A value that has commas itself stands in brackets or quotes: `schedule.milestones=[31,61],[20,40]`. Raises `InputError` for
    a text of another shape, a key or value given twice, and a grid that is too large.
    """
    axes: dict[str, list[str]] = {}
    for text in sweeps:
        key, equals, values = text.partition("=")
        key, parts = key.strip(), [part.strip() for part in _split(values)]
        if not (equals and key and all(parts)):
            raise InputError(f"--sweep is {text!r}, but must read KEY=VALUE,VALUE", "As in --sweep loss.lbd=1,5,10")
        if key == "seed":
            raise InputError(f"--sweep {text} sweeps the seed", f"Write --seeds {values}.")
        if key in axes or len(set(parts)) < len(parts):
            what = f"the key {key}" if key in axes else "a value of it"
            raise InputError(f"--sweep {text}: {what} is given twice", "Give each key, and each of its values, once.")
        axes[key] = parts
    count = 1
    for parts in axes.values():
        count *= len(parts)
    if count > MOST_RUNS:
        raise InputError(f"--sweep asks for {count:,} runs, and at most {MOST_RUNS:,} are made", "Give fewer values.")
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def _split(text: str) -> list[str]:
    """`text` at the commas that are in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "[{(":
            depth += 1
        elif sign in "]})":
            depth -= 1
        elif sign == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += sign
    return parts


def point_name(resolved: Resolved, point: Mapping[str, str]) -> str:
    """The folder of one point of a sweep: `loss.lbd=5`; values as they were read, or as they were given."""
    known = {dotted(key): value for key, value in leaves(resolved.as_dict())}
    return folder_name(settings_text({key: known.get(key, text) for key, text in point.items()}))
