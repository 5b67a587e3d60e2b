"""The training loop against the network alone, several processes against one, and the memory of micro-batches.

    python bench/train_loop.py loop          an epoch of ours, of a bare loop, and of a plain loop with a DataLoader
    python bench/train_loop.py processes     torchrun with a process a core against one process with as many threads
    python bench/train_loop.py memory        MACER with more and more noisy copies, with micro-batches and without

`loop`: LeNet on MNIST-shaped and ResNet-20 on CIFAR-shaped random images, Gaussian augmentation and consistency, the presets'
batches. Bare is forward, backward and optimiser step of the same number of noisy images a step, made beforehand, in
channels_last: what the network costs. Plain is the loop that most code has: a DataLoader with two workers that gives float
images, the contiguous layout, `loss.item()` and the accuracy after every step. All take turns; ratios are medians over rounds.
"""

from __future__ import annotations

import json as encoder
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.utils.data import DataLoader, TensorDataset
from train_cost import epoch_seconds, random_split

from rscli.api import NoisyLoss
from rscli.config.layers import resolve
from rscli.runtime.devices import memory_layout, tf32_only_if
from rscli.training.precision import Forward, compiled
from rscli.training.trainer import Trainer, initial_classifier

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)
SETUPS = {
    "LeNet, Gaussian": "mnist-gaussian-0.5",
    "LeNet, consistency": "mnist-cons-0.5",
    "ResNet-20, Gaussian": "cifar10-resnet20-gaussian-0.5",
    "ResNet-20, consistency": "cifar10-resnet20-cons-0.5",
}
Json = Annotated[bool, typer.Option("--json", help="Answer with JSON.")]


class Setup:
    """One preset on random images, and the three loops over it."""

    def __init__(self, preset: str, images: int, device: torch.device, precision: str, compile: bool) -> None:
        self.resolved = resolve(preset=preset, sets=[f"precision={precision}"])
        self.device, self.images, self.compile = device, images, compile
        self.spec = self.resolved.dataset.spec(Path())
        self.split = random_split(self.spec, images)
        self.trainer = self._trainer(compile)
        assert isinstance(self.resolved.loss, NoisyLoss)
        self.loss, self.m, self.sigma = self.resolved.loss, self.resolved.loss.m, self.resolved.noise.sigma
        self.size = self.resolved.config.batch // self.trainer.chunks

    def _trainer(self, compile: bool) -> Trainer:
        return Trainer(self.resolved, self.spec, self.split, self.device, channels_last=True, compile=compile)

    def ours(self) -> float:
        """Seconds of an epoch of the engine."""
        return epoch_seconds(self.trainer)

    def bare(self) -> Callable[[], float]:
        """What gives the seconds of an epoch's forwards, backwards and optimiser steps on noisy images that are there."""
        network, optimizer = self._network(memory_layout(True))
        model = Forward(compiled(network) if self.compile else network, self.resolved.config.precision, self.device)
        noisy = torch.rand(self.m * self.size, *self.spec.shape, device=self.device).to(memory_format=memory_layout(True))
        labels = torch.zeros(self.size, dtype=torch.int64, device=self.device)

        def epoch() -> float:
            with timed(self.device) as seconds, tf32_only_if(self.resolved.config.precision == "tf32", self.device):
                for _ in range(self.images // self.size):
                    optimizer.zero_grad(set_to_none=True)
                    terms = self.loss.terms(model(noisy).reshape(self.m, self.size, -1), labels)
                    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
            return seconds[0]

        return epoch

    def plain(self) -> Callable[[], float]:
        """What gives the seconds of an epoch of the usual loop."""
        network, optimizer = self._network(memory_layout(False))
        pixels = torch.stack([self.split.image(index) for index in range(self.images)])
        loader = DataLoader(
            TensorDataset(pixels, torch.from_numpy(self.split.labels)), batch_size=self.size, shuffle=True, num_workers=2
        )

        def epoch() -> float:
            sums = [0.0, 0.0]
            with timed(self.device) as seconds:
                for images, labels in loader:
                    images, labels = images.to(self.device), labels.to(self.device)
                    copies = images.repeat(self.m, 1, 1, 1)
                    logits = network(copies + torch.randn_like(copies) * self.sigma).reshape(self.m, len(images), -1)
                    loss = torch.stack(list(self.loss.terms(logits, labels).values())).sum()
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    sums[0] += loss.item()
                    sums[1] += (logits.argmax(-1) == labels).float().mean().item()
            return seconds[0]

        return epoch

    def _network(self, layout: torch.memory_format) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        network = initial_classifier(self.resolved, self.spec).to(self.device).to(memory_format=layout)
        return network.train(), self.resolved.optimizer.build(network)


@contextmanager
def timed(device: torch.device) -> Iterator[list[float]]:
    """The seconds of the body, in a list."""
    seconds: list[float] = []
    began = time.perf_counter()
    yield seconds
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - began)


@app.command()
def loop(
    images: Annotated[int, typer.Option(help="Images an epoch; a multiple of 256.")] = 2048,
    rounds: Annotated[int, typer.Option(help="Turns of all loops.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32, tf32, bf16 or fp16, of ours and of the bare loop.")] = "fp32",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network of ours and of the bare loop.")] = False,
    json: Json = False,
) -> None:
    """An epoch of the engine over one of the network alone, and over one of a plain loop."""
    found: dict[str, Any] = {}
    for name, preset in SETUPS.items():
        setup = Setup(preset, images, torch.device(device), precision, compile)
        loops = {"ours": setup.ours, "bare": setup.bare(), "plain": setup.plain()}
        for epoch in loops.values():
            epoch()
        seconds = [{name: epoch() for name, epoch in loops.items()} for _ in range(rounds)]
        found[name] = {
            "images_per_s": images / statistics.median(turn["ours"] for turn in seconds),
            "over_bare": _ratios(seconds, "ours", "bare"),
            "plain_over_ours": _ratios(seconds, "plain", "ours"),
        }
        if not json:
            bare, plain = (_shown(found[name][key]) for key in ("over_bare", "plain_over_ours"))
            typer.echo(f"{name:24} {found[name]['images_per_s']:7.0f} images/s   ours/bare {bare}   plain/ours {plain}")
    if json:
        typer.echo(encoder.dumps(found, indent=2))


@app.command()
def processes(
    preset: Annotated[
        str, typer.Option(help="A preset on the embedded digits, or another one with --data-dir.")
    ] = "digits-cons-0.25",
    sets: Annotated[list[str] | None, typer.Option("--set", help="Settings of the runs.")] = None,
    data_dir: Annotated[Path, typer.Option(help="Folder of the data sets.")] = Path("data"),
    count: Annotated[int, typer.Option(help="Processes, and threads of the one.")] = os.cpu_count() or 2,
    rounds: Annotated[int, typer.Option(help="Turns of both.")] = 3,
    json: Json = False,
) -> None:
    """Images per second of `torchrun --nproc-per-node COUNT`, over those of one process with COUNT threads: last epochs."""
    turns = [
        {"several": _run(preset, sets or [], data_dir, count, 1), "one": _run(preset, sets or [], data_dir, 1, count)}
        for _ in range(rounds)
    ]
    ratios = [turn["several"] / turn["one"] for turn in turns]
    answer = {"turns": turns, "ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    typer.echo(
        encoder.dumps(answer, indent=2)
        if json
        else f"several over one: {_shown((statistics.median(ratios), *ratios))}   {turns}"
    )


@app.command()
def memory(
    micro_batch: Annotated[int, typer.Option(help="Noisy images in one forward.")] = 256,
    copies: Annotated[str, typer.Option(help="The numbers of noisy copies m.")] = "1,4,16",
    json: Json = False,
) -> None:
    """The largest resident memory of two steps of MACER on ResNet-20, batch 256, by m: all at once, and in micro-batches."""
    found = {}
    for m in copies.split(","):
        whole, parts = (_peak(m, size) for size in (None, micro_batch))
        found[m] = {"all at once": whole, "micro-batches": parts}
        if not json:
            typer.echo(f"m = {m:>3}   all at once {whole:7.0f} MiB   in micro-batches of {micro_batch} {parts:7.0f} MiB")
    if json:
        typer.echo(encoder.dumps(found, indent=2))


@app.command(hidden=True)
def two_steps(m: str, micro_batch: str) -> None:
    """Takes two steps of MACER and prints the largest resident memory in MiB."""
    sets = [f"loss.m={m}", *([] if micro_batch == "none" else [f"micro_batch={micro_batch}"])]
    resolved = resolve(preset="cifar10-resnet20-macer-0.5", sets=sets)
    spec = resolved.dataset.spec(Path())
    trainer = Trainer(resolved, spec, random_split(spec, 512), torch.device("cpu"), channels_last=True)
    epoch_seconds(trainer)
    typer.echo(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _peak(m: str, micro_batch: int | None) -> float:
    command = [sys.executable, __file__, "two-steps", m, str(micro_batch or "none")]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _run(preset: str, sets: list[str], data_dir: Path, count: int, threads: int) -> float:
    """Images per second in the last epoch of a run of `count` processes."""
    launch = ["torch.distributed.run", "--nproc-per-node", str(count), "-m", "--"] if count > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", *launch, "rscli", "train", "--preset", preset, "--data-dir", str(data_dir)]
        command += [part for one in sets for part in ("--set", one)] + ["--out", f"{folder}/run", "--quiet"]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        last = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()[-1]
        return float(encoder.loads(last)["images_per_s"])


def _ratios(seconds: list[dict[str, float]], above: str, below: str) -> tuple[float, float, float]:
    """The median, least and largest of the rounds' ratios."""
    ratios = [turn[above] / turn[below] for turn in seconds]
    return statistics.median(ratios), min(ratios), max(ratios)


def _shown(ratios: tuple[float, ...]) -> str:
    return f"{ratios[0]:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


if __name__ == "__main__":
    app()
