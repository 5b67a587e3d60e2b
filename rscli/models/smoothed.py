"""The noun of the program: a network and its noise, as what samples, certifies and predicts takes them.

A model file is one way to get one (`rscli.models.modelfile`), a network in memory another (`rscli.SmoothedClassifier`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from rscli.api import Noise, Transform
from rscli.models.card import ModelCard


@dataclass(frozen=True)
class Source:
    """The model file that a smoothed classifier came from: its path, what it says of itself, and its digest (SHA-256)."""

    path: Path
    card: ModelCard
    sha256: str


class Smoothed:
    """A smoothed classifier: g(x) is what `network` answers most often on `x` under `noise`.

    `network` takes images (batch, channel, height, width) with pixels in [0, 1], its normalisation included, and gives logits
    (batch, classes). `shape` (channel, height, width) and the test `transform` say what images it wants, as far as known;
    `source` is the model file that it came from, if any; `card` is what a model file would say of it, if that is known.
    """

    def __init__(
        self,
        network: nn.Module,
        noise: Noise,
        class_names: tuple[str, ...],
        *,
        shape: tuple[int, int, int] | None = None,
        transform: Transform | None = None,
        source: Source | None = None,
        card: ModelCard | None = None,
    ) -> None:
        self.network, self.noise, self.class_names = network, noise, class_names
        self.shape, self.transform, self.source = shape, transform, source
        self.card = source.card if card is None and source is not None else card

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def sigma(self) -> float:
        """The standard deviation of the noise, in [0, 1] pixels."""
        return self.noise.sigma
