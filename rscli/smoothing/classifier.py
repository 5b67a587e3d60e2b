"""The Python API: a smoothed classifier that certifies and predicts images in memory, with the guarantees of the commands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rscli.api import Certificate, Noise, Question, Transform
from rscli.config.layers import build_section
from rscli.config.problems import Problems
from rscli.config.settings import flatten
from rscli.data.splits import to_unit
from rscli.data.transforms import load_image
from rscli.errors import InputError
from rscli.models.card import ModelCard
from rscli.models.modelfile import card_of, load_model, save_model
from rscli.models.network import Classifier
from rscli.models.smoothed import Smoothed, Source
from rscli.registry import installed
from rscli.runtime.progress import Progress, Silent
from rscli.sampling.options import SamplingOptions, Work
from rscli.sampling.requests import CertifierRequest, Request
from rscli.smoothing.certify import LONG_RUN, build_certifier
from rscli.smoothing.predict import Prediction, image_key, prediction_of, vote
from rscli.smoothing.radii import decided_radii
from rscli.smoothing.task import CertificationTask

ImagesLike = Tensor | NDArray[Any] | Sequence[Tensor | NDArray[Any] | Path | str]
"""Images (batch, channel, height, width), uint8 or floats in [0, 1]; or a list of single images, or of image files."""


class SmoothedClassifier(Smoothed):
    """A network under noise, that certifies and predicts: `rscli.load(FILE)`, or any network in memory.

    Example:

        model = rscli.SmoothedClassifier(network, sigma=0.5, class_names=["cat", "dog"])
        certificates = model.certify(images, n=100_000, alpha=0.001)
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        class_names: Sequence[str] | int,
        sigma: float | None = None,
        noise: Noise | None = None,
        input_shape: tuple[int, int, int] | None = None,
        transform: Transform | None = None,
        source: Source | None = None,
        card: ModelCard | None = None,
    ) -> None:
        """`network` takes images (batch, channel, height, width) with pixels in [0, 1], and gives logits (batch, classes).

        Its normalisation, an ensemble's members or a denoiser are inside it. The noise is Gaussian (the default noise of the
        installed plugins) of standard deviation `sigma`, or any `noise` plugin. `class_names` may be their number.
        `input_shape` (channel, height, width) refuses other images; `transform` is how files become images.

        Raises `InputError` unless exactly one of `sigma` and `noise` is given.
        """
        if (sigma is None) == (noise is None):
            raise InputError("a smoothed classifier needs its noise", "Give either sigma, as in sigma=0.5, or noise=PLUGIN.")
        if not isinstance(network, nn.Module):
            raise InputError(
                f"the network is a {type(network).__name__}, but must be a torch module", "Wrap it in an nn.Module."
            )
        found = noise if noise is not None else _default_noise(sigma)
        names = tuple(map(str, range(class_names))) if isinstance(class_names, int) else tuple(class_names)
        if not names:
            raise InputError("a classifier needs at least one class", f"Give class_names; they are {class_names!r}.")
        super().__init__(network, found, names, shape=input_shape, transform=transform, source=source, card=card)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """The classifier in a model file, or in a run folder. Raises `InputError` and `PluginError` as `rscli certify` does."""
        path = Path(path)
        return cls.of(load_model(path / "model.safetensors" if path.is_dir() else path))

    @classmethod
    def of(cls, found: Smoothed) -> Self:
        """A smoothed classifier with the methods of this class."""
        return cls(
            found.network,
            noise=found.noise,
            class_names=found.class_names,
            input_shape=found.shape,
            transform=found.transform,
            source=found.source,
            card=found.card,
        )

    def save(self, path: Path | str) -> None:
        """Writes a model file that `rscli certify` and `rscli.load` read.

        Raises `InputError` for a network in memory: nothing says how it could be built again.
        """
        if self.card is None or not isinstance(self.network, Classifier):
            raise InputError(
                "this network is not built from an architecture plugin, so a model file could not say how to build it again",
                "Save its weights with torch.save(network.state_dict(), FILE), and turn them into a model file with "
                "`rscli import FILE --arch NAME`; or ship the network as an architecture plugin.",
            )
        card = card_of(self)
        written = installed().build("noises", {**card.noise, "sigma": self.sigma})
        known = (card.spec.class_names, card.spec.shape, card.spec.test_transform)
        if written != self.noise or known != (self.class_names, self.shape, self.transform):
            where = (
                "what rscli.compose gave" if self.source is None else f"a classifier of rscli.load({str(self.source.path)!r})"
            )
            raise InputError(
                "the noise, class names, input shape or transform differ from those of the model file that was loaded",
                f"Start again from {where}, and change nothing but sigma.",
            )
        save_model(Path(path), self.network, card.model_copy(update={"noise": {**card.noise, "sigma": self.sigma}}))

    def certify(
        self,
        images: ImagesLike,
        *,
        n: int = 100_000,
        n0: int | None = None,
        alpha: float = 0.001,
        certifier: str | None = None,
        radii: Sequence[float] = (),
        labels: Sequence[int] | None = None,
        indices: Sequence[int] | None = None,
        seed: int = 0,
        device: str | None = None,
        batch: int | None = None,
        precision: str = "fp32",
        progress: Progress | None = None,
        **settings: Any,
    ) -> list[Certificate]:
        """A certificate for each of `images`, in their order: a class and the radius in which it provably cannot change.

        `certifier` is a plugin's name (None: CERTIFY with fixed `n`), with `settings` of its own; `radii` are for those that
        decide given radii. `labels` tests each image's own label in place of a class chosen by `n0` selection samples. The
        noise of image i is keyed by `seed` and `indices[i]` (i, if not given): the same rows as `rscli certify` gives.
        `device` None: where the network is. The network is used in eval mode, and left as it was.

        Raises `InputError` for images that do not fit, and whatever `rscli certify` raises for its options.
        """
        given = {"n": n, "alpha": alpha, **({} if n0 is None else {"n0": n0}), **settings}
        name = certifier or installed().default("certifiers")
        rule = build_certifier({"name": name, **given})
        chosen = decided_radii(rule, self.noise, tuple(map(float, radii)))
        pixels = self._pixels(images)
        keys = list(range(len(pixels))) if indices is None else [int(index) for index in indices]
        if len(set(keys)) != len(pixels) or len(keys) != len(pixels) or min(keys, default=0) < 0:
            raise InputError(f"{len(keys)} indices for {len(pixels)} images", "Give each image an index of its own, 0 or more.")
        if labels is not None and (len(labels) != len(pixels) or not all(0 <= label < self.classes for label in labels)):
            raise InputError(f"{len(labels)} labels for {len(pixels)} images", f"Labels are from 0 to {self.classes - 1}.")
        place = {key: row for row, key in enumerate(keys)}
        asked = CertificationTask(
            self,
            rule,
            lambda index: to_unit_if_bytes(pixels[place[index]]),
            chosen,
            None if labels is None else lambda index: int(labels[place[index]]),
        )
        if not keys:
            return []
        work = Work(len(keys) * rule.n, early=rule.grid, long=len(keys) * rule.n >= LONG_RUN)
        options = SamplingOptions(self._device(device), batch, precision, None, seed)
        done = self._run(map(asked.request_for, keys), work, options, progress, pixels[0].shape, len(keys), "certify")
        found = {request.key: asked.certificate(request) for request in done}
        return [found[key] for key in keys]

    def predict(
        self,
        images: ImagesLike,
        *,
        n: int = 1000,
        alpha: float = 0.001,
        seed: int = 0,
        device: str | None = None,
        batch: int | None = None,
        precision: str = "fp32",
        progress: Progress | None = None,
    ) -> list[Prediction]:
        """PREDICT of Cohen et al. 2019 for each of `images`, in their order: the class that wins the vote of `n` samples.

        ABSTAIN where the vote is too close to be sure at failure probability `alpha`. The noise is keyed by the pixels, as in
        `rscli predict`. Raises as `certify` does.
        """
        rule, pixels = vote(n, alpha), self._pixels(images)
        asked = [
            CertifierRequest(rule, Question(self.classes), image_key(image), partial(to_unit_if_bytes, image))
            for image in pixels
        ]
        options = SamplingOptions(self._device(device), batch, precision, None, seed)
        if not asked:
            return []
        for _ in self._run(iter(asked), Work(len(asked) * n), options, progress, pixels[0].shape, len(asked), "predict"):
            pass
        return [prediction_of(request, self) for request in asked]

    def _run(
        self,
        requests: Iterator[Request],
        work: Work,
        options: SamplingOptions,
        progress: Progress | None,
        shape: Sequence[int],
        total: int,
        task: str,
    ) -> Iterator[CertifierRequest]:
        progress = progress or Silent()
        shaped = Smoothed(self.network, self.noise, self.class_names, shape=cast(tuple[int, int, int], tuple(shape)))
        with _left_as_it_was(self.network):
            sampler, _ = options.sampler(shaped, work, {}, progress, lambda: False)
            progress.start(task, total, 0, "image")
            try:
                for number, request in enumerate(sampler.run(requests), start=1):
                    progress.update(number, {})
                    yield cast(CertifierRequest, request)
            finally:
                progress.finish()

    def _device(self, wanted: str | None) -> str:
        first = next(self.network.parameters(), None)
        return wanted or (str(first.device) if first is not None else "cpu")

    def _pixels(self, images: ImagesLike) -> Sequence[Tensor]:
        """The images, each uint8 or float32 in [0, 1] of one shape (channel, height, width), on the CPU."""
        if isinstance(images, str | Path):
            raise InputError(f"{images!r} is one path, not a list of images", "Write [path].")
        if not isinstance(images, Tensor | np.ndarray) and any(isinstance(image, str | Path) for image in images):
            if self.transform is None:
                raise InputError(
                    "this classifier has no transform, so it cannot read image files",
                    "Give it transform=rscli.api.Transform(...).",
                )
            transform = self.transform
            found: Sequence[Tensor] = [load_image(Path(cast(str, path)), transform) for path in images]
        else:
            found = [_tensor(image, place) for place, image in enumerate(images)]
        for place, image in enumerate(found):
            problem = self._problem(image, found[0].shape)
            if problem:
                raise InputError(f"image {place} {problem}", "Images are (batch, channel, height, width), uint8 or in [0, 1].")
        return [image.cpu() if image.dtype == torch.uint8 else image.detach().cpu().float() for image in found]

    def _problem(self, image: Tensor, first: torch.Size) -> str | None:
        if image.ndim != 3:
            return f"has {image.ndim} dimensions, not 3"
        wanted = self.shape or tuple(first)
        if tuple(image.shape) != wanted:
            return f"has the shape {tuple(image.shape)}, but must have {wanted}"
        if image.dtype == torch.uint8 and image.numel():
            return None
        if image.dtype != torch.uint8 and not image.is_floating_point():
            return f"has numbers of type {image.dtype}"
        if not image.numel():
            return f"has no pixels: its shape is {tuple(image.shape)}"
        low, high = image.min().item(), image.max().item()
        return None if low >= 0 and high <= 1 else f"has pixels from {low:g} to {high:g}"  # NaN is neither


def _tensor(image: Any, place: int) -> Tensor:
    try:
        return torch.as_tensor(image)
    except (TypeError, ValueError, RuntimeError) as cause:
        raise InputError(f"image {place} is not an array of numbers: {cause}", "Images are tensors or numpy arrays.") from cause


def to_unit_if_bytes(image: Tensor) -> Tensor:
    """An image (channel, height, width) as float32 in [0, 1]: uint8 ones divided by 255, others as they are."""
    return to_unit(image) if image.dtype == torch.uint8 else image


@contextmanager
def _left_as_it_was(network: nn.Module) -> Iterator[None]:
    """While the body runs the network in eval mode, another layout, perhaps on another device: all is restored afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    places = [(tensor, tensor.data) for tensor in (*network.parameters(), *network.buffers())]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for tensor, data in places:
            tensor.data = data


def _default_noise(sigma: float | None) -> Noise:
    """The default noise. Raises `ConfigError` for a sigma that it does not take."""
    section = {"name": installed().default("noises"), "sigma": sigma}
    problems = Problems(flatten({"noise": section}, "as given"))
    plugin = build_section("noise", section, problems)
    problems.check()
    return cast(Noise, plugin)
