"""How a result's model was trained, in the words of the tables of published figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from rscli.config.published import PublishedRow
from rscli.config.schema import SECTIONS
from rscli.config.settings import dotted, leaves
from rscli.results.reader import Results

ATTACK = {"name": "attack", "epsilon": "eps", "steps": "steps", "warmup": "warmup"}
"""Fields of an attack, and what the tables call them; those of a loss have the same names there."""

UNSAID = {"m": "1", "form": "default", "deferred": "0"}
"""What a published setting means by leaving it out."""

UNSAID_SCHEDULE: dict[str, Any] = {"chunk": None, "optimizer.nesterov": False}
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


def recipe(run: Results) -> Recipe | str:
    """The recipe of a result, from its protocol; or why there is none."""
    if run.protocol is None:
        return "no protocol lies beside the file"
    protocol, info = run.protocol, run.protocol.get("info") or {}
    if protocol.get("split") != "test":
        return f"they are of the split test, this is {protocol.get('split')}"
    if (noise := (protocol.get("noise") or {}).get("name")) is None or plain(noise) != "gaussian":
        return f"they are for Gaussian noise, this is {noise}"
    arch, loss, attack = info.get("arch"), info.get("loss"), info.get("attack")
    if not arch or not loss or protocol.get("sigma") is None:
        return "the protocol does not say how the model was trained"
    return Recipe(
        dataset=plain(str(protocol.get("dataset"))),
        arch=published_arch(arch),
        method=published_method(loss["name"], attacked=attack is not None),
        sigma=float(protocol["sigma"]),
        setting={
            **{key: value for key, value in loss.items() if key != "name"},
            **{name: (attack or {}).get(key) for key, name in ATTACK.items() if key in (attack or {})},
        },
        schedule=schedule(info.get("config") or {}),
    )


def plain(name: str) -> str:
    """A plugin's name without the package that a user may put in front: `package:name`."""
    return name.rpartition(":")[2]


def published_method(loss: str, *, attacked: bool) -> str:
    """What the tables call a loss, trained on attacked images or not: SmoothAdv is the Gaussian loss with an attack."""
    name = plain(loss)
    if not attacked:
        return name
    return "smoothadv" if name == "gaussian" else f"smoothadv+{name}"


def published_arch(arch: Mapping[str, Any]) -> str:
    """What the tables call an architecture: `resnet110` is cifar-resnet of depth 110; a network of timm has its own name."""
    name, _, variant = plain(arch["name"]).partition("/")
    if name == "timm":
        return (variant or str(arch.get("model"))).partition(".")[0]
    if name == "cifar-resnet":
        return f"resnet{arch.get('depth')}"
    if name == "cifar-densenet":
        return f"densenet{arch.get('depth')}" + ("" if arch.get("growth") == 12 else f"-growth{arch.get('growth')}")
    return name


def schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says outside the sections that name plugins, by dotted key; but for the seed."""
    return {dotted(key): value for key, value in leaves(config) if key[0] not in {*SECTIONS, "seed"}}


def setting_differences(ours: Recipe, row: PublishedRow, published_schedule: Mapping[str, Any]) -> tuple[str, ...]:
    """One text for each value in which a result was trained otherwise than `row`, such as `lbd 15, not 5.0`.

    `published_schedule` is what is known of the row's; only what both sides tell is compared.
    """
    texts = [f"{key} {_shown(mine)}, not {theirs}" for key, mine, theirs in _pairs(ours, row) if _apart(mine, theirs)]
    if not row.setting and row.method != "gaussian":
        texts.append("setting not published")
    known = {**UNSAID_SCHEDULE, **published_schedule} if published_schedule else {}
    for key, theirs in known.items():
        if key in ours.schedule and ours.schedule[key] != theirs:
            texts.append(f"{key} {_shown(ours.schedule[key])}, not {_shown(theirs)}")
    return tuple(texts)


def _pairs(ours: Recipe, row: PublishedRow) -> list[tuple[str, Any, str]]:
    """(key, our value, published value) of every setting that both sides tell."""
    if not row.setting and row.method != "gaussian":
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
