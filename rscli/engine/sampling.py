"""How samples are drawn: the options that certification and prediction share, and the sampler made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from rscli.engine.devices import memory_layout, pick_device, precision_scope
from rscli.engine.modelfile import Model
from rscli.engine.sample import Sampler
from rscli.engine.tune import Choice, tune

BATCH = 256
"""The batch size of runs too short for a trial."""


@dataclass(frozen=True)
class SamplingOptions:
    """How samples are drawn. Only `precision`, `seed` and the kind of device change what a certificate rests on.

    `batch` and `channels_last` are kept if given; if not, they are those of the run that is resumed, or found by a trial
    (`autotune`; None: for long runs), or the usual ones.
    """

    device: str = "auto"
    batch: int | None = None
    precision: str = "fp32"
    channels_last: bool | None = None
    seed: int = 0
    autotune: bool | None = None
    compile: bool = False

    def sampler(self, model: Model, before: Mapping[str, Any], *, long: bool) -> tuple[Sampler, Choice]:
        """A sampler of `model`, moved to the device; `before` is the `info` of a run that is continued.

        Raises `InputError` for a device or precision that is not to be had.
        """
        device = pick_device(self.device)
        precision_scope(self.precision, device)
        classifier: nn.Module = model.classifier.to(device)
        shape, classes = model.card.spec.shape, len(model.card.spec.class_names)
        batch = self.batch or before.get("batch")
        channels_last = self.channels_last if self.channels_last is not None else before.get("channels_last")
        if self.autotune or (self.autotune is None and long and batch is None):
            choice = tune(classifier, shape, device, self.precision, batch=batch, channels_last=channels_last)
        else:
            choice = Choice(batch or BATCH, True if channels_last is None else channels_last)
        classifier = classifier.to(memory_format=memory_layout(choice.channels_last))
        if self.compile:
            # one static shape; on CUDA, "reduce-overhead" replays the forward as a CUDA graph
            mode = "reduce-overhead" if device.type == "cuda" else "default"
            classifier = cast(nn.Module, torch.compile(classifier, mode=mode, dynamic=False))
        sampler = Sampler(
            classifier,
            model.noise,
            classes,
            seed=self.seed,
            batch=choice.batch,
            device=device,
            precision=self.precision,
            channels_last=choice.channels_last,
        )
        return sampler, choice
