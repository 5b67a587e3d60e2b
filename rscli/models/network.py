"""The classifier that is trained and certified: a normalisation layer in front of an architecture's network."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from rscli.api import Architecture, DataSpec
from rscli.config.settings import shortened
from rscli.errors import InputError
from rscli.runtime.guard import broken, calling

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


def build_classifier(architecture: Architecture, spec: DataSpec, *, weights: bool = True) -> Classifier:
    """A freshly initialised classifier for the data of `spec`; without `weights`, nothing pretrained is fetched.

    Raises `PluginError` if the network does not turn a batch of the announced shape into finite logits (batch, classes).
    """
    classes = len(spec.class_names)
    with calling(architecture, "build"):
        network = architecture.build(spec, weights=weights)
    if not isinstance(network, nn.Module):
        raise broken(architecture, "build", f"returned {network!r:.80}, which is no torch module")
    classifier = Classifier(network, spec, normalizes=architecture.normalizes)
    classifier.eval()
    with calling(architecture, "build: the forward of its network"):
        shape = _trial(classifier, spec.shape)
    classifier.train()
    if shape != (2, classes):
        raise broken(architecture, "build", f"made a network that gives logits of shape {shape}, not {(2, classes)}")
    return classifier


def _trial(classifier: Classifier, shape: tuple[int, int, int]) -> tuple[int, ...]:
    """The shape of the logits of two black images; of large images without any memory, where the network allows that."""
    if math.prod(shape) > LARGE:
        with suppress(Exception), torch.inference_mode():  # a network may refuse the meta device with any exception
            return tuple(copy.deepcopy(classifier).to("meta")(torch.zeros(2, *shape, device="meta")).shape)
    with torch.inference_mode():
        return tuple(classifier(torch.zeros(2, *shape)).shape)


@contextmanager
def no_larger_than(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """While a network is built: raises `InputError` as soon as it is much larger than the `tensors` that it is to take.

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
    with torch.random.fork_rng(devices=[]), calling(architecture, "build"):
        here, there = (architecture.build(each, weights=False).state_dict() for each in (spec, wider))
    return frozenset(name for name in here if name not in there or here[name].shape != there[name].shape)


def parameter_count(module: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
