"""What a training configuration says: its sections, their types, bounds and units.

Most sections name a plugin and give its fields; `loggers` and `callbacks` hold several. The plugin class itself says which
fields there are, so here they are plain tables; everything else is written down below.
"""

from __future__ import annotations

from typing import Any, Literal

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


class Ramp(Section):
    """How a number gets to its configured value in the course of training: `[ramps.loss.lbd]`."""

    start: float = Field(description="value at the beginning of training")
    wait: float = Field(0.0, ge=0, description="epochs at that value, before it moves", json_schema_extra=unit("epochs"))
    epochs: float | None = Field(
        None,
        ge=0,
        description="epochs from there to the configured value; 0: at once; left out: all that are left",
        json_schema_extra=unit("epochs"),
    )
    shape: Literal["linear", "cosine"] = Field("linear", description="how it moves: evenly, or slowly at both ends")


class TrainConfig(Section):
    """A training run, fully resolved. A plugin's section is a table: its `name`, and its fields."""

    epochs: int = Field(90, ge=1, description="passes over the training images", json_schema_extra=unit("epochs"))
    batch: int = Field(
        256, ge=1, description="images in a batch, before it is split into chunks", json_schema_extra=unit("images")
    )
    seed: int = Field(0, ge=0, lt=2**63, description="what every random number of the run is derived from")
    chunk: bool | None = Field(
        None, description="split a batch into m chunks, each with its own optimiser step; if not given, as the loss wants"
    )
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        "fp32", description="precision of the forwards and their gradients; weights, losses and optimiser stay in fp32"
    )
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="most noisy images in one forward; left out: all of a step. Batch normalisation sees these alone",
        json_schema_extra=unit("noisy images"),
    )
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the gradient; longer ones are shortened to it")
    sync_batch_norm: bool = Field(
        True, description="whether several processes share the statistics of batch normalisation, as if they were one"
    )
    holdout: int = Field(
        0,
        ge=0,
        description="training images set aside, chosen by the seed: not trained on, but looked at by probes",
        json_schema_extra=unit("images"),
    )
    init: str | None = Field(
        None, min_length=1, description="a file of weights to start from: a model file, or a checkpoint of other code"
    )
    freeze: list[str] = Field(
        default_factory=list,
        max_length=1000,
        description="parameters that stay as they are: patterns of names, such as network.layer1.*, or `all but the head`",
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
    attack: dict[str, Any] | None = Field(None, description="the attack on the images or the noise")
    optimizer: dict[str, Any] = Field(description="the optimiser")
    schedule: dict[str, Any] = Field(description="the learning-rate schedule")
    ramps: dict[str, dict[str, Ramp | None]] = Field(
        default_factory=dict, description="numbers of the noise, the loss or the attack that move during training"
    )
    loggers: dict[str, Any] = Field(default_factory=dict, description="loggers, by name")
    callbacks: dict[str, Any] = Field(default_factory=dict, description="callbacks, by name")


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


def steps_per_epoch(n_images: int, batch: int, m: int) -> int:
    """Optimiser steps per epoch over `n_images` images in batches of `batch`, the last one possibly short.

    Each batch is split into at most `m` chunks of equal size (the last possibly smaller), with one step each.
    """
    full, rest = divmod(n_images, batch)
    return full * chunk_count(batch, m) + (chunk_count(rest, m) if rest else 0)


def smallest_step(n_images: int, batch: int, m: int) -> int:
    """Images in the smallest step of an epoch: `n_images` >= 1 in batches of `batch`, each split into at most `m` chunks."""
    batches = [images for images in (min(batch, n_images), n_images % batch) if images]
    return min(images - (chunk_count(images, m) - 1) * -(-images // m) for images in batches)
