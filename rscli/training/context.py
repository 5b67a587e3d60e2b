"""What a loss may look at before the first step: the training images, and a teacher's model file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from rscli.api import DataSpec, Noise, TrainContext
from rscli.data.splits import Split
from rscli.errors import InputError
from rscli.models.modelfile import load_model
from rscli.runtime.progress import Progress
from rscli.runtime.seeds import generator


class SetupContext(TrainContext):
    """The context of one run."""

    def __init__(self, split: Split, spec: DataSpec, noise: Noise, device: torch.device, seed: int, progress: Progress) -> None:
        self.images, self.classes, self.noise, self.device = len(split), len(spec.class_names), noise, device
        self.generator = generator(device, seed, "setup")
        self._split, self._spec, self._progress = split, spec, progress

    def batches(self, batch: int = 256) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Every training image once, under the test transform: indices, images, labels."""
        labels = torch.from_numpy(self._split.labels)
        for start in range(0, self.images, batch):
            indices = torch.arange(start, min(start + batch, self.images))
            images = torch.stack([self._split.image(int(index)) for index in indices])
            yield indices, images.to(self.device), labels[indices].to(self.device)

    def load_model(self, path: Path) -> tuple[nn.Module, Noise]:
        """The frozen network and the noise of a model file, or of the run folder that holds one."""
        model = load_model(path / "model.safetensors" if path.is_dir() else path)
        if model.class_names != self._spec.class_names or model.shape != self._spec.shape:
            raise InputError(
                f"the model {path} is for {model.classes} classes and images {model.shape}, "
                f"the training data have {self.classes} and {self._spec.shape}",
                "Name a model of the same data set.",
            )
        return model.network.to(self.device).eval().requires_grad_(False), model.noise

    def note(self, text: str) -> None:
        """A line for the user."""
        self._progress.note(text)
