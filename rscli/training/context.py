"""What a loss may look at before the first step: the training images, and a teacher's model file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from rscli.api import Noise, TrainContext
from rscli.data.splits import Split
from rscli.errors import InputError, Stopped
from rscli.models.modelfile import load_model
from rscli.runtime.progress import Progress
from rscli.runtime.seeds import generator
from rscli.runtime.signals import StopRequest


class SetupContext(TrainContext):
    """The context of one run."""

    def __init__(
        self, split: Split, noise: Noise, device: torch.device, seed: int, progress: Progress, stop: StopRequest
    ) -> None:
        self.images, self.classes, self.noise, self.device = len(split), len(split.spec.class_names), noise, device
        self.generator = generator(device, seed, "setup")
        self._split, self._progress, self._stop = split, progress, stop

    @property
    def data_sha256(self) -> str:  # type: ignore[override]
        """The fingerprint; taken when it is asked for, as a million files are looked at for it, by every process."""
        return self._split.fingerprint()

    def batches(self, batch: int = 256) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Every training image once, under the test transform: indices (b,), images (b, channel, height, width), labels (b,).

        Raises `Stopped` when asked to stop.
        """
        labels = torch.from_numpy(self._split.labels)
        self._progress.start("prepare", self.images, 0, "image")
        try:
            for indices, images in self._split.in_order(batch):
                if self._stop.requested:
                    text = "stopped as asked, while the loss was prepared; nothing is saved yet"
                    raise Stopped(text, "Run the same command again.", exit_code=self._stop.exit_code)
                yield indices, images.to(self.device), labels[indices].to(self.device)
                self._progress.update(int(indices[-1]) + 1, {})
        finally:
            self._progress.finish()

    def load_model(self, path: Path) -> tuple[nn.Module, Noise]:
        """The frozen network and the noise of a model file, or of the run folder that holds one."""
        model = load_model(path / "model.safetensors" if path.is_dir() else path)
        spec = self._split.spec
        if model.class_names != spec.class_names or model.shape != spec.shape:
            raise InputError(
                f"the model {path} is for {model.classes} classes and images {model.shape}, "
                f"but the training data has {self.classes} and {spec.shape}",
                "Name a model of the same data set.",
            )
        return model.network.to(self.device).eval().requires_grad_(False), model.noise

    def note(self, text: str) -> None:
        """A line for the user."""
        self._progress.note(text)
