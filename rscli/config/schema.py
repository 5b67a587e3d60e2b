"""What a training configuration says: its sections, their types, bounds and units.

The sections `data`, `arch`, `noise`, `loss` and `attack` each name a plugin and give its fields. The plugin class itself says
which fields there are, so here they are plain tables; everything else is written down below.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from rscli.api import unit

SECTIONS = {"data": "datasets", "arch": "architectures", "noise": "noises", "loss": "losses", "attack": "attacks"}
"""The sections that name a plugin, and the kind of plugin they name."""


class Section(BaseModel):
    """A part of a configuration: frozen, strict about types (but 1 is a float too), unknown keys and NaN refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class Optimizer(Section):
    """Stochastic gradient descent with momentum; weight decay on every parameter."""

    lr: float = Field(gt=0, description="learning rate before its first drop", json_schema_extra=unit("1"))
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum", json_schema_extra=unit("1"))
    weight_decay: float = Field(1e-4, ge=0, description="L2 penalty on all parameters", json_schema_extra=unit("1"))
    nesterov: bool = Field(False, description="Nesterov's form of the momentum")

    @field_validator("nesterov")
    @classmethod
    def _needs_momentum(cls, nesterov: bool, info: ValidationInfo) -> bool:
        if nesterov and info.data.get("momentum") == 0:
            raise ValueError("needs optimizer.momentum > 0")
        return nesterov


class Schedule(Section):
    """A step schedule: the learning rate drops after certain epochs."""

    drops: tuple[int, ...] = Field(
        (),
        strict=False,
        description="numbers of finished epochs after which the learning rate is multiplied by factor",
        json_schema_extra=unit("epochs"),
    )
    factor: float = Field(
        0.1, gt=0, le=1, description="what a drop multiplies the learning rate by", json_schema_extra=unit("1")
    )

    @field_validator("drops")
    @classmethod
    def _increasing(cls, drops: tuple[int, ...]) -> tuple[int, ...]:
        if any(drop < 1 for drop in drops) or any(b <= a for a, b in pairwise(drops)):
            raise ValueError("must be increasing numbers of epochs, the first at least 1")
        return drops


class TrainConfig(Section):
    """A training run, fully resolved. A plugin's section is a table: its `name`, and its fields."""

    epochs: int = Field(90, ge=1, description="passes over the training images", json_schema_extra=unit("epochs"))
    batch: int = Field(
        256, ge=1, description="images in a batch, before it is split into chunks", json_schema_extra=unit("images")
    )
    seed: int = Field(0, ge=0, lt=2**63, description="what every random number of the run is derived from")
    chunk: bool | None = Field(
        None, description="split a batch into m chunks, each with its own optimiser step; left out: as the loss wants"
    )
    data: dict[str, Any] = Field(description="the data set")
    arch: dict[str, Any] = Field(description="the architecture")
    noise: dict[str, Any] = Field(description="the smoothing distribution")
    loss: dict[str, Any] = Field(description="the objective")
    attack: dict[str, Any] | None = Field(None, description="what moves the clean images before the noise is added")
    optimizer: Optimizer = Field(description="the optimiser")
    schedule: Schedule = Field(description="the learning rate over the epochs")


class PublishedKey(Section):
    """What picks one row of a table of published figures."""

    dataset: str = Field(description="data set, as the table spells it")
    arch: str = Field(description="architecture, as the table spells it")
    method: str = Field(description="training method, as the table spells it")
    sigma: float = Field(gt=0, description="standard deviation of the noise", json_schema_extra=unit("[0, 1] pixels"))
    setting: str = Field(description="hyper-parameters, as the table spells them")


class PresetHeader(Section):
    """What a preset file says about itself in its section [preset]."""

    title: str = Field(min_length=1, description="one line for the listing")
    source: str = Field(min_length=1, description="paper and table, and where the settings come from")
    note: str | None = Field(None, description="where the preset departs from its source, and why")
    published: PublishedKey | None = Field(None, description="the published figures that it reproduces")


def chunk_count(images: int, m: int) -> int:
    """How many chunks `torch.chunk` makes of `images` >= 1 images when asked for `m` >= 1: at most min(m, images)."""
    return -(-images // -(-images // m))


def steps_per_epoch(n_images: int, batch: int, m: int, chunked: bool = True) -> int:
    """Optimiser steps an epoch over `n_images` images in batches of `batch`, the last one possibly short.

    With `chunked`, each batch is split into at most `m` chunks of equal size (the last possibly smaller), with one step each.
    """
    full, rest = divmod(n_images, batch)
    if not chunked:
        return full + (rest > 0)
    return full * chunk_count(batch, m) + (chunk_count(rest, m) if rest else 0)


def smallest_step(n_images: int, batch: int, m: int) -> int:
    """Images in the smallest step of an epoch: `n_images` >= 1 in batches of `batch`, each split into at most `m` chunks."""
    batches = [images for images in (min(batch, n_images), n_images % batch) if images]
    return min(images - (chunk_count(images, m) - 1) * -(-images // m) for images in batches)
