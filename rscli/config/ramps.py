"""Ramps: numbers of the noise, the loss or the attack that get to their configured value in the course of training.

    [ramps.loss.lbd]
    start = 0
    epochs = 10

The configured value is where a ramp ends: the configuration, and the model file, say what training ended with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from rscli.api import Plugin
from rscli.config.problems import Problems, rule_of
from rscli.config.schema import Ramp, TrainConfig

RAMPED = ("loss", "attack", "noise")
"""The sections whose numbers may be ramped."""

FIXED = {("loss", "m"): "decides how a batch is split, and stays the same for a whole run"}


def value_at(ramp: Ramp, end: float, epoch: float, epochs: int) -> float:
    """The value after `epoch` epochs (with a fraction inside one) of `epochs` in all; `end` is the configured one."""
    length = epochs - ramp.wait if ramp.epochs is None else ramp.epochs
    done = (epoch - ramp.wait) / length if length else float(epoch >= ramp.wait)
    if done <= 0:
        return ramp.start
    if done >= 1:
        return end
    share = done if ramp.shape == "linear" else (1 - math.cos(math.pi * done)) / 2
    moved = ramp.start + (end - ramp.start) * share
    return round(moved) if isinstance(end, int) else moved


def moved(plugin: Plugin, values: Mapping[str, Any]) -> Plugin:
    """A plugin like this one with other `values` of some fields. Raises pydantic's `ValidationError` if they do not fit."""
    fields = {name: getattr(plugin, name) for name in type(plugin).model_fields}
    return type(plugin)(**{**fields, **values})


def check_ramps(head: TrainConfig, plugins: Mapping[str, Plugin], problems: Problems) -> None:
    """Notes in `problems` every ramp of something else than a number, too long for the run, or with a start out of bounds."""
    for section, ramps in head.ramps.items():
        plugin = plugins.get(section)
        if section not in RAMPED:
            problems.add(("ramps", section), f"cannot be ramped: only numbers of {', '.join(RAMPED)} can")
        elif plugin is None:
            if not any(key[0] == section and setting.value is not None for key, setting in problems.settings.items()):
                problems.add(("ramps", section), "is ramped, but there is no attack; write --set attack.name=NAME")
        else:
            starts = {}
            for field, ramp in ramps.items():
                if ramp is not None and _fits(head, section, field, ramp, plugin, problems):
                    starts[field] = _typed(ramp.start, getattr(plugin, field))
            _check_starts(section, plugin, starts, problems)


def _fits(head: TrainConfig, section: str, field: str, ramp: Ramp, plugin: Plugin, problems: Problems) -> bool:
    key = ("ramps", section, field)
    rule = _field_rule(section, field, plugin)
    if rule is not None:
        problems.add(key, rule)
        return False
    length = ramp.epochs or 0.0
    if ramp.wait >= head.epochs or ramp.wait + length > head.epochs:
        problems.add(
            (*key, "wait" if ramp.wait >= head.epochs else "epochs"),
            f"must be less: {section}.{field} would not get to its value in a run of {head.epochs} epochs",
        )
        return False
    return True


def _field_rule(section: str, field: str, plugin: Plugin) -> str | None:
    """What is wrong with ramping a field, if anything is."""
    if (section, field) in FIXED:
        return FIXED[section, field]
    numbers = [name for name in type(plugin).model_fields if _is_number(getattr(plugin, name)) and (section, name) not in FIXED]
    if field in numbers:
        return None
    what = "is not a number" if field in type(plugin).model_fields else "is no setting here"
    return f"{what}, and cannot be ramped; numbers of this {section} are: {', '.join(numbers) or 'none'}"


def _check_starts(section: str, plugin: Plugin, starts: Mapping[str, Any], problems: Problems) -> None:
    try:
        moved(plugin, starts)
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False):
            field = str(detail["loc"][0]) if detail["loc"] else ""
            key = ("ramps", section, field, "start") if field in starts else ("ramps", section)
            problems.add(key, rule_of(detail))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _typed(start: float, end: Any) -> float:
    """`start` as a whole number where the field has one, and it is one."""
    return int(start) if isinstance(end, int) and float(start).is_integer() else start
