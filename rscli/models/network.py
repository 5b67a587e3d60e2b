"""The classifier that is trained and certified: a normalisation layer in front of an architecture's network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rscli.api import Architecture, DataSpec
from rscli.errors import PluginError


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
        """The normalised images, of the same shape."""
        return (images - self.mean) / self.std


class Classifier(nn.Module):
    """Images (batch, channel, height, width) in [0, 1] to logits (batch, classes).

    The normalisation of `spec` comes in front, unless the network `normalizes` by itself.
    """

    def __init__(self, network: nn.Module, spec: DataSpec, *, normalizes: bool = False) -> None:
        super().__init__()
        known = spec.mean is not None and spec.std is not None and not normalizes
        self.normalize = Normalize(spec.mean or (), spec.std or ()) if known else nn.Identity()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """The logits (batch, classes)."""
        logits: Tensor = self.network(self.normalize(images))
        return logits


def build_classifier(architecture: Architecture, spec: DataSpec, *, weights: bool = True) -> Classifier:
    """A freshly initialised classifier for the data of `spec`; without `weights`, nothing pretrained is fetched.

    Raises `PluginError` if the network does not turn a batch of the announced shape into finite logits (batch, classes).
    """
    classes = len(spec.class_names)
    classifier = Classifier(architecture.build(spec, weights=weights), spec, normalizes=architecture.normalizes)
    classifier.eval()
    with torch.inference_mode():
        out = classifier(torch.zeros(2, *spec.shape))
    classifier.train()
    if tuple(out.shape) != (2, classes):
        name = type(architecture).__name__
        raise PluginError(f"the architecture {name} gives logits of shape {tuple(out.shape)}, not {(2, classes)}")
    return classifier


def parameter_count(module: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
