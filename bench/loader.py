"""Is it the loader or the network that training waits for? Both alone, and together, on a folder of images.

    python bench/loader.py photos --make 2000          first makes a folder of JPEG files of about 500x375, in ten classes
    python bench/loader.py photos --network timm/resnet50 --batch 256 --workers 8 --device cuda
    python bench/loader.py photos --set loss.name=consistency --set loss.lbd=10 --set data.rand_augment=2

`photos` holds train/CLASS/IMAGE, and is read as `imagefolder` with resized crops; `--set` changes that, as in `rscli train`.
Three things take turns, round after round, so that a machine whose speed drifts treats them alike:

- the loader alone: `batches` of the split, to the device, and nothing is done with them;
- the network alone: the engine's own training steps on one batch that is on the device;
- both: the engine's own training on what the loader reads.

The figures are images per second, medians over the rounds. Where the processor is also the device, loader and network share
it, and both together are slower than either. Before that, what one process takes to read an image, alone: the whole file by
Pillow, a random resized crop by Pillow, and the same as training reads it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from rscli.config.layers import Resolved, resolve
from rscli.data import transforms
from rscli.data.splits import Batch, FileSplit, Split, open_split, spec_of
from rscli.runtime.devices import pick_device
from rscli.training.trainer import Trainer

CLASSES = 10


def make(folder: Path, images: int) -> None:
    """Writes JPEG files of about 500x375, as ImageNet has them, in ten classes: parts of two photographs, turned and tinted."""
    from sklearn.datasets import load_sample_images

    photographs, random = [Image.fromarray(each) for each in load_sample_images().images], np.random.default_rng(0)
    for number in range(images):
        whole = photographs[number % 2]
        width, height = (int(side * random.uniform(0.8, 1.2)) for side in (500, 375))
        left, top = random.uniform(0, 200), random.uniform(0, 130)
        part = whole.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + 420, top + 290))
        tint = np.array(part) * random.uniform(0.7, 1.2, 3)
        file = folder / "train" / f"class{number % CLASSES}" / f"{number:06}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tint.clip(0, 255).astype(np.uint8)).save(file, quality=92)


class Repeated(Split):
    """The batches of another split, all of them with the images of the first: no reading at all."""

    def __init__(self, split: Split, batch: Batch) -> None:
        super().__init__(split.labels, split.spec)
        self._split, self._batch = split, batch

    def fingerprint(self) -> str:
        """That of the other."""
        return self._split.fingerprint()

    def content(self) -> str:
        """That of the other."""
        return self._split.content()

    def part(self, places: Any) -> Split:
        """That of the other."""
        return self._split.part(places)

    def image(self, index: int) -> torch.Tensor:
        """That of the other."""
        return self._split.image(index)

    def in_order(self, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Those of the other."""
        return self._split.in_order(batch)

    def batches(self, **how: Any) -> Generator[Batch]:
        """The same batch, as often as the other has batches."""
        for _ in range(self.steps(how["batch"])):
            yield self._batch


def settings(folder: Path, network: str, size: int, batch: int, sets: list[str]) -> Resolved:
    """The configuration of a training run on `folder`."""
    ours = [
        f"data.path={folder.resolve()}", f"data.size={size}", "data.augment=resized-crop", f"arch.name={network}",
        "noise.sigma=0.5", "loss.name=gaussian", f"batch={batch}", "epochs=1000000", "optimizer.lr=0.001",
    ]  # fmt: skip
    return resolve(sets=["data.name=imagefolder", *ours, *sets])


def loader_batches(split: Split, resolved: Resolved, device: torch.device) -> Iterator[int]:
    """Reads epoch after epoch; the number of images of each batch."""
    for epoch in range(sys.maxsize):
        batches = split.batches(seed=0, epoch=epoch, batch=resolved.config.batch, device=device)
        with closing(batches):
            for batch in batches:
                yield len(batch.labels)


def trained_batches(trainer: Trainer) -> Iterator[int]:
    """Trains epoch after epoch; the number of images of each batch."""
    while True:
        before = trainer.meter.images
        with closing(trainer.epoch_batches()) as batches:
            for _ in batches:
                yield trainer.meter.images - before
                before = trainer.meter.images
        trainer.epoch, trainer.batch, trainer.meter = trainer.epoch + 1, 0, trainer.new_meter()


def rate(batches: Iterator[int], seconds: float, device: torch.device) -> float:
    """Images per second of what goes on for at least so many `seconds`, after a first batch."""
    next(batches)
    _wait(device)
    images, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        images += next(batches)
    _wait(device)
    return images / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def decoding(split: FileSplit, images: int = 64) -> dict[str, float]:
    """Milliseconds of one process an image, medians over the first `images`: see the top."""
    change, files = split.spec.test_transform, split._files
    slow: Callable[..., Any] = transforms.random_resized_crop
    ways: dict[str, Callable[[int, np.random.Generator], object]] = {
        "whole, Pillow": lambda i, _: transforms.read_image(files[i], change.channels),
        "crop, Pillow": lambda i, rng: slow(transforms.read_image(files[i], change.channels), change.crop, rng),
        "crop, as training reads": lambda i, rng: transforms.load_resized_crop(files[i], change, rng),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for index in range(min(images, len(split))):
        for way, read in ways.items():
            began = time.perf_counter()
            read(index, np.random.default_rng(index))
            found[way].append(time.perf_counter() - began)
    return {way: 1000 * statistics.median(times) for way, times in found.items()}


def measure(resolved: Resolved, workers: int, seconds: float, rounds: int, device: torch.device) -> dict[str, float]:
    """Images per second of the loader, the network and both, medians over the rounds."""
    spec = spec_of(resolved.dataset, Path())
    with closing(open_split(resolved.dataset, spec, "train", Path(), workers=workers)) as split:
        batches = split.batches(seed=0, epoch=0, batch=resolved.config.batch, device=device)
        with closing(batches):
            first = next(batches)
        found: dict[str, list[float]] = {"loader": [], "network": [], "both": []}
        for _ in range(rounds):
            for what, times in found.items():
                source = split if what == "both" else Repeated(split, first)
                going = (
                    loader_batches(split, resolved, device)
                    if what == "loader"
                    else trained_batches(Trainer(resolved, spec, source, device, channels_last=None))
                )
                times.append(rate(going, seconds, device))
                going.close()  # type: ignore[attr-defined]
                split.close()
    return {what: statistics.median(times) for what, times in found.items()}


def verdict(found: dict[str, float], workers: int) -> str:
    """What limits training, and what to do about it."""
    loader, network = found["loader"], found["network"]
    if loader < network:
        wanted = max(workers + 1, round(max(workers, 1) * network / loader * 1.1))
        return f"the loader is the limit: about {wanted} workers would keep up with this network, if there are as many cores"
    return f"the network is the limit: the loader could feed {loader / network:.1f} of it"


def main(
    folder: Annotated[Path, typer.Argument(help="A folder with train/CLASS/IMAGE.")],
    make_images: Annotated[int, typer.Option("--make", help="First write so many JPEG files into it.")] = 0,
    network: Annotated[str, typer.Option(help="As in arch.name.")] = "timm/resnet18",
    size: Annotated[int, typer.Option(help="Side of the input, in pixels.")] = 224,
    batch: Annotated[int, typer.Option(help="Images a batch.")] = 64,
    workers: Annotated[int, typer.Option(help="Processes that read.")] = 4,
    sets: Annotated[list[str] | None, typer.Option("--set", help="Any setting, as in `rscli train`.")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of a measurement, at least.")] = 10.0,
    rounds: Annotated[int, typer.Option(help="Turns of all three.")] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Answer with JSON.")] = False,
) -> None:
    """Whether loader or network is the limit of training on a folder of images."""
    if make_images:
        make(folder, make_images)
    chosen, resolved = pick_device(device), settings(folder, network, size, batch, sets or [])
    alone = open_split(resolved.dataset, spec_of(resolved.dataset, Path()), "train", Path())
    if not isinstance(alone, FileSplit):
        raise typer.BadParameter("these images are held in memory: there is no loader to measure; --set data.cache=files")
    milliseconds = decoding(alone)
    found = measure(resolved, workers, seconds, rounds, chosen)
    if json:
        import json as encoder

        answer = {"device": str(chosen), "workers": workers, "milliseconds": milliseconds, "images_per_s": found}
        typer.echo(encoder.dumps({**answer, "verdict": verdict(found, workers)}, indent=2))
        return
    base = milliseconds["crop, Pillow"]
    for way, taken in milliseconds.items():
        typer.echo(f"{way:24} {taken:8.2f} ms an image  {base / taken:5.2f} of the speed of the second")
    least = min(found["loader"], found["network"])
    for what, speed in found.items():
        typer.echo(f"{what:24} {speed:8.0f} images/s     {speed / least:5.2f} of the slower of the first two")
    typer.echo(f"{chosen}, {workers} workers: {verdict(found, workers)}")


if __name__ == "__main__":
    typer.run(main)
