"""How a result's model was trained, in the words of the tables of published figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from rscli.config.presets import load_preset
from rscli.config.published import PublishedRow
from rscli.config.settings import dotted, leaves
from rscli.errors import RscliError
from rscli.results.reader import Results

ATTACK = {"name": "attack", "epsilon": "eps", "steps": "steps", "warmup": "warmup"}
"""Fields of an attack, and what the tables call them; those of a loss have the same names there."""

UNSAID = {"m": "1", "form": "default", "deferred": "0", "label_smoothing": "0"}
"""What a published setting means by leaving it out."""

_ELSEWHERE = {"data", "arch", "noise", "loss", "attack", "loggers", "callbacks", "seed"}

UNSAID_SCHEDULE: dict[str, Any] = {"chunk": None, "limit": None}
"""What a preset's schedule means by leaving it out."""


@dataclass(frozen=True)
class Recipe:
    """What picks a published row (as `PublishedRow` spells it), and the settings that pick the nearest of several.

    `schedule` has epochs, batch, optimiser and the like by dotted key; it is empty where the result does not record them.
    """

    dataset: str
    arch: str
    method: str
    sigma: float
    setting: dict[str, Any]
    schedule: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """For messages."""
        return f"{self.dataset}, {self.arch}, {self.method}, sigma {self.sigma:g}"

    def fits(self, row: PublishedRow) -> bool:
        """Whether `row` is about the same data set, architecture, method and sigma."""
        return (self.dataset, self.arch, self.method, self.sigma) == (row.dataset, row.arch, row.method, row.sigma)

    def distance(self, row: PublishedRow) -> float:
        """The sum over the settings of the relative difference to those of `row`: 0 for the same, at most 1 for each."""
        return sum(_apart(ours, theirs) for _, ours, theirs in _pairs(self, row))


def recipe(run: Results, preset: str | None = None) -> Recipe | str:
    """The recipe of a result: that of the preset its model was trained from (`preset`, where it records none), and what departs
    from it; or why there is none.
    """
    if run.protocol is None:
        return "there is no protocol beside the file"
    protocol, info = run.protocol, run.protocol.get("info") or {}
    if protocol.get("split") != "test":
        return f"they are for the split test, and this is {protocol.get('split')}"
    name = preset or info.get("preset")
    if name is None:
        return "it does not record a preset; --reproduces PRESET names the one to compare it with"
    try:
        row = load_preset(name).header.published
    except RscliError as error:
        if not info.get("preset"):
            raise  # the user named it
        return f"the preset that it records is unavailable: {error.message}"
    if row is None:
        return f"the preset {name} reproduces no published row"
    changed = sorted(key for key in info.get("overrides") or {} if _another_kind(key))
    if changed:
        return f"it departs from the preset {name} in {', '.join(changed)}"
    loss, attack = info.get("loss") or {}, info.get("attack") or {}
    return Recipe(
        dataset=row.dataset,
        arch=row.arch,
        method=row.method,
        sigma=float(protocol.get("sigma") or row.sigma),
        setting={
            **{key: value for key, value in loss.items() if key != "name"},
            **{name: attack[key] for key, name in ATTACK.items() if key in attack},
        },
        schedule=schedule(info.get("config") or {}),
    )


def _another_kind(key: str) -> bool:
    """Whether a setting makes another data set, network or method of a preset."""
    return key.partition(".")[0] in ("data", "arch") or key in ("noise.name", "loss.name", "attack", "attack.name")


def schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of epochs, batches, optimiser and schedule, by dotted key."""
    return {dotted(key): value for key, value in leaves(config) if key[0] not in _ELSEWHERE}


def setting_differences(ours: Recipe, row: PublishedRow, published_schedule: Mapping[str, Any]) -> tuple[str, ...]:
    """One text for each value in which a result was trained otherwise than `row`, such as `lbd 15, not 5.0`.

    `published_schedule` is what is known of the row's; only what both sides tell is compared.
    """
    texts = [f"{key} {_shown(mine)}, not {theirs}" for key, mine, theirs in _pairs(ours, row) if _apart(mine, theirs)]
    if _unpublished(ours, row):
        texts.append("setting not published")
    known = {**UNSAID_SCHEDULE, **published_schedule} if published_schedule else {}
    for key, theirs in known.items():
        if key in ours.schedule and ours.schedule[key] != theirs:
            texts.append(f"{key} {_shown(ours.schedule[key])}, not {_shown(theirs)}")
    return tuple(texts)


def _unpublished(ours: Recipe, row: PublishedRow) -> bool:
    """Whether `row` says nothing of the settings, though the method has some that say something."""
    silent = {key for key, value in ours.setting.items() if key in UNSAID and not _apart(value, UNSAID[key])}
    return not row.setting and bool(ours.setting.keys() - silent - {"m"})


def _pairs(ours: Recipe, row: PublishedRow) -> list[tuple[str, Any, str]]:
    """(key, our value, published value) of every setting that both sides tell."""
    if _unpublished(ours, row):
        return []
    theirs = {**UNSAID, **_parsed(row.setting)}
    return [(key, ours.setting[key], theirs[key]) for key in theirs if key in ours.setting]


def _parsed(setting: str) -> dict[str, str]:
    """`m=2;lbd=5.0` as a dictionary. A bare word is a flag; digits behind it (`deferred50`) say from when it holds."""
    parts = [part.partition("=") for part in setting.split(";") if part]
    return {key if equals else key.rstrip("0123456789"): value if equals else "1" for key, equals, value in parts}


def _apart(ours: Any, theirs: str) -> float:
    """How far two values are apart, in [0, 1]. A published number may be a fraction (255/256), or one of two (`4 or 6`)."""
    numbers = [float(Fraction(text)) for text in re.findall(r"\d+/\d+|\d+(?:\.\d+)?", theirs)]
    if not isinstance(ours, int | float) or not numbers:
        return float(str(ours).lower() != theirs.lower())
    return min(abs(ours - number) / max(abs(ours), number, 1e-300) for number in numbers)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
