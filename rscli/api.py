"""The plugin contract: everything that a plugin package needs to import from rscli, besides `rscli.errors` and `rscli.stats`.

A plugin is a pydantic model: its fields are its hyper-parameters (type, bounds, unit, one-line description) and one method
does the work. Presets validate against the fields, `rscli plugins info KIND NAME` prints them, and the model file records them.
A plugin is found through an entry point in the group `rscli.<kind>`; the first line of its docstring is its description.

A data set that reads folders takes `class_folders` and `list_images` from here, so that an image is the same thing everywhere.

This module imports no torch, so that listings stay fast; plugins that keep torch out of their module level do the same
favour to their users.

Conventions: images are float tensors `(batch, channel, height, width)` with pixels in [0, 1] **before any normalisation**;
sigma, epsilon and radii are L2 lengths in the same units; `m` counts the noisy copies per image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from rscli.image_files import (
    COMMON_SUFFIXES,
    ImageListing,
    class_folder,
    class_folders,
    has_images,
    is_image_name,
    list_images,
    loose_images,
    skipped_text,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

API_VERSION = 2
"""The version of this contract; it changes only when a plugin written for the older one would break.

A plugin may state the version it was written for (`Plugin.api_version`); the host checks it when it loads the plugin.
"""

ABSTAIN = -1
"""The class that a certificate names when it abstains."""

MOST_PARTS = 1000
"""Architectures inside another one, at every depth together, at most."""

MOST_CLASSES = 1_000_000
LARGEST_SIDE = 65_536
LARGEST_IMAGE = 2**28
"""What a description of data may ask for, at most: classes, pixels of a side, and values of an image over all channels."""

Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
Channels = Annotated[int, Field(ge=1, le=1024)]

KINDS = (
    "noises", "losses", "attacks", "architectures", "datasets", "certifiers", "optimizers", "schedules", "loggers", "callbacks",
    "presets",
)  # fmt: skip
"""Every kind of plugin; the entry-point group of a kind is `rscli.<kind>`."""


def unit(text: str) -> dict[str, Any]:
    """The unit of a hyper-parameter: `Field(0.5, gt=0, json_schema_extra=unit("[0, 1] pixels"))`."""
    return {"unit": text}


class Plugin(BaseModel):
    """The base class of every plugin: frozen hyper-parameters, unknown ones refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    kind: ClassVar[str]
    api_version: ClassVar[int] = 2
    """The contract that the plugin was written for. One that says nothing is taken for one of version 2, the first that was
    published; a plugin for a later one says so."""
    variant: ClassVar[str | None] = None
    """The field that takes the part behind a slash in a name: `timm/resnet18` sets the field `model` of the plugin `timm`."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Fields that had other names once, as {old: new}: configurations with the old ones are still read, with a note."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation in (int, float):
            raise ValueError("must be a number")
        return value

    @classmethod
    def offers(cls, name: str) -> bool:  # noqa: ARG003
        """Whether the field `variant` takes `name`; asked when no plugin has that name, to suggest this one. May be slow."""
        return False


# --- noises ------------------------------------------------------------------------------------------------------------------


class Noise(Plugin):
    """A smoothing distribution and its geometry: how noise is drawn and put on images, and what radius follows from votes."""

    kind: ClassVar[str] = "noises"
    norm: ClassVar[str]
    """The norm of the certified radius, e.g. `L2`: shown wherever a radius is."""

    sigma: float = Field(gt=0, le=1000, description="standard deviation of the noise", json_schema_extra=unit("[0, 1] pixels"))

    def sample(self, shape: Sequence[int], *, generator: torch.Generator, device: torch.device) -> Tensor:
        """Draws float32 noise of `shape` (any shape, the pixel dimensions last) on `device` with `generator`.

        Certification calls this from several threads at once, each with a generator of its own.
        """
        raise NotImplementedError

    def apply(self, images: Tensor, noise: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The noisy images: `images` (..., channel, height, width) under `noise`, which broadcast; written to `out` if given.

        Everybody who makes noisy images, the host, losses and attacks, calls this: a distribution that is not additive
        overrides it, and what `sample` returns is then whatever `apply` understands, of the same shape.
        """
        import torch

        return torch.add(images, noise, out=out)

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


@dataclass(frozen=True)
class Position:
    """How far training is. `epoch` counts from 0; `share` is the part of all optimiser steps that is done, in [0, 1).

    `lr_factor` is what the schedule multiplies the learning rate by now: 1 before its first milestone.
    """

    epoch: int = 0
    share: float = 0.0
    lr_factor: float = 1.0


class Draws(ABC):
    """Random numbers for the images of a step. An image is given the same ones however the images of an optimiser step are
    shared between processes or micro-batches. Every call draws anew.
    """

    @abstractmethod
    def noise(self, m: int) -> Tensor:
        """Noise (m, batch, channel, height, width) of the run's smoothing distribution."""

    @abstractmethod
    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), float32: (batch, ...), of `shape` for each image."""


@dataclass(eq=False)
class TrainStep:
    """What a loss or an attack may look at in one optimiser step.

    With several processes, or micro-batches, these are a part of the step's images: the terms must be means over the images,
    of which the host takes the mean over all of them.

    `images` (batch, channel, height, width) in [0, 1], as the attack left them, and `clean`, as the data set gave them;
    `labels` (batch,) int64, and `indices` (batch,) int64: each image's place in the training split (on the CPU).
    `noise` (m, batch, channel, height, width): drawn by `smoothing`, whose `apply` puts it on images.
    `extra` holds tensors by name that an attack adds for the loss. `state` holds what `Loss.setup` prepared; the loss may
    change its tensors in place, in the same way in every process: by what `gathered` gives. `networks` holds those of
    `Loss.networks`.

    Everything random must come from `draw` and `rand`, which give every image numbers of its own, or from `generator` (on the
    device of the images), whose numbers are the same in every process: so a resumed run repeats it.
    """

    model: nn.Module
    images: Tensor
    clean: Tensor
    labels: Tensor
    indices: Tensor
    noise: Tensor
    smoothing: Noise
    generator: torch.Generator
    position: Position = Position()
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    networks: Mapping[str, nn.Module] = field(default_factory=dict)
    draws: Draws | None = None
    """Where `draw` and `rand` get their numbers; None: from `generator`."""
    gather: Callable[[Tensor], Tensor] | None = None
    """How `gathered` hears of the other processes; None: there are none."""

    @property
    def sigma(self) -> float:
        """The standard deviation of the noise, in [0, 1] pixels."""
        return self.smoothing.sigma

    def logits(self, images: Tensor) -> Tensor:
        """The logits (..., classes) of `images` (..., channel, height, width); any number of leading dimensions."""
        leading = images.shape[:-3]
        out: Tensor = self.model(images.reshape(-1, *images.shape[-3:]))
        return out.reshape(*leading, out.shape[-1])

    def noisy(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """`images` (batch, channel, height, width) under each copy of `noise` (None: the step's): (m, batch, channel, ...)."""
        return self.smoothing.apply(images, self.noise if noise is None else noise)

    def draw(self, m: int) -> Tensor:
        """Fresh noise (m, batch, channel, height, width)."""
        if self.draws is not None:
            return self.draws.noise(m)
        return self.smoothing.sample((m, *self.images.shape), generator=self.generator, device=self.images.device)

    def rand(self, *shape: int) -> Tensor:
        """Fresh uniform numbers in [0, 1), float32, on the device of the images: (batch, ...), of `shape` for each image."""
        if self.draws is not None:
            return self.draws.uniform(*shape)
        import torch

        return torch.rand(len(self.labels), *shape, generator=self.generator, device=self.images.device)

    def gathered(self, rows: Tensor) -> Tensor:
        """`rows` (batch, ...), what was found for each image, with those of the images that other processes have in this step:
        (images, ...), detached, the same in every process. Numbers only; every process must ask for it.
        """
        return rows.detach() if self.gather is None else self.gather(rows.detach())

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """While the body runs, the model is in eval mode and its parameters need no gradient; both are restored exactly."""
        modes = [(module, module.training) for module in self.model.modules()]
        needs = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self._forget()
        self.model.eval()
        self.model.requires_grad_(False)
        try:
            yield
        finally:
            self._forget()
            for module, training in modes:
                module.training = training
            for parameter, need in needs:
                parameter.requires_grad_(need)

    def _forget(self) -> None:
        """Logits of the frozen model are not those of the model in training."""
        for name in ("noisy_logits", "clean_logits"):
            self.__dict__.pop(name, None)

    def moved(self, *, images: Tensor | None = None, noise: Tensor | None = None, **extra: Tensor) -> TrainStep:
        """A step like this one with other `images` (batch, channel, height, width) or other `noise` (m, batch, channel, height,
        width), and `extra` tensors of any shape for the loss: what an attack returns.
        """
        return replace(
            self,
            images=self.images if images is None else images,
            noise=self.noise if noise is None else noise,
            extra={**self.extra, **extra},
        )

    @cached_property
    def noisy_logits(self) -> Tensor:
        """The logits (m, batch, classes) of the images under each copy of the noise; one forward, computed once."""
        return self.logits(self.noisy(self.images))

    @cached_property
    def clean_logits(self) -> Tensor:
        """The logits (batch, classes) of the images without noise; one forward of its own, computed once."""
        return self.logits(self.images)


class TrainContext(ABC):
    """What `Loss.setup` may look at, once, before the first step of a run.

    `images` training images of `classes` classes, whose fingerprint is `data_sha256`; random numbers come from `generator`, on
    `device`.
    """

    images: int
    classes: int
    noise: Noise
    device: torch.device
    generator: torch.Generator
    data_sha256: str

    @abstractmethod
    def batches(self, batch: int = 256) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Every training image once, in order and not augmented, on `device`: indices (b,), images (b, channel, height, width)
        in [0, 1], labels (b,).
        """

    @abstractmethod
    def load_model(self, path: Path) -> tuple[nn.Module, Noise]:
        """The network (pixels in [0, 1] to logits, frozen, in eval mode, on `device`) and the noise of a model file: a teacher.

        Raises `rscli.errors.InputError` if there is none, or if it has other classes or another input shape.
        """

    @abstractmethod
    def note(self, text: str) -> None:
        """A line for the user."""


class Passes(NamedTuple):
    """How often the network is run for one image in one optimiser step, each noisy copy counted: for what a run will cost.

    `trained`: forward, and backward to the weights (about three forwards' worth). `attacked`: forward, and backward to the
    images or the noise alone (two). `forward`: forward only.
    """

    trained: float = 0
    attacked: float = 0
    forward: float = 0


class Loss(Plugin):
    """The objective of one optimiser step. Override `step`; or, if the noisy logits are enough, derive from `NoisyLoss`."""

    kind: ClassVar[str] = "losses"
    chunked: ClassVar[bool] = True
    """Whether a batch is split into m chunks, each with m copies and its own optimiser step (so that a forward keeps the
    rows of a batch), as the published code of most methods does. `chunk = false` in a configuration overrides it."""

    m: int = Field(1, ge=1, le=4096, description="noisy copies per image")

    def setup(self, context: TrainContext) -> Mapping[str, Tensor]:
        """What the loss needs to keep, tensors of any shape by name, prepared once before the first step: soft labels by index
        (images, classes), say, or a teacher's weights.

        The host hands it to every step as `TrainStep.state`, saves it beside the checkpoint (a resumed run does not set up
        again), and records its digest in the model file. It is saved again when a tensor was changed by torch's operations in
        place; changes through `.data` or numpy go unnoticed. May raise `rscli.errors.InputError` for what the user can fix.
        """
        return {}

    def networks(self, context: TrainContext) -> Mapping[str, nn.Module]:
        """Networks besides the one in training, by name: a teacher, say (`context.load_model`). Asked at every start of a run.

        They are not saved: what changes during training belongs into the state of `setup`.
        """
        return {}

    @property
    def passes(self) -> Passes:
        """What a step costs for an image, besides the attack: the m copies, once. A loss that runs the network otherwise says
        so."""
        return Passes(trained=self.m)

    def step(self, step: TrainStep) -> dict[str, Tensor]:
        """The named terms of the objective, scalars with gradients; the host minimises their sum and logs each.

        Names that the log has for itself (loss, accuracy, lr, epoch, ...) are not for terms, but for a single `loss`.

        May raise `rscli.errors.InputError` for what the user can fix. The host raises `rscli.errors.PluginError` if there is
        no term or one is no scalar, and `rscli.errors.RscliError` if one is not finite.
        """
        raise NotImplementedError


class NoisyLoss(Loss):
    """A loss of the noisy logits alone."""

    def terms(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The named terms from `logits` (m, batch, classes) and `labels` (batch,) int64: scalars, summed by the host.

        Raises as `Loss.step` does.
        """
        raise NotImplementedError

    def step(self, step: TrainStep) -> dict[str, Tensor]:
        """The terms of the step's noisy logits (m, batch, classes), as scalars by name; raises what `terms` raises."""
        return self.terms(step.noisy_logits, step.labels)


class Attack(Plugin):
    """Moves what a loss trains on: the images, the noise, or both."""

    kind: ClassVar[str] = "attacks"
    min_m: ClassVar[int] = 1
    """The fewest noisy copies per image that it can work with: with fewer, training does not begin."""

    def passes(self, m: int) -> Passes | None:
        """What an attack on `m` noisy copies of an image costs in a step; None: not said."""
        return None

    def perturb(self, step: TrainStep) -> TrainStep:
        """The step that the loss is to train on: `step.moved(images=..., noise=..., NAME=...)`.

        Images must stay in [0, 1] and every tensor keep its shape. The host calls this with the model frozen
        (`TrainStep.frozen`), restores it afterwards, and detaches what comes back. `step.noise` is the noise that the loss will
        train on.
        """
        raise NotImplementedError


# --- training: optimisers, schedules, loggers, callbacks ---------------------------------------------------------------------


class Optimizer(Plugin):
    """How parameters follow gradients."""

    kind: ClassVar[str] = "optimizers"

    lr: float = Field(gt=0, le=1e6, description="learning rate before the schedule changes it", json_schema_extra=unit("1"))

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """A torch optimiser of the parameters of `model`; the host sets the learning rate of every group to lr * factor.

        A group may carry `lr_scale`, a factor of its own (layer decay). Raises `rscli.errors.InputError` for settings that
        contradict each other.
        """
        raise NotImplementedError


class Schedule(Plugin):
    """The learning rate over the course of training."""

    kind: ClassVar[str] = "schedules"

    def factor(self, epoch: float, epochs: int) -> float:
        """What the learning rate is multiplied by after `epoch` epochs (with a fraction inside an epoch) of `epochs` in all."""
        raise NotImplementedError

    def remark(self, epochs: int) -> str | None:
        """What the user should know of this schedule in a run of `epochs` before it begins, such as milestones that it never
        reaches; None: nothing.
        """
        return None


class Run(ABC):
    """A training run, as loggers and callbacks see it.

    `folder` is its run folder; `model` takes pixels in [0, 1]; `epoch` counts finished epochs of `epochs`, `batch` finished
    batches of the current one, of `batches`. `config` is the resolved configuration as plain values, `spec` what is known of
    the data. `noise` is the one that the model file will name, also while training ramps it.

    `figures` are those of the last finished epoch, in this order: `epoch` (from 1), `lr`, what is ramped, `loss`, its terms
    (the first is what is learned, others regularise it), `accuracy` under the noise of training if the loss looks at noisy
    logits, and what callbacks have logged so far.
    """

    folder: Path
    model: nn.Module
    noise: Noise
    epoch: int
    epochs: int
    batch: int
    batches: int
    config: Mapping[str, Any]
    spec: DataSpec
    figures: Mapping[str, Any]

    @abstractmethod
    def images(self, split: str, indices: Sequence[int]) -> tuple[Tensor, NDArray[np.int64]]:
        """Images (n, channel, height, width) of a split under the test transform, on the CPU, and their labels (n,).

        `holdout` has the training images that the run has set aside, in random order; `train` those that it trains on.
        """

    @abstractmethod
    def labels(self, split: str) -> NDArray[np.int64]:
        """The labels (n,) of a whole split; no image is read."""

    @abstractmethod
    def certify(self, images: Tensor, **options: Any) -> Sequence[Certificate]:
        """Certificates of `images`, as the Python API gives them (n, alpha, certifier, radii, labels, seed, ...), for a probe.

        `radii` are left out for a certifier that gives as large a radius as it can. The model and the random numbers of the run
        stay as they are.
        """

    @abstractmethod
    def log(self, values: Mapping[str, Any]) -> None:
        """Adds plain `values` to the line of this epoch, which every logger gets at its end."""

    @abstractmethod
    def save(self) -> None:
        """Replaces the checkpoint by the present state."""

    @abstractmethod
    def save_model(self, name: str) -> Path:
        """Writes the present weights as `model-NAME.safetensors` beside the model file, and as complete; its path."""

    @abstractmethod
    def stop(self, reason: str) -> None:
        """Makes this epoch the last: training is finished after it, with a model file. The log and the user are told why.

        A resumed run stays finished. In `begin`, no epoch is trained any more.
        """

    @abstractmethod
    def note(self, text: str) -> None:
        """A line for the user."""


class Logger(Plugin):
    """Keeps the figures of a run: a file, a dashboard, ..."""

    kind: ClassVar[str] = "loggers"

    def open(self, run: Run) -> LogWriter:
        """Begins the log of `run`, or goes on with it: figures of epochs after `run.epoch`, of a killed run, are dropped."""
        raise NotImplementedError


class LogWriter(ABC):
    """An open log."""

    @abstractmethod
    def write(self, line: Mapping[str, Any]) -> None:
        """The figures of an epoch, plain values by name: `epoch` (from 1), `lr`, the loss and its terms, speeds, ..."""

    def write_step(self, line: Mapping[str, Any]) -> None:  # noqa: B027
        """The figures of one optimiser step: `epoch` (from 1), `batch`, `chunk`, `lr`, the loss and its terms.

        They come some steps later, several at a time: whenever the host reads them from the device. Nothing is done with them
        unless this is overridden.
        """

    def close(self) -> None:  # noqa: B027
        """The run ends, finished or not."""


class Callback(Plugin):
    """Something that happens during training, between optimiser steps.

    It must leave the model as it was, but in `end`, which may replace the weights that are written: by their average, say.
    """

    kind: ClassVar[str] = "callbacks"
    looks_on: ClassVar[bool] = False
    """Whether it leaves the weights alone altogether: only then may it differ in a run that is resumed."""
    needs_holdout: ClassVar[bool] = False
    """Whether it looks at images that the run has set aside: only a configuration with `holdout` above 0 may have it."""

    def begin(self, run: Run, state: dict[str, Any]) -> None:
        """Before the first step, also of a resumed run. `state` is the callback's own: tensors and plain values by name, empty
        at first, saved in every checkpoint.
        """

    def after_step(self, run: Run, state: dict[str, Any]) -> None:
        """After every optimiser step."""

    def after_epoch(self, run: Run, state: dict[str, Any]) -> None:
        """After every epoch, before its line is logged."""

    def after_figures(self, run: Run, state: dict[str, Any]) -> None:
        """After every epoch, when all callbacks have had their `after_epoch`: `run.figures` has what they logged."""

    def end(self, run: Run, state: dict[str, Any]) -> None:
        """After the last epoch, before the model file is written."""


# --- architectures -----------------------------------------------------------------------------------------------------------


class Architecture(Plugin):
    """Builds a network."""

    kind: ClassVar[str] = "architectures"
    normalizes: ClassVar[bool] = False
    """Whether the network takes pixels in [0, 1] as they are. If not, the host puts the normalisation of the data in front, as
    a layer."""
    gives: ClassVar[Literal["logits", "images"]] = "logits"
    """What the network gives: logits (batch, classes), or images of the shape of its input in [0, 1] pixels, as a denoiser
    does. One that gives images takes pixels as they are, and is used as a part of another architecture."""
    field_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """What other code calls networks of this kind, with the fields that make them: `{"cifar_resnet110": {"depth": 110}}`."""

    @classmethod
    def rename(cls, name: str) -> str:
        """The network's name of a tensor that other code calls `name`, whatever is in front of it; an unknown `name` stays."""
        return name

    def normalization(self, spec: DataSpec) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and std, per channel of `spec.shape`, that the pretrained weights of `build` want; None: those of the data."""
        return None

    def build(self, spec: DataSpec, *, weights: bool = True) -> nn.Module:
        """A freshly initialised network from images of `spec.shape` to `len(spec.class_names)` logits.

        `weights` is False when all weights are replaced right afterwards (a model file, an import): nothing pretrained is then
        to be fetched or read. Initial weights come from torch's global generator. Certification on a CPU calls the network, in
        eval mode, from several threads at once. Raises `rscli.errors.InputError` when it cannot take that shape.
        """
        raise NotImplementedError


class Normalization(BaseModel):
    """The constants of a normalisation (x - mean) / std per channel, in [0, 1] pixels."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    mean: tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...]
    std: tuple[Annotated[float, Field(ge=1e-6, le=1e6)], ...]


class Part(BaseModel):
    """An architecture as a hyper-parameter of another: a section, with the `name` of an architecture plugin and its fields.

    A configuration says it as a table, `{name = "cifar-resnet", depth = 20}`, or by the name alone, `"lenet"`. The host looks
    the plugin up in the registry, checks the fields, fills in the others, and records where the plugin came from.
    `normalization` is given where this network has other constants than those of the data; the key is the host's own.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(min_length=1, max_length=500)
    normalization: Normalization | None = None

    @model_validator(mode="before")
    @classmethod
    def _in_full(cls, given: Any, info: ValidationInfo) -> Any:
        """The section with all fields of its plugin, as the host reads it; as it stands where no host is. A text is a name."""
        read = (info.context or {}).get(READ_PART)
        return given if read is None or isinstance(given, cls) else read({"name": given} if isinstance(given, str) else given)

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key != "normalization" or value is not None}

    @property
    def section(self) -> dict[str, Any]:
        """The section, as a configuration says it: `name` and the fields."""
        return {"name": self.name, **(self.model_extra or {})}


READ_PART = "read_part"
"""Where the host puts, in pydantic's validation context, what turns the section of a `Part` into a full one."""


class Parts(ABC):
    """Builds the parts of a composite architecture. `weights` as in `Architecture.build`."""

    weights: bool

    @abstractmethod
    def build(self, part: Part, spec: DataSpec, *, gives: Literal["logits", "images"] = "logits") -> nn.Module:
        """The network of `part` for the data of `spec`. It takes pixels in [0, 1]: its normalisation is inside.

        That is the one of `spec`, or of `part.normalization`, or what the network does by itself (`Architecture.normalizes`).
        It gives logits (batch, classes), or images of `spec.shape`, and was tried. Raises `rscli.errors.InputError` if the
        architecture gives something else than is asked for, or does not take that shape.
        """


class Composite(Architecture):
    """An architecture made of others, which its fields of the type `Part` (or tuples of it) hold: override `compose`."""

    normalizes: ClassVar[bool] = True

    def compose(self, spec: DataSpec, parts: Parts) -> nn.Module:
        """The network from images of `spec.shape`, in [0, 1] pixels, to logits: of the networks that `parts.build` gives.

        Everything else is as for `Architecture.build`, which is not called.
        """
        raise NotImplementedError


def parts_of(plugin: Plugin) -> Iterator[Part]:
    """The architectures that a plugin holds as hyper-parameters, in the order of its fields, without those inside of them."""
    for name in type(plugin).model_fields:
        yield from _parts(getattr(plugin, name))


def _parts(value: Any) -> Iterator[Part]:
    if isinstance(value, Part):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, Mapping):
        yield from _parts(list(value.values()))


# --- data sets ---------------------------------------------------------------------------------------------------------------


class Transform(BaseModel):
    """How an image of any size becomes the input of a model: data, so that a model file can carry it.

    Converted to `channels` (1 grey, 3 RGB), resized so that the shorter side is `resize` (bilinear, antialiased; none: left as
    it is), and cropped in the centre to `crop` (height, width).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: Literal[1, 3]
    resize: int | None = Field(None, ge=1, le=LARGEST_SIDE)
    crop: tuple[Side, Side]

    @model_validator(mode="after")
    def _within_bounds(self) -> Self:
        if self.resize is not None:
            _check_values("resize", self.channels, self.resize, self.resize)
        return self


class Augmentation(BaseModel):
    """What happens to a training image, in this order: data, applied by the host, and never in certification or prediction.

    `resized_crop`: a random part of the original file (8 to 100 % of its area, aspect 3/4 to 4/3), resized to the input.
    `padding`: zero padding on each side, then a random crop of the input's size. `flip`: horizontal, with probability 1/2.
    `rand_augment`: so many operations of RandAugment, each of magnitude `rand_magnitude` of 30 (Cubuk et al. 2020); for images
    of 1 or 3 channels. `erase`: the probability that a random rectangle is filled with one random colour (Zhong et al. 2020).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    padding: int = Field(0, ge=0, le=LARGEST_SIDE)
    flip: bool = False
    resized_crop: bool = False
    rand_augment: int = Field(0, ge=0, le=16)
    rand_magnitude: int = Field(9, ge=0, le=30)
    erase: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)


class DataSpec(BaseModel):
    """What a model must know of its data: class names, input shape, normalisation and transforms.

    A model file may hold any of it, so everything is bounded before anything is allocated: `LARGEST_IMAGE` values per image,
    with its padding; `MOST_CLASSES` classes; mean and std for each channel, both or neither, std in [1e-6, 1e6].
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    class_names: tuple[Annotated[str, Field(max_length=10_000)], ...] = Field(min_length=1, max_length=MOST_CLASSES)
    shape: tuple[Channels, Side, Side]
    """(channel, height, width)"""
    mean: tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...] | None = None
    """Per-channel mean of the normalisation layer; None: the model has no such layer."""
    std: tuple[Annotated[float, Field(ge=1e-6, le=1e6)], ...] | None = None
    test_transform: Transform
    augmentation: Augmentation = Augmentation()
    sizes: dict[str, Annotated[int, Field(ge=0, lt=2**63)]] = Field(default_factory=dict, max_length=1000)
    """Images in each split, as far as known without reading them."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        channels, height, width = self.shape
        padding = 2 * self.augmentation.padding
        _check_values("an image with its padding", channels, height + padding, width + padding)
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: both or neither")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != channels:
                raise ValueError(f"{name} has {len(values)} values, and there are {channels} channels")
        if self.augmentation.rand_augment and channels not in (1, 3):
            raise ValueError(f"RandAugment is for images of 1 or 3 channels, and there are {channels}")
        if (self.test_transform.channels, *self.test_transform.crop) != self.shape:
            raise ValueError(f"the test transform gives images of another shape than {self.shape}")
        return self


def _check_values(what: str, channels: int, height: int, width: int) -> None:
    if (count := channels * height * width) > LARGEST_IMAGE:
        raise ValueError(
            f"{what} ({channels} x {height} x {width}) has {count:,} values, and at most {LARGEST_IMAGE:,} are taken"
        )


@dataclass(frozen=True)
class MemoryImages:
    """A split held in memory: `images` uint8 (n, channel, height, width), `labels` int64 (n,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class FileImages:
    """A split read from disk image by image: `paths` in a fixed order, `labels` int64 (n,).

    `cache`: the split is small; the host reads it once, through the test transform, and holds it in memory. `note`: a line
    for the user when the split is opened, such as the `skipped_text` of what was found.
    """

    paths: Sequence[Path]
    labels: NDArray[np.int64]
    cache: bool = False
    note: str = ""


@dataclass(frozen=True)
class EncodedImages:
    """A split of image files that lie inside other files (a shard, a table), read image by image, in a fixed order.

    `encoded[i]` is the content of image file i, `names[i]` what a message calls it, `labels` int64 (n,); `cache` and `note` as
    in `FileImages`. Several processes read at once: `encoded` can be pickled, and keeps no open file with a position in it. For
    a file that cannot be read it raises an `OSError` or an `rscli.errors.InputError`.
    """

    encoded: Sequence[bytes]
    names: Sequence[str]
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
    """Images in [0, 1] with labels; normalisation and transforms are described as data and applied by the host.

    The held-out split is always called `test`.
    """

    kind: ClassVar[str] = "datasets"

    def spec(self, root: Path) -> DataSpec:
        """What a model must know. Must not need the images where the data set is a fixed one (so that a dry run works)."""
        raise NotImplementedError

    def load(self, split: str, root: Path, *, download: bool = False) -> MemoryImages | FileImages | EncodedImages:
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
    as possible). `label`: test this class instead of the one that the selection samples choose.
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
    hold, and more might be proved. `threshold`: of a certifier of given radii, which of `Question.thresholds` was reached, from
    0; the certified radius is exactly that one.
    """

    predict: int
    p_a: float
    p_b: float
    reason: str
    saturated: bool = False
    threshold: int | None = None


@dataclass(frozen=True)
class Certificate:
    """What was certified of one image.

    With probability at least 1 - alpha over the sampling, the smoothed classifier answers `predict` (ABSTAIN: it says nothing)
    on every image within `radius` of this one, in the norm of the noise. `n0` selection samples chose the class; of `n` fresh
    ones, `counts` (classes,) int64 were given each class. `p_a`, `p_b`, `reason` and `saturated` as in a `Decision`.
    """

    index: int
    predict: int
    radius: float
    p_a: float
    p_b: float
    n0: int
    n: int
    counts: NDArray[np.int64]
    candidate: int
    reason: str
    saturated: bool = False


class Certifier(Plugin):
    """A statistical test, without torch: the host draws the samples it asks for, and counts the classes they were given."""

    kind: ClassVar[str] = "certifiers"
    grid: ClassVar[bool] = False
    """Whether it decides given radii (`Question.thresholds`), and not as large a radius as possible."""
    decisive: ClassVar[tuple[str, ...]] = ()
    """Fields that, like n and alpha, decide how large a radius may be: results that differ in one are not compared."""

    n0: int = Field(100, ge=1, description="selection samples per image")
    n: int = Field(100_000, ge=1, description="Monte Carlo samples per image, at most")
    alpha: float = Field(0.001, gt=0, lt=1, description="failure probability of a certificate, at most")

    def largest_p_a(self, n: int) -> float:
        """The largest lower bound `p_a` that `n` unanimous samples can give: alpha ** (1/n), that of Clopper & Pearson 1934."""
        return float(self.alpha ** (1 / n))

    def selection(self, question: Question) -> int:
        """How many samples are drawn first, to choose the class; 0 if none are needed.

        The host raises `rscli.errors.PluginError` if it is negative.
        """
        return self.n0

    def plan(self, counts: NDArray[np.int64], question: Question) -> Plan:
        """The class under test and the looks, from the `counts` (classes,) of the selection samples.

        The looks count fresh samples: the selection samples are never counted again. Without selection samples the counts are
        zeros. Raises `rscli.errors.InputError` for a question that it cannot answer; the host raises
        `rscli.errors.PluginError` if the looks do not increase from 1, or no sample is wanted at all.
        """
        raise NotImplementedError

    def decide(self, counts: NDArray[np.int64], n: int, plan: Plan) -> Decision | None:
        """Called at each look with the `counts` (classes,) of the first `n` fresh samples; None: go on to the next look.

        Must decide at the last look, or, if the plan has no looks, when called with zeros and n = 0: the host raises
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
    "Callback",
    "Certificate",
    "Certifier",
    "Composite",
    "DataSpec",
    "Dataset",
    "Decision",
    "Draws",
    "EncodedImages",
    "FileImages",
    "Finding",
    "ImageListing",
    "LogWriter",
    "Logger",
    "Loss",
    "MemoryImages",
    "Noise",
    "NoisyLoss",
    "Normalization",
    "Optimizer",
    "Part",
    "Parts",
    "Passes",
    "Plan",
    "Plugin",
    "Position",
    "Provenance",
    "Question",
    "Run",
    "Schedule",
    "TrainContext",
    "TrainStep",
    "Transform",
    "class_folder",
    "class_folders",
    "fields_of",
    "has_images",
    "is_image_name",
    "list_images",
    "loose_images",
    "parts_of",
    "skipped_text",
    "unit",
]
