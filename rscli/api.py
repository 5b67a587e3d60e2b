"""The plugin contract: everything that a plugin package needs to import from rscli, besides `rscli.errors` and `rscli.stats`.

A plugin is a pydantic model: its fields are its hyper-parameters (type, bounds, unit, one-line description) and one method
does the work. Presets validate against the fields, `rscli plugins info KIND NAME` prints them, and the model file records them.
A plugin is found through an entry point in the group `rscli.<kind>`; the first line of its docstring is its description.

A data set that reads folders takes `class_folders` and `list_images` from here, so that an image is the same thing everywhere.

This module imports no torch, so that listings stay fast; plugins that keep torch out of their module level do the same
favour to their users.

Conventions: images are float tensors `(batch, channel, height, width)` with pixels in [0, 1] **before any normalisation**;
sigma, epsilon and radii are L2 lengths in the same units; `m` counts the noisy copies of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from rscli.image_files import (
    COMMON_SUFFIXES,
    ImageListing,
    class_folders,
    has_images,
    list_images,
    loose_images,
    skipped_text,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

API_VERSION = 1
"""The version of this contract; it changes only when a plugin written for the older one would break."""

ABSTAIN = -1
"""The class that a certificate names when it abstains."""

KINDS = ("noises", "losses", "attacks", "architectures", "datasets", "certifiers", "presets")
"""Every kind of plugin; the entry-point group of a kind is `rscli.<kind>`."""


def unit(text: str) -> dict[str, Any]:
    """The unit of a hyper-parameter: `Field(0.5, gt=0, json_schema_extra=unit("[0, 1] pixels"))`."""
    return {"unit": text}


class Plugin(BaseModel):
    """The base class of every plugin: frozen hyper-parameters, unknown ones refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    kind: ClassVar[str]
    variant: ClassVar[str | None] = None
    """The field that takes the part behind a slash in a name: `timm/resnet18` sets the field `model` of the plugin `timm`."""

    @classmethod
    def offers(cls, name: str) -> bool:  # noqa: ARG003
        """Whether the field `variant` takes `name`; asked when no plugin has that name, to suggest this one. May be slow."""
        return False


# --- noises ------------------------------------------------------------------------------------------------------------------


class Noise(Plugin):
    """A smoothing distribution and its geometry."""

    kind: ClassVar[str] = "noises"
    norm: ClassVar[str]
    """The norm of the certified radius, e.g. `L2`."""

    sigma: float = Field(gt=0, description="standard deviation of the noise", json_schema_extra=unit("[0, 1] pixels"))

    def sample(self, shape: Sequence[int], *, generator: torch.Generator, device: torch.device) -> Tensor:
        """Draws float32 noise of `shape` (any shape, the pixel dimensions last) on `device` with `generator`.

        Certification calls this from several threads at once, each with a generator of its own.
        """
        raise NotImplementedError

    def radius(self, p_a: float, p_b: float) -> float:
        """The certified radius for a lower bound `p_a` on the top class and an upper bound `p_b` on every other class.

        Both in [0, 1]; the radius is in the units of sigma, never negative, 0 if `p_a <= p_b`. Increasing in `p_a`, decreasing
        in `p_b`. Raises `rscli.errors.InputError` outside [0, 1], and where the radius would be infinite (p_a = 1 or p_b = 0,
        which no number of samples gives).
        """
        raise NotImplementedError

    def probability(self, radius: float) -> float:
        """What `p_a` must exceed for `radius` when `p_b = 1 - p_a`: the inverse of `radius(p, 1 - p)`; 1/2 at radius 0.

        In [1/2, 1], for a `radius` in the units of sigma. Raises `rscli.errors.InputError` if that is negative or not finite.
        """
        raise NotImplementedError


# --- training: losses and attacks --------------------------------------------------------------------------------------------


@dataclass
class TrainStep:
    """What a loss or an attack may look at in one optimiser step.

    `images` (batch, channel, height, width) in [0, 1], as the attack left them; `labels` (batch,) int64;
    `noise` (m, batch, channel, height, width), already scaled by sigma. `drops` counts how often the learning rate
    has dropped so far. Everything random must come from `generator` (on the device of the images), so that a resumed run
    repeats it.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    noise: Tensor
    sigma: float
    epoch: int
    drops: int
    generator: torch.Generator

    def logits(self, images: Tensor) -> Tensor:
        """The logits (..., classes) of `images` (..., channel, height, width); any number of leading dimensions."""
        leading = images.shape[:-3]
        out: Tensor = self.model(images.reshape(-1, *images.shape[-3:]))
        return out.reshape(*leading, out.shape[-1])

    @cached_property
    def noisy_logits(self) -> Tensor:
        """The logits (m, batch, classes) of the images plus each copy of the noise; one forward, computed once."""
        return self.logits(self.images + self.noise)

    @cached_property
    def clean_logits(self) -> Tensor:
        """The logits (batch, classes) of the images without noise; one forward of its own, computed once."""
        return self.logits(self.images)


class Loss(Plugin):
    """The objective of one optimiser step. Override `step`; or, if the noisy logits are enough, derive from `NoisyLoss`."""

    kind: ClassVar[str] = "losses"
    chunked: ClassVar[bool] = True
    """Whether a batch is split into m chunks, each with m copies and its own optimiser step (so that a forward keeps the
    rows of a batch), as the published code of most methods does. `chunk = false` in a configuration overrides it."""

    m: int = Field(1, ge=1, description="noisy copies of an image")

    def step(self, step: TrainStep) -> dict[str, Tensor]:
        """The named terms of the objective, scalars with gradients; the engine minimises their sum and logs each.

        May raise `rscli.errors.InputError` for what the user can mend. The engine raises `rscli.errors.PluginError` if there is
        no term or one is no scalar, and `rscli.errors.RscliError` if one is not finite.
        """
        raise NotImplementedError


class NoisyLoss(Loss):
    """A loss of the noisy logits alone."""

    def terms(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The named terms from `logits` (m, batch, classes) and `labels` (batch,) int64: scalars, summed by the engine.

        Raises as `Loss.step` does.
        """
        raise NotImplementedError

    def step(self, step: TrainStep) -> dict[str, Tensor]:
        """The terms of the step's noisy logits, as scalars by name; raises what `terms` raises."""
        return self.terms(step.noisy_logits, step.labels)


class Attack(Plugin):
    """Moves the clean images before the noise is added."""

    kind: ClassVar[str] = "attacks"
    least_m: ClassVar[int] = 1
    """How many noisy copies of an image it needs at least: with fewer, training does not begin."""

    def perturb(self, step: TrainStep) -> Tensor:
        """The moved images (batch, channel, height, width), in [0, 1], detached.

        The engine calls this with the model in eval mode and its parameters frozen, and restores both afterwards.
        `step.noise` is the noise that the loss will train on.
        """
        raise NotImplementedError


# --- architectures -----------------------------------------------------------------------------------------------------------


class Architecture(Plugin):
    """Builds a network. The engine puts the normalisation of the data set in front, as a layer."""

    kind: ClassVar[str] = "architectures"
    field_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """What other code calls networks of this kind, with the fields that make them: `{"cifar_resnet110": {"depth": 110}}`."""

    @classmethod
    def rename(cls, name: str) -> str:
        """The network's name of a tensor that other code calls `name`, whatever is in front of it; an unknown `name` stays."""
        return name

    def build(self, classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
        """A freshly initialised network from images `input_shape` (channel, height, width) to `classes` logits.

        Certification on a CPU calls the network, in eval mode, from several threads at once. Raises
        `rscli.errors.InputError` when it cannot take that shape. Initial weights come from torch's global generator; a
        field `pretrained`, if there is one, is False when a model file is rebuilt.
        """
        raise NotImplementedError


# --- data sets ---------------------------------------------------------------------------------------------------------------


class Transform(BaseModel):
    """How an image of any size becomes the input of a model: data, so that a model file can carry it.

    Converted to `channels` (1 grey, 3 RGB), resized so that the shorter side is `resize` (bilinear, antialiased; none: left as
    it is), and cropped in the centre to `crop` (height, width).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: Literal[1, 3]
    resize: int | None = Field(None, ge=1)
    crop: tuple[int, int]


class Augmentation(BaseModel):
    """What happens to a training image: data, applied by the engine.

    `padding`: zero padding on each side, then a random crop of the input's size. `flip`: horizontal, with probability 1/2.
    `resized_crop`: a random part of the original file (8 to 100 % of its area, aspect 3/4 to 4/3), resized to the input.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    padding: int = Field(0, ge=0)
    flip: bool = False
    resized_crop: bool = False


class DataSpec(BaseModel):
    """What a model must know of its data: class names, input shape, normalisation and transforms."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    """(channel, height, width)"""
    mean: tuple[float, ...] | None = None
    """Per-channel mean of the normalisation layer; None: the model has no such layer."""
    std: tuple[float, ...] | None = None
    test_transform: Transform
    augmentation: Augmentation = Augmentation()
    sizes: dict[str, int] = Field(default_factory=dict)
    """Images in each split, as far as known without reading them."""


@dataclass(frozen=True)
class MemoryImages:
    """A split held in memory: `images` uint8 (n, channel, height, width), `labels` int64 (n,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class FileImages:
    """A split read from disk image by image: `paths` in a fixed order, `labels` int64 (n,).

    `cache`: the split is small; the engine reads it once, through the test transform, and holds it in memory. `note`: a line
    for the user when the split is opened, such as the `skipped_text` of what was found.
    """

    paths: Sequence[Path]
    labels: NDArray[np.int64]
    cache: bool = False
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """One line of `rscli doctor`: `ok`, what was found or is missing, and what to do about it."""

    ok: bool
    text: str
    hint: str | None = None


class Dataset(Plugin):
    """Images in [0, 1] with labels; normalisation and transforms are described as data and applied by the engine.

    The held-out split is always called `test`.
    """

    kind: ClassVar[str] = "datasets"

    def spec(self, root: Path) -> DataSpec:
        """What a model must know. Must not need the images where the data set is a fixed one (so that a dry run works)."""
        raise NotImplementedError

    def load(self, split: str, root: Path, *, download: bool = False) -> MemoryImages | FileImages:
        """The images of `split` found under the data folder `root`; fetched first if `download` and they are missing.

        Raises `rscli.errors.InputError` when the split is unknown, or files are missing (saying what to do).
        """
        raise NotImplementedError

    def check(self, root: Path) -> list[Finding]:
        """What `rscli doctor` says of this data set under `root`; quick, reads no images."""
        return []


# --- certifiers --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What is asked about one image.

    `thresholds`: what the probability of the class must exceed for each wanted radius, increasing (empty: as large a radius
    as can be had). `label`: test this class instead of the one that the selection samples choose.
    """

    classes: int
    thresholds: tuple[float, ...] = ()
    label: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a certifier wants for one image: the class under test, and the increasing sample counts at which it will look.

    `state` is the certifier's own. No looks at all: the image is decided (abstains) with the selection samples alone.
    """

    candidate: int
    looks: tuple[int, ...]
    state: Any = None


@dataclass(frozen=True)
class Decision:
    """How an image was decided: the class (or ABSTAIN), bounds on probabilities, and why sampling stopped.

    With probability at least 1 - alpha, the class has probability at least `p_a` and every other at most `p_b`.
    `saturated`: the bound is the largest that so many samples can give; of a certifier of given radii (`grid`): all of them
    hold, and more might be proved.
    """

    predict: int
    p_a: float
    p_b: float
    reason: str
    saturated: bool = False


class Certifier(Plugin):
    """A statistical test, without torch: the engine draws the samples it asks for, and counts the classes they were given."""

    kind: ClassVar[str] = "certifiers"
    grid: ClassVar[bool] = False
    """Whether it decides given radii (`Question.thresholds`), and not as large a radius as can be had."""

    n0: int = Field(100, ge=1, description="selection samples an image")
    n: int = Field(100_000, ge=1, description="samples an image, at most")
    alpha: float = Field(0.001, gt=0, lt=1, description="probability that a certificate is wrong, at most")

    def selection(self, question: Question) -> int:
        """How many samples are drawn first, to choose the class; 0 if none are needed.

        The engine raises `rscli.errors.PluginError` if it is negative.
        """
        return self.n0

    def plan(self, counts: NDArray[np.int64], question: Question) -> Plan:
        """The class under test and the looks, from the `counts` (classes,) of the selection samples.

        The looks count fresh samples: the selection samples are never counted again. Without selection samples the counts are
        zeros. Raises `rscli.errors.InputError` for a question that it cannot answer; the engine raises
        `rscli.errors.PluginError` if the looks do not increase from 1, or no sample is wanted at all.
        """
        raise NotImplementedError

    def decide(self, counts: NDArray[np.int64], n: int, plan: Plan) -> Decision | None:
        """Called at each look with the `counts` (classes,) of the first `n` fresh samples; None: go on to the next look.

        Must decide at the last look, or, if the plan has no looks, when called with zeros and n = 0: the engine raises
        `rscli.errors.PluginError` for a None there. May assume that `n` is a look of the plan and that the counts add up to it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Provenance:
    """Where a plugin came from: its kind and name, the package that ships it, and that package's version."""

    kind: str
    name: str
    package: str
    version: str


def fields_of(plugin: Plugin) -> Mapping[str, Any]:
    """The hyper-parameters of a plugin as plain JSON values, in their declared order."""
    return plugin.model_dump(mode="json")


__all__ = [
    "ABSTAIN",
    "API_VERSION",
    "COMMON_SUFFIXES",
    "KINDS",
    "Architecture",
    "Attack",
    "Augmentation",
    "Certifier",
    "DataSpec",
    "Dataset",
    "Decision",
    "FileImages",
    "Finding",
    "ImageListing",
    "Loss",
    "MemoryImages",
    "Noise",
    "NoisyLoss",
    "Plan",
    "Plugin",
    "Provenance",
    "Question",
    "TrainStep",
    "Transform",
    "class_folders",
    "fields_of",
    "has_images",
    "list_images",
    "loose_images",
    "skipped_text",
    "unit",
]
