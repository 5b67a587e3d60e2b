"""What a training checkpoint must hold: every value of its type, and all of it of the run that goes on with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from rscli.config.problems import faults
from rscli.errors import InputError

COUNT = Field(ge=0, le=2**63)


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True, extra="allow", allow_inf_nan=False)


class _Meter(_Part):
    sums: dict[str, float]
    images: int = COUNT


class _Optimizer(_Part):
    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class _Position(_Part):
    epoch: int = COUNT
    batch: int = COUNT
    model: dict[str, Tensor]
    optimizer: _Optimizer
    meter: _Meter


def remedy(path: Path) -> str:
    """What to do about a checkpoint that does not hold."""
    return f"Remove {path} to start the run again from its beginning with --resume."


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
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise ValueError(f"{name} of its optimiser does not have the shape of its parameter")


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """While the body takes in the checkpoint at `path`: raises `InputError` where it does not fit the run."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as cause:  # torch's, of any kind
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise InputError(f"the checkpoint {path} does not fit this run: {reason}", remedy(path)) from cause
