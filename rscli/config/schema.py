"""What a training configuration says: its sections, their types, bounds and units.

Most sections name a plugin and give its fields; `loggers` and `callbacks` hold several. The plugin class itself says which
fields there are, so here they are plain tables; everything else is written down below.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from rscli.api import unit

SECTIONS = {
    "data": "datasets",
    "arch": "architectures",
    "noise": "noises",
    "loss": "losses",
    "attack": "attacks",
    "optimizer": "optimizers",
    "schedule": "schedules",
}
"""The sections that name a plugin, and the kind of plugin they name."""

GROUPS = ("loggers", "callbacks")
"""The sections that hold any number of plugins of that kind, each a table under its name: `[callbacks.checkpoint]`."""


class Section(BaseModel):
    """A part of a configuration: frozen, strict about types (but 1 is a float too), unknown keys and NaN refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


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
    limit: int | None = Field(
        None,
        ge=1,
        description="train on so many images only, for a quick look: the first of every class, in equal numbers; left out: all",
        json_schema_extra=unit("images"),
    )
    data: dict[str, Any] = Field(description="the data set")
    arch: dict[str, Any] = Field(description="the architecture")
    noise: dict[str, Any] = Field(description="the smoothing distribution")
    loss: dict[str, Any] = Field(description="the objective")
    attack: dict[str, Any] | None = Field(None, description="what moves the clean images before the noise is added")
    optimizer: dict[str, Any] = Field(description="the optimiser")
    schedule: dict[str, Any] = Field(description="the learning rate over the epochs")
    loggers: dict[str, Any] = Field(default_factory=dict, description="what keeps the figures of a run, by name")
    callbacks: dict[str, Any] = Field(default_factory=dict, description="what happens during training, by name")


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
    """Optimiser steps per epoch over `n_images` images in batches of `batch`, the last one possibly short.

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
