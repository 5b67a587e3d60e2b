"""What differs between runs in how they were trained, as far as their configurations are recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rscli.config.layers import decisive
from rscli.config.run_names import value_text
from rscli.config.schema import GROUPS
from rscli.config.settings import dotted, leaves
from rscli.results.reader import Results

MISSING = "–"


def differing(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each name, the settings by dotted key in which `configs` (resolved, as recorded) differ.

    A setting that some do not have (of a plugin that they do not use, or of a later version) is told if the others differ in
    it; a plugin that some do not use at all is always told.
    """
    flat = {name: {dotted(key): value for key, value in leaves(decisive(config))} for name, config in configs.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    told = [key for key in keys if _apart(key, [values[key] for values in flat.values() if key in values], len(flat))]
    return {name: {key: values[key] for key in told if key in values} for name, values in flat.items()}


def _apart(key: str, values: Sequence[Any], runs: int) -> bool:
    section, _, rest = key.partition(".")
    whole = rest == "name" or (section in GROUPS and bool(rest))
    return any(value != values[0] for value in values) or (whole and len(values) < runs)


def training_differences(runs: Sequence[Results]) -> dict[str, dict[str, Any]]:
    """What differs in training between those of `runs` that record it, by name; empty if it is nothing but the seed."""
    configs = {run.name: config for run in runs if (config := ((run.protocol or {}).get("info") or {}).get("config"))}
    found = differing(configs) if len(configs) > 1 else {}
    return found if any(key != "seed" for values in found.values() for key in values) else {}


def difference_texts(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The same for the eye: every run with every key, in one order."""
    keys = list(dict.fromkeys(key for values in found.values() for key in values))
    return {
        name: {key: value_text(values[key]) if key in values else MISSING for key in keys} for name, values in found.items()
    }
