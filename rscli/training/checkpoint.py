"""What a training checkpoint must hold: what was saved, to the bit; values of the right types; all of this run and its data.

A checkpoint carries a digest over everything in it, and says what data it was trained on. What the loss keeps is in a file of
its own (`rscli.training.loss_state`); in format 2, of older versions, it is inside. One of format 1 has neither digest nor
data: it is still read, and cannot be verified.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from rscli.config.problems import faults
from rscli.data.splits import Split
from rscli.errors import InputError

FORMAT = 3
SEALED = (2, FORMAT)
"""The formats that carry a digest."""
UNVERIFIED = 1
"""The format that has no digest and does not say what data it was trained on."""
COUNT = Field(ge=0, le=2**63)


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True, extra="allow", allow_inf_nan=False)


class _Meter(_Part):
    sums: dict[str, float]
    images: int = COUNT


class _Optimizer(_Part):
    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class _LossFile(_Part):
    name: str
    digest: str


class _Position(_Part):
    epoch: int = COUNT
    batch: int = COUNT
    model: dict[str, Tensor]
    optimizer: _Optimizer
    meter: _Meter
    loss_file: _LossFile | None = None


def remedy(path: Path) -> str:
    """What to do about a checkpoint that does not hold."""
    return f"Remove {path} to start the run again from its beginning with --resume."


def seal(state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` as a checkpoint is written: with its format, and the digest of everything in it."""
    sealed = {"format": FORMAT, **state}
    return {**sealed, "digest": digest(sealed)}


def check_seal(state: object, path: Path) -> dict[str, Any]:
    """What the checkpoint at `path` holds. Raises `InputError` unless it is to the bit what a run has saved, or of format 1."""
    keys = {"format", "epoch", "batch", "model", "optimizer", "meter"}
    if not isinstance(state, dict) or state.get("format") not in (*SEALED, UNVERIFIED) or not keys <= set(state):
        raise InputError(f"{path} is not a checkpoint of this version of rscli", remedy(path))
    if state["format"] == UNVERIFIED and set(state) == keys:
        return state
    content = {key: value for key, value in state.items() if key != "digest"}
    try:
        intact = state["format"] in SEALED and state.get("digest") == digest(content)
    except (TypeError, RecursionError):
        intact = False
    if not intact:
        raise InputError(f"the checkpoint {path} is damaged: its content does not match its digest", remedy(path))
    return content


def digest(value: object) -> str:
    """A SHA-256 (hex) over nested dictionaries, lists, tensors and plain values: types, names, shapes, every bit, the order.

    Raises `TypeError` for anything else.
    """
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()


def _feed(found: hashlib._Hash, value: object) -> None:
    """Every value begins with its type, and all but numbers with their length: no two values give the same bytes."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1)
        found.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        found.update(content.view(torch.uint8).numpy().data if content.numel() else b"")
    elif isinstance(value, dict):
        found.update(f"dict {len(value)};".encode())
        for item in value.items():
            _feed(found, item)
    elif isinstance(value, list | tuple) and type(value) in (list, tuple):
        found.update(f"{type(value).__name__} {len(value)};".encode())
        for item in value:
            _feed(found, item)
    elif isinstance(value, float) and type(value) is float:  # not a subclass, such as np.float64: it would not be read again
        found.update(b"float" + struct.pack("<d", value))
    elif value is None or type(value) in (str, int, bool, torch.dtype):
        text = str(value).encode("utf-8", "surrogatepass")
        found.update(f"{type(value).__name__} {len(text)};".encode() + text)
    else:
        raise TypeError(f"no checkpoint holds a {type(value).__name__}")


def training_data(split: Split) -> dict[str, Any]:
    """What a checkpoint says of the data: the number of images, the names of the classes, and digests of labels and images.

    Raises `InputError` if a file of the split is gone.
    """
    return {
        "images": len(split),
        "class_names": list(split.spec.class_names),
        "fingerprint": split.fingerprint(),
        "content": split.content(),
    }


def check_data(before: Mapping[str, Any] | None, now: Mapping[str, Any], path: Path) -> None:
    """Raises `InputError`, saying what differs, if the checkpoint at `path` is of other data than `now` (None: unknown)."""
    if before is None or before == now:
        return
    was, names = before.get("class_names") or [], now["class_names"]
    said = []
    if before.get("images") != now["images"]:
        said.append(f"it was {before.get('images')} images, now it is {now['images']}")
    if was != names:
        renamed = [f"{old!r} is now {new!r}" for old, new in zip(was, names, strict=False) if old != new]
        counts = [f"it was {len(was)} classes, now it is {len(names)}"] if len(was) != len(names) else []
        said.append("; ".join([*counts, *renamed[:3], *(["..."] if len(renamed) > 3 else [])]))
    if not said:
        said.append("the images or their labels are no longer the same (files changed, renamed, or moved to another class)")
    raise InputError(
        f"the training data differs from what {path} was trained on: {'; '.join(said)}",
        f"Restore the data, or start a new run in another folder (--out). {remedy(path)}",
    )


def check_position(state: Mapping[str, Any], path: Path) -> None:
    """Raises `InputError`, naming every value of the checkpoint at `path` that is of another type than a run writes."""
    try:
        _Position.model_validate(dict(state))
    except ValidationError as cause:
        raise InputError(f"the checkpoint {path} is damaged: {'; '.join(faults(cause))}", remedy(path)) from cause


def check_place(epoch: int, batch: int, *, epochs: int, batches: int) -> None:
    """Raises `ValueError` if a run of `epochs` with `batches` each is never saved at this place."""
    if epoch > epochs or batch >= (batches if epoch < epochs else 1):
        raise ValueError(f"it is at epoch {epoch + 1}, batch {batch}, of a run of {epochs} epochs with {batches} batches each")


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of every group of parameters, but for the learning rate, which the schedule changes."""
    return [{key: value for key, value in group.items() if key not in ("params", "lr")} for group in optimizer.param_groups]


def check_optimizer(optimizer: torch.optim.Optimizer, wanted: list[dict[str, Any]]) -> None:
    """Raises `ValueError` if the state that was loaded is of other settings than `wanted`, or not of the parameters' shapes."""
    for found, group in zip(settings_of(optimizer), wanted, strict=True):
        for name, value in group.items():
            if found.get(name) != value:
                raise ValueError(f"its optimiser has {name} {found.get(name)!r}, and the run has {value!r}")
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            shapes = (parameter.shape, torch.Size()) if name == "step" else (parameter.shape,)  # AdamW counts in a scalar
            if value is None or (isinstance(value, Tensor) and value.shape in shapes):
                continue
            raise ValueError(f"{name} of its optimiser does not have the shape of its parameter")


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """While the body takes in the checkpoint at `path`: raises `InputError` where it does not fit the run."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as cause:  # torch's, of any kind
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise InputError(f"the checkpoint {path} does not fit this run: {reason}", remedy(path)) from cause
