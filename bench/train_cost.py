"""What an epoch of each method costs, relative to Gaussian augmentation: all methods side by side in one run.

    python bench/train_cost.py                      LeNet on MNIST-shaped images, ResNet-20 on CIFAR-shaped images
    python bench/train_cost.py --images 256 --rounds 2 --json

Every method runs with its preset at sigma 0.5, through the engine's own training loop, on the same random images (the
arithmetic does not depend on what they show), in its last epoch: attacks at full epsilon, MACER with both of its terms. The
methods take turns, round after round, so that a machine whose speed drifts treats them alike; the figure is the median over
rounds of the ratio to Gaussian in the same round. The cost depends on the m noisy copies of the preset, which are shown. No
paper has SmoothAdv + consistency on ResNet-20: there it has the settings of ResNet-110, with fewer copies than SmoothAdv has.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from rscli.api import DataSpec
from rscli.config.layers import resolve
from rscli.data.splits import MemorySplit
from rscli.training.trainer import Trainer

METHODS = ("gaussian", "stability", "macer", "cons", "smoothadv", "smoothadv-cons")
SETUPS: dict[str, dict[str, tuple[str, list[str]]]] = {
    "LeNet/MNIST": {method: (f"mnist-{method}-0.5", []) for method in METHODS},
    "ResNet-20/CIFAR-10": {method: (f"cifar10-resnet20-{method}-0.5", []) for method in METHODS[:-1]}
    | {"smoothadv-cons": ("cifar10-smoothadv-cons-0.5", ["arch.depth=20"])},
}
"""Of each setup: method -> its preset, and what is set otherwise."""


def random_split(spec: DataSpec, images: int) -> MemorySplit:
    """`images` random images (channel, height, width) with random labels."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (images, *spec.shape), dtype=np.uint8)
    return MemorySplit(pixels, random.integers(0, len(spec.class_names), images), spec)


def epoch_seconds(trainer: Trainer) -> float:
    """The time of one pass over the trainer's images."""
    trainer.batch = 0
    began = time.perf_counter()
    for _ in trainer.epoch_batches():
        pass
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def last_epoch_trainer(preset: str, sets: list[str], images: int, device: torch.device) -> Trainer:
    """A trainer on random images, at the beginning of its last epoch."""
    resolved = resolve(preset=preset, sets=sets)
    spec = resolved.dataset.spec(Path())
    trainer = Trainer(resolved, spec, random_split(spec, images), device, channels_last=True)
    trainer.epoch = resolved.config.epochs - 1  # after the warm-up of attacks, and the first milestone that MACER waits for
    return trainer


def measure(
    setup: dict[str, tuple[str, list[str]]], images: int, rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """For each method: its noisy copies m, the median ratio to Gaussian, its range, and the median images per second."""
    trainers = {method: last_epoch_trainer(*preset, images, device) for method, preset in setup.items()}
    for trainer in trainers.values():
        next(trainer.epoch_batches())  # the first step is slower
    seconds = [{method: epoch_seconds(trainer) for method, trainer in trainers.items()} for _ in range(rounds)]
    found = {}
    for method, trainer in trainers.items():
        ratios = [turn[method] / turn["gaussian"] for turn in seconds]
        found[method] = {
            "m": trainer.resolved.loss.m,
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "images_per_s": images / statistics.median(turn[method] for turn in seconds),
        }
    return found


def main(
    images: Annotated[int, typer.Option(help="Images an epoch; a multiple of 256.")] = 512,
    rounds: Annotated[int, typer.Option(help="Turns of all methods.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Answer with JSON.")] = False,
) -> None:
    """Training cost of every method relative to Gaussian augmentation."""
    found = {name: measure(setup, images, rounds, torch.device(device)) for name, setup in SETUPS.items()}
    if json:
        import json as encoder

        typer.echo(encoder.dumps(found, indent=2))
        return
    for name, methods in found.items():
        typer.echo(f"{name}  ({images} images, {rounds} rounds, {torch.get_num_threads()} threads)")
        for method, figures in methods.items():
            ratio = f"{figures['ratio']:6.2f}x  [{figures['least']:.2f}, {figures['most']:.2f}]"
            typer.echo(f"  {method:16}m {figures['m']:2}  {ratio}   {figures['images_per_s']:8.0f} images/s")


if __name__ == "__main__":
    typer.run(main)
