"""How many votes change when the same noise is classified in another way: batch size, layout, threads, torch.compile, bf16.

    python bench/certify_ties.py MODEL --data-dir data                       # 50 images, 20,000 samples each
    python bench/certify_ties.py MODEL --data-dir data --images 10 --samples 2000 --no-compile

The noise of a sample does not depend on how it is classified. The network's sums do, in their last bits, and where two logits
nearly tie another class may win. Every way classifies the very same noisy images; votes are compared sample by sample with
those of batch 256, channels_last, on all threads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rscli.api import Dataset
from rscli.data.splits import open_split
from rscli.models.modelfile import card_of, load_model
from rscli.models.smoothed import Smoothed
from rscli.registry import installed
from rscli.runtime.devices import device_name, memory_layout, pick_device
from rscli.sampling.blocks import NoiseBlocks, Piece, cut
from rscli.sampling.sampler import Sampler

CHUNK = 4096
"""Samples compared at a time."""


@dataclass(frozen=True)
class Manner:
    """How the network is run."""

    batch: int = 256
    channels_last: bool = True
    threads: int | None = None
    compiled: bool = False
    precision: str = "fp32"

    def sampler(self, model: Smoothed, device: torch.device) -> Sampler:
        """Our engine, with a network of its own."""
        network: Any = deepcopy(model.network).to(device).to(memory_format=memory_layout(self.channels_last)).eval()
        if self.compiled:
            network = torch.compile(network, dynamic=False)
        return Sampler(
            network,
            model.noise,
            model.classes,
            seed=0,
            batch=self.batch,
            device=device,
            precision=self.precision,
            channels_last=self.channels_last,
        )


USUAL = Manner()
MANNERS = {
    "batch 64": Manner(batch=64),
    "batch 1000": Manner(batch=1000),
    "contiguous": Manner(channels_last=False),
    "one thread (a worker)": Manner(threads=1),
    "compiled": Manner(compiled=True),
    "bf16": Manner(precision="bf16"),
}


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    yield
    torch.set_num_threads(before)


def chunks(model: Smoothed, data_dir: Path, images: int, samples: int, device: torch.device) -> Iterator[list[Piece]]:
    """The noisy images, some thousands at a time; each block of noise is drawn once, whoever classifies it."""
    card = card_of(model)
    dataset = cast(Dataset, installed().build("datasets", card.data))
    split = open_split(dataset, card.spec, "test", data_dir)
    blocks = NoiseBlocks(model.noise, 0, device, most=2)
    for index in range(images):
        image = split.image(index).to(device)
        for start in range(0, samples, CHUNK):
            yield blocks.pieces(index, image, start, min(CHUNK, samples - start))


def classified(sampler: Sampler, pieces: list[Piece]) -> Tensor:
    """The class of each sample of `pieces`, in batches of the sampler's size."""
    return torch.cat([sampler._classify(part)[0] for part in cut(pieces, sampler.batch)])


def compare(model: Smoothed, device: torch.device, manners: dict[str, Manner], found: Iterator[list[Piece]]) -> dict[str, Any]:
    """For each manner, how many votes of all differ from the usual ones."""
    usual = USUAL.sampler(model, device)
    samplers = {name: manner.sampler(model, device) for name, manner in manners.items()}
    moved, total = dict.fromkeys(manners, 0), 0
    for pieces in found:
        votes = classified(usual, pieces)
        total += len(votes)
        for name, manner in manners.items():
            with threads(manner.threads):
                moved[name] += int((classified(samplers[name], pieces) != votes).sum())
    return {"votes": total, "differ": moved}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    model = load_model(arguments.model / "model.safetensors" if arguments.model.is_dir() else arguments.model)
    manners = {name: manner for name, manner in MANNERS.items() if arguments.compile or not manner.compiled}
    found = compare(model, device, manners, chunks(model, arguments.data_dir, arguments.images, arguments.samples, device))
    if arguments.json:
        print(json.dumps({"device": device_name(device), **found}, indent=2))
        return
    print(f"{device_name(device)}, torch {torch.__version__}: {found['votes']:,} votes of {arguments.images} images")
    for name, moved in found["differ"].items():
        print(f"  {name:20} {moved:8,} differ, {1e6 * moved / found['votes']:10.2f} in a million")


if __name__ == "__main__":
    main()
