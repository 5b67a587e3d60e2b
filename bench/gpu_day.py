"""Everything that waits for a GPU, in one go: tests, throughput, and as many MNIST models as the time allows.

    python bench/gpu_day.py --data-dir data --hours 2             on a machine with a GPU
    python bench/gpu_day.py --data-dir data --tiny --device cpu   to see that it works, in minutes

Every part writes one small file into --out, and is skipped when that is there: the same command goes on after it was stopped.
Training runs go on from their checkpoints, certification from its rows. A part that fails is noted, and the next one begins.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from rscli.runtime.devices import device_name, environment, pick_device

HERE = Path(__file__).resolve().parent
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
METHODS = ("gaussian", "cons", "stability", "macer", "smoothadv", "smoothadv-cons")
SIGMAS = ("0.5", "0.25", "1.0")


@dataclass(frozen=True)
class Part:
    """A command, and the file of `out` that says that it was done."""

    file: str
    command: list[str]


def parts(out: Path, data_dir: Path, device: str, tiny: bool) -> Iterator[Part]:
    """What there is to do, the most wanted first."""
    python, rscli = sys.executable, [sys.executable, "-m", "rscli"]
    tests = [str(HERE.parent / "tests")] if device == "cuda" else [str(HERE.parent / "tests" / "runtime" / "test_devices.py")]
    yield Part("tests.txt", [python, "-m", "pytest", "-q", *(["-m", "gpu"] if device == "cuda" else []), *tests])
    few = ["--images", "256", "--rounds", "1"] if tiny else ["--images", "16384", "--rounds", "5"]
    for precision in ("fp32",) if tiny else PRECISIONS:
        loop = [python, str(HERE / "train_loop.py"), "loop", "--device", device, "--precision", precision, "--json"]
        yield Part(f"loop-{precision}.json", loop + few)
        if not tiny:
            yield Part(f"loop-{precision}-compiled.json", [*loop, *few, "--compile"])
    networks = ["lenet"] if tiny else ["lenet", "resnet20", "resnet110", "resnet50"]
    seconds = ["--seconds", "0.2", "--rounds", "1"] if tiny else []
    yield Part("certify.json", [python, str(HERE / "certify_gpu.py"), "--networks", *networks, *seconds, "--json"])
    for seed in ("0",) if tiny else ("0", "1", "2"):
        for method in METHODS[:2] if tiny else METHODS:
            for sigma in SIGMAS[:1] if tiny else SIGMAS:
                yield from one_model(out, f"mnist-{method}-{sigma}", seed, data_dir, device, tiny, rscli)


def one_model(out: Path, preset: str, seed: str, data_dir: Path, device: str, tiny: bool, rscli: list[str]) -> Iterator[Part]:
    """Training and certification of one preset; the first 500 test images, with the paper's n and failure probability."""
    run = out / "runs" / preset / f"seed{seed}"
    where = ["--data-dir", str(data_dir), "--device", device, "--resume"]
    short = ["--set", "epochs=1", "--set", "batch=2000"] if tiny else []
    name = f"{preset}-seed{seed}"
    train = [*rscli, "train", "--preset", preset, "--seed", seed, "--out", str(run), *where, *short]
    yield Part(f"{name}-train.txt", train)
    samples = ["--n", "1000", "--max", "5"] if tiny else ["--n", "100000", "--max", "500"]
    result = out / f"{name}.tsv"
    certify = [*rscli, "certify", str(run / "model.safetensors"), "--out", str(result), *where, *samples]
    yield Part(f"{name}-certify.txt", certify)


def perform(part: Part, out: Path, left: float) -> str:
    """Runs one part within `left` seconds; says how it ended. Its output is kept in its file when it succeeded."""
    if (out / part.file).exists():
        return "done before"
    began = time.monotonic()
    try:
        ended = subprocess.run(part.command, capture_output=True, text=True, timeout=left, cwd=HERE.parent)
    except subprocess.TimeoutExpired:
        return "out of time: the same command goes on"
    if ended.returncode:
        return f"failed (exit code {ended.returncode}): {(ended.stderr.strip().splitlines() or ['no word'])[-1]}"
    (out / part.file).write_text(ended.stdout or ended.stderr[-2000:])
    return f"{time.monotonic() - began:.0f} s"


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("gpu-day"),
    data_dir: Annotated[Path, typer.Option(help="Folder of the data sets.")] = Path("data"),
    hours: Annotated[float, typer.Option(help="When to stop.")] = 1.0,
    device: Annotated[str, typer.Option(help="cuda, or cpu to see that it works.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny budgets: figures mean nothing.")] = False,
) -> None:
    """Tests, benchmarks, training and certification on one GPU."""
    found = pick_device(device)
    out, data_dir = out.resolve(), data_dir.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "environment.json").write_text(json.dumps(environment(found), indent=2) + "\n")
    typer.echo(f"{device_name(found)}, torch {torch.__version__}, {hours:g} hours")
    end = time.monotonic() + 3600 * hours
    for part in parts(out, data_dir, device, tiny):
        left = end - time.monotonic()
        if left <= 0:
            typer.echo("out of time: the same command goes on")
            break
        typer.echo(f"{part.file:40} {perform(part, out, left)}")


if __name__ == "__main__":
    typer.run(main)
