"""Every shipped preset builds its network and takes one real optimiser step, on a few random pixels of the right shape."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rscli.api import Position
from rscli.config.layers import resolve
from rscli.config.presets import list_presets
from rscli.data.splits import Batch, MemorySplit
from rscli.training.trainer import Trainer

NAMES = [preset.name for preset in list_presets() if preset.package == "rscli"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_step(name):
    resolved = resolve(preset=name)
    spec = resolved.dataset.spec(Path("nowhere"))
    images = 2 if spec.shape[-1] < 100 else 1
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (images, *spec.shape), dtype=np.uint8)
    split = MemorySplit(pixels, random.integers(0, len(spec.class_names), images), spec)
    trainer = Trainer(resolved, spec, split, torch.device("cpu"), channels_last=True)
    trainer.epoch = resolved.config.epochs - 1  # after every milestone and warm-up: all terms and the full attack take part
    before = [p.detach().clone() for p in trainer.classifier.parameters()]
    labels = torch.from_numpy(split.labels)
    item = Batch(torch.from_numpy(pixels).float() / 255, labels, torch.arange(images), 0, 0, 0, images)
    trainer._step(item, Position(trainer.epoch, 0.99, trainer.lr_factor))
    means = trainer.meter.means()
    assert math.isfinite(means["loss"])
    assert means["loss"] == pytest.approx(sum(v for k, v in means.items() if k not in ("loss", "accuracy")), rel=1e-4, abs=1e-4)
    after = list(trainer.classifier.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in after)
    assert not torch.equal(after[-1], before[-1])  # timm starts residual branches at zero: not every weight moves at first
