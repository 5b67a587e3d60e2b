"""The classifier that is trained and certified: a normalisation layer in front of an architecture's network."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from rscli.api import Architecture, Composite, DataSpec, Part, Parts
from rscli.config.settings import shortened
from rscli.errors import InputError
from rscli.registry import installed
from rscli.runtime.guard import broken, calling, described

LARGE = 2**23
"""Values of an image above which a new network is tried without memory."""


class Normalize(nn.Module):
    """(x - mean) / std per channel, for images (batch, channel, height, width) in [0, 1].

    It is a layer so that noise, sigma and radii stay in pixel units. Its constants are not part of the state dict: they
    are facts of the data set, which the model file states in words.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """`images` (batch, channel, height, width) normalised by channel, of the same shape."""
        return (images - self.mean) / self.std


@dataclass(frozen=True)
class Start:
    """Where initial weights came from: a file and its digest (SHA-256), if any, and what there is to say of it."""

    path: Path | None = None
    sha256: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def origin(self) -> str | None:
        """The file and its digest in a line, for the model file."""
        return None if self.path is None else f"trained from the weights in {self.path.name} (sha256 {self.sha256})"


class Classifier(nn.Module):
    """Images (batch, channel, height, width) in [0, 1] to logits (batch, classes).

    The normalisation of `spec` comes in front, unless the network `normalizes` by itself. `start` says where its weights came
    from. The modules named in `kept` stay in eval mode whatever `train` says: normalisation layers that are frozen.
    """

    def __init__(self, network: nn.Module, spec: DataSpec, *, normalizes: bool = False) -> None:
        super().__init__()
        self.normalizes = normalizes
        self.normalize: nn.Module = nn.Identity()
        self.network = network
        self.kept: tuple[str, ...] = ()
        self.start = Start()
        self.fit_to(spec)

    def fit_to(self, spec: DataSpec) -> None:
        """Puts the normalisation of `spec` in front."""
        known = spec.mean is not None and spec.std is not None and not self.normalizes
        self.normalize = Normalize(spec.mean or (), spec.std or ()) if known else nn.Identity()
        self.spec = spec

    def train(self, mode: bool = True) -> Self:
        """As in torch, but for the modules that are `kept` in eval mode."""
        super().train(mode)
        for name in self.kept:
            self.get_submodule(name).training = False
        return self

    def forward(self, images: Tensor) -> Tensor:
        """The logits (batch, classes)."""
        logits: Tensor = self.network(self.normalize(images))
        return logits


class HostParts(Parts):
    """Builds the parts of one composite architecture from the registry: each is tried, with its normalisation in front."""

    def __init__(self, weights: bool) -> None:
        self.weights = weights
        self.built: list[tuple[Part, nn.Module]] = []
        """Every part that was asked for, and its network without the normalisation in front."""

    def build(self, part: Part, spec: DataSpec, *, gives: Literal["logits", "images"] = "logits") -> nn.Module:
        """The network of `part`: see `rscli.api.Parts`."""
        architecture = cast(Architecture, installed().build("architectures", part.section))
        if architecture.gives != gives:
            hint = f"Name an architecture that gives {gives} (`rscli plugins` lists them)."
            raise InputError(f"{part.name!r} gives {architecture.gives}, and a part that gives {gives} is wanted", hint)
        classifier = _built(architecture, _normalized(spec, part, architecture), HostParts(self.weights))
        self.built.append((part, classifier.network))
        return classifier if gives == "logits" else classifier.network


def build_classifier(
    architecture: Architecture, spec: DataSpec, *, weights: bool = True, parts: HostParts | None = None
) -> Classifier:
    """A freshly initialised classifier for the data of `spec`; without `weights`, nothing pretrained is fetched.

    Raises `PluginError` if the network, or a part of it (they are built by `parts`), does not turn a batch of the announced
    shape into finite logits (batch, classes), and `InputError` for an architecture that gives no logits.
    """
    if architecture.gives != "logits":
        hint = "It can be a part of a classifier: of an architecture that puts it in front of another one."
        raise InputError(f"{described(architecture)} gives {architecture.gives}, and is no classifier by itself", hint)
    return _built(architecture, spec, parts or HostParts(weights))


def _built(architecture: Architecture, spec: DataSpec, parts: HostParts) -> Classifier:
    """The network of an architecture, tried, behind its normalisation; one that gives images has none."""
    method = "compose" if isinstance(architecture, Composite) else "build"
    with calling(architecture, method):
        if isinstance(architecture, Composite):
            network = architecture.compose(spec, parts)
        else:
            network = architecture.build(spec, weights=parts.weights)
    if not isinstance(network, nn.Module):
        raise broken(architecture, method, f"returned {network!r:.80}, which is not a torch module")
    images = architecture.gives == "images"
    classifier = Classifier(network, spec, normalizes=architecture.normalizes or images)
    classifier.eval()
    with calling(architecture, f"{method}: the forward of its network"):
        shape = _trial(classifier, spec.shape)
    classifier.train()
    wanted = (2, *spec.shape) if images else (2, len(spec.class_names))
    if shape != wanted:
        raise broken(architecture, method, f"made a network that gives {architecture.gives} of shape {shape}, not {wanted}")
    return classifier


def _normalized(spec: DataSpec, part: Part, architecture: Architecture) -> DataSpec:
    """`spec` with the part's own constants, if it has any; those of a composite one are for what is inside.

    Raises `InputError` if they do not belong to it.
    """
    constants = part.normalization
    if constants is None:
        return spec
    as_they_are = architecture.normalizes and not isinstance(architecture, Composite)
    if as_they_are or architecture.gives == "images":
        raise InputError(f"{part.name!r} takes pixels as they are, and is given a normalization", "Leave that out.")
    if not len(constants.mean) == len(constants.std) == spec.shape[0]:
        counts = f"{len(constants.mean)} means and {len(constants.std)} stds"
        raise InputError(f"the normalization of {part.name!r} has {counts}, for images of {spec.shape[0]} channels")
    return spec.model_copy(update={"mean": constants.mean, "std": constants.std})


def _trial(classifier: Classifier, shape: tuple[int, int, int]) -> tuple[int, ...]:
    """The shape of the logits of two black images; of large images without any memory, where the network allows that."""
    if math.prod(shape) > LARGE:
        with suppress(Exception), torch.inference_mode():  # a network may refuse the meta device with any exception
            return tuple(copy.deepcopy(classifier).to("meta")(torch.zeros(2, *shape, device="meta")).shape)
    with torch.inference_mode():
        return tuple(classifier(torch.zeros(2, *shape)).shape)


@contextmanager
def no_larger_than(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """While a network is built: raises `InputError` as soon as it is much larger than the `tensors` (of any shape) that are to
    be its weights.

    Layers are counted as they are registered, before they are initialised, so that nothing is filled that a file cannot
    fill. A network may register a tensor several times, or replace it while it is built: hence the factor of 4.
    """
    most = {"tensors": 4 * len(tensors) + 1000, "values": 4 * sum(t.numel() for t in tensors.values()) + 2**22}
    most["layers"] = 20 * most["tensors"]
    counts = dict.fromkeys(most, 0)

    def register(_module: nn.Module, _name: str, part: object) -> None:
        if isinstance(part, Tensor):
            counts["tensors"] += 1
            counts["values"] += part.numel()
        else:
            counts["layers"] += 1
        check()

    def check() -> None:
        if any(counts[name] > most[name] for name in most):
            raise InputError("it is much larger than the weights in the file")

    handles = [
        register_module_parameter_registration_hook(register),
        register_module_buffer_registration_hook(register),
        register_module_module_registration_hook(register),
    ]
    try:
        yield
        check()
    except Exception as cause:
        check()  # a plugin may have turned the refusal into another error
        if isinstance(cause, MemoryError | OverflowError) or (type(cause) is RuntimeError and _of_memory(cause)):
            raise InputError(f"it does not fit in memory ({shortened(str(cause))})") from cause
        raise
    finally:
        for handle in handles:
            handle.remove()


def _of_memory(cause: RuntimeError) -> bool:
    """Whether torch could not make a tensor: none so large can be, or there is no room."""
    return any(words in str(cause) for words in ("memory", "overflow", "Storage size", "too large"))


def head_of(architecture: Architecture, spec: DataSpec) -> frozenset[str]:
    """The names of the head's tensors in the state dict of the network: those that change with the number of classes.

    Found by building the network for one class more; torch's random numbers stay as they are.
    """
    wider = spec.model_copy(update={"class_names": (*spec.class_names, "one more")})
    with torch.random.fork_rng(devices=[]):
        here, there = (build_classifier(architecture, each, weights=False).network.state_dict() for each in (spec, wider))
    return frozenset(name for name in here if name not in there or here[name].shape != there[name].shape)


def parameter_count(module: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
