"""The protocol beside a result file: everything that its rows depend on, and under `info` what they do not."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rscli.api import Certifier
from rscli.config.problems import faults
from rscli.errors import InputError, PluginError
from rscli.registry import installed
from rscli.results.rows import LARGEST_COUNT
from rscli.runtime.files import read_json, write_text, writing
from rscli.text import json_text

FORMAT = 2
"""From 2 on a protocol has a digest of its own content (`sha256`), and every part of a result names the digest."""

BEING_WRITTEN_SECONDS = 2.0
"""So long another process may take to write a protocol where the file system has no hard links; else it is there at once."""

OF_THE_START = ("start", "skip", "max", "trial")
"""Entries of `info` that say which images a run began with, and whether after a trial; one that goes on may take others."""

OF_THE_MODEL = ("classes", "images", "preset", "overrides")
"""Entries of `info` that older protocols lack: classes and images are those of the model and the split, whose digests agree."""


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
    lanes: int | None = Field(None, ge=1)  # batches in parallel: the file keeps the old name
    threads: int | None = Field(None, ge=1)
    trial: bool | None = None
    compile: bool | None = None
    classes: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    images: int | None = Field(None, ge=1, le=LARGEST_COUNT)


class _Protocol(_Part):
    format: int = Field(ge=1)
    sha256: str | None = None
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
    """The protocol of the result file `path`; None if it has none.

    Raises `InputError` if it is broken, of a newer format, or not what rscli wrote (`sha256` is the digest of the rest of it).
    """
    beside = protocol_path(path)
    if not beside.exists():
        return None
    protocol = _read_whole(beside)
    if not isinstance(protocol, dict) or not isinstance(protocol.get("format"), int):
        raise InputError(f"{beside} is not the protocol of a result file: it has no format number")
    if protocol["format"] > FORMAT:
        raise InputError(f"{beside} has format {protocol['format']}, this rscli reads formats up to {FORMAT}", "Update rscli.")
    hint = "Restore the protocol file."
    try:
        _Protocol.model_validate(protocol)
    except ValidationError as cause:
        raise InputError(f"{beside} is broken: {'; '.join(faults(cause))}", hint) from cause
    said, found = protocol.get("sha256"), digest(protocol)
    if said != found and (said is not None or protocol["format"] > 1):
        text = f"{beside} was changed after it was written: its sha256 is {said or 'missing'}, but its content has {found}"
        raise InputError(text, hint)
    return protocol


def _read_whole(beside: Path) -> Any:
    """The JSON in `beside`; one that another process is just writing is waited for."""
    until = time.monotonic() + BEING_WRITTEN_SECONDS
    while True:
        try:
            return read_json(beside, "protocol file")
        except InputError as cause:
            with contextlib.suppress(OSError):
                if not beside.read_bytes().endswith(b"\n") and time.monotonic() < until:
                    time.sleep(0.02)
                    continue
            hint = "Restore it; or, if no row has been written beside it yet, remove it."
            raise InputError(cause.message, hint) from cause


def digest(protocol: dict[str, Any]) -> str:
    """The SHA-256 (hex) of a protocol's content, in whatever order it is written: of all but its entry `sha256`.

    `info` is part of it: a protocol is written once, and a run that goes on leaves it as it is.
    """
    content = {key: value for key, value in protocol.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def claim(path: Path, protocol: dict[str, Any]) -> dict[str, Any]:
    """Writes the protocol of the result `path`, unless one is there, and returns the one that is there now.

    Of several processes that do this at once exactly one writes its own; the others get that one. Raises as `write_text` does.
    """
    plain = {**json.loads(json.dumps(protocol)), "format": FORMAT}
    signed = {**plain, "sha256": digest(plain)}
    beside = protocol_path(path)
    if not beside.exists():
        mine = beside.with_name(f".{beside.name}.{secrets.token_hex(4)}.part")
        try:
            write_text(mine, json_text(signed) + "\n")
            _place(mine, beside)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(mine)  # noqa: PTH108
    there = read_protocol(path)
    if there is None:
        raise InputError(f"{beside} was removed while this run was starting", "Run the same command again.")
    return there


def _place(mine: Path, beside: Path) -> None:
    """Gives the whole file `mine` the name `beside` too, unless that is taken; without hard links, copies it there."""
    with writing(beside), contextlib.suppress(FileExistsError):
        try:
            os.link(mine, beside)
        except FileExistsError:
            raise
        except OSError:
            text = mine.read_bytes()
            with beside.open("xb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())


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


def certifier_of(protocol: dict[str, Any]) -> dict[str, Any]:
    """What a protocol says of its certifier, under the names that its settings have now; with which of them are decisive."""
    told = protocol.get("certifier") or {}
    try:
        plugin = cast(type[Certifier], installed().load("certifiers", str(told.get("name"))))
    except PluginError:  # not installed: what the protocol says by itself must do
        return {"decisive": (), **told}
    return {"decisive": plugin.decisive, **{plugin.renamed.get(key, key): value for key, value in told.items()}}


def _decisive(protocol: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for rows of one file, without what the protocol `before`, of an older version, could not say."""
    certifier = {key: value for key, value in certifier_of(protocol).items() if key != "decisive"}
    if "version" not in (before.get("certifier") or {}) and before["format"] < FORMAT:
        certifier.pop("version", None)
    return {**protocol, "norm": protocol.get("norm", "L2"), "certifier": certifier, "info": {}, "format": 0, "sha256": ""}


def agree(path: Path, before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """What differs in `info`, as notes. Raises `InputError` if there is no protocol, or anything else differs."""
    if before is None:
        raise InputError(
            f"{path} has no protocol beside it ({protocol_path(path).name}), so it is unknown how its rows were certified",
            "Restore the protocol file, or choose another --out.",
        )
    info = [dict(protocol.get("info") or {}) for protocol in (before, now)]
    changed = differences(*(_decisive(protocol, before) for protocol in (before, now)))
    if changed:
        raise InputError(
            f"{path} was started under another protocol:\n" + "\n".join(f"  {line}" for line in changed),
            "Rows of one file must be comparable. Use the same model, data and options, or choose another --out.",
        )
    info = [{key: value for key, value in one.items() if key not in (*OF_THE_START, *OF_THE_MODEL)} for one in info]
    return [f"{path.name}, since it was started: {line}" for line in differences(*info)]
