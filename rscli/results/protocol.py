"""The protocol beside a result file: everything that its rows depend on, and under `info` what they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rscli.config.problems import faults
from rscli.errors import InputError
from rscli.results.rows import LARGEST_COUNT
from rscli.runtime.files import read_json

FORMAT = 1

OF_THE_START = ("start", "skip", "max", "trial")
"""Entries of `info` that say which images a run began with, and whether after a trial; one that goes on may take others."""


class _Part(BaseModel):
    """A part of a protocol: null stands for what is unknown, and there may be more than is read."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Named(_Part):
    """A plugin: its name, and its fields."""

    name: str


class _Certifier(_Named):
    radii: list[Annotated[float, Field(ge=0)]] | None = None


class _Info(_Part):
    data: _Named | None = None
    arch: _Named | None = None
    loss: _Named | None = None
    attack: _Named | None = None
    config: dict[str, Any] | None = None
    train_seed: int | None = None
    batch: int | None = Field(None, ge=1, le=10**6)
    channels_last: bool | None = None
    lanes: int | None = Field(None, ge=1)
    threads: int | None = Field(None, ge=1)
    trial: bool | None = None
    compile: bool | None = None


class _Protocol(_Part):
    format: int = Field(ge=1)
    dataset: str | None = None
    split: str | None = None
    noise: _Named | None = None
    sigma: float | None = Field(None, gt=0)
    certifier: _Certifier | None = None
    n0: int | None = Field(None, ge=0, le=LARGEST_COUNT)
    n: int | None = Field(None, ge=0, le=LARGEST_COUNT)
    alpha: float | None = Field(None, gt=0, lt=1)
    radii: list[Annotated[float, Field(ge=0)]] | None = None
    labels: bool | None = None
    seed: int | None = None
    precision: str | None = None
    info: _Info | None = None


def protocol_path(path: Path) -> Path:
    """Where the protocol of the result file `path` lies."""
    return path.with_name(f"{path.name}.protocol.json")


def read_protocol(path: Path) -> dict[str, Any] | None:
    """The protocol of the result file `path`; None if it has none. Raises `InputError` if it is broken or of a newer format."""
    beside = protocol_path(path)
    if not beside.exists():
        return None
    protocol = read_json(beside, "protocol file")
    if not isinstance(protocol, dict) or not isinstance(protocol.get("format"), int):
        raise InputError(f"{beside} is not the protocol of a result file: it has no format number")
    if protocol["format"] > FORMAT:
        raise InputError(f"{beside} has format {protocol['format']}, this rscli reads up to {FORMAT}", "Update rscli.")
    try:
        _Protocol.model_validate(protocol)
    except ValidationError as cause:
        hint = "Put the protocol file back as it was written."
        raise InputError(f"{beside} is broken: {'; '.join(faults(cause))}", hint) from cause
    return protocol


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One text for each value in which two JSON objects differ, such as `certifier.alpha was 0.001, is now 0.01`."""
    old, new = _flat(before), _flat(now)
    keys = [*old, *(key for key in new if key not in old)]
    return [f"{key} was {_shown(old, key)}, is now {_shown(new, key)}" for key in keys if _shown(old, key) != _shown(new, key)]


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, with dotted keys."""
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return out


def _shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "absent"


def agree(path: Path, before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """What differs in `info`, as notes. Raises `InputError` if there is no protocol, or anything else differs."""
    if before is None:
        raise InputError(
            f"{path} has no protocol beside it ({protocol_path(path).name}), so nobody knows how its rows were made",
            "Put the protocol file back, or choose another --out.",
        )
    info = [dict(protocol.get("info") or {}) for protocol in (before, now)]
    changed = differences({**before, "info": {}}, {**now, "info": {}})
    if changed:
        raise InputError(
            f"{path} was begun with another protocol:\n" + "\n".join(f"  {line}" for line in changed),
            "Rows of one file must be comparable. Use the same model, data and options, or choose another --out.",
        )
    info = [{key: value for key, value in one.items() if key not in OF_THE_START} for one in info]
    return [f"{path.name}, since it was begun: {line}" for line in differences(*info)]
