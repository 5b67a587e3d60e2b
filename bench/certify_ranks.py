"""Several ranks against one process on the same processors: the same result file? And how many samples per second?

    python bench/certify_ranks.py                                     # LeNet with random weights, on scikit-learn's digits
    python bench/certify_ranks.py MODEL --data-dir data --images 20 --n 100000

Both ways run `rscli certify` as a user would, in turn (A B A B ...): one process with K threads, and torchrun with K ranks of
one thread each. Samples per second are those that each run reports, from the first batch to the finished file; the whole time
includes Python's and torch's start. Ratios are medians of each round's ratio. The files must be equal in all columns but the
time; the batch size is given, as another one may change the last bits of the network's output.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch

from rscli.api import Architecture, Dataset
from rscli.config.layers import resolve
from rscli.models.modelfile import save_model
from rscli.models.network import build_classifier
from rscli.registry import installed
from rscli.runtime.devices import device_name, pick_device
from rscli.training.model_card import model_card

PRESET = "digits-gaussian-0.25"
"""Whose untrained network is certified when no model is given: weights do not matter for the speed of a fixed n."""


@dataclass(frozen=True)
class Run:
    """One run: its samples, its seconds of sampling, and its whole time."""

    samples: int
    seconds: float
    whole: float

    @property
    def speed(self) -> float:
        """Samples per second, start-up excluded."""
        return self.samples / self.seconds


def untrained(folder: Path) -> Path:
    """A model file of the network of `PRESET` with random weights."""
    resolved = resolve(preset=PRESET)
    sections = resolved.as_dict()
    spec = cast(Dataset, installed().build("datasets", sections["data"])).spec(Path())
    torch.manual_seed(0)
    classifier = build_classifier(cast(Architecture, installed().build("architectures", sections["arch"])), spec)
    save_model(folder / "model.safetensors", classifier, model_card(resolved, spec, {}))
    return folder / "model.safetensors"


def run(start: list[str], arguments: list[str], threads: int, out: Path) -> Run:
    """Runs `rscli certify` in a process started by `start`, to the result file `out`."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", *start, "certify", *arguments, "--out", str(out), "--json", "--quiet"]
    begun = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    whole = time.perf_counter() - begun
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed with exit code {done.returncode}")
    tally = max(documents(done.stdout), key=lambda one: one["images"])  # the first rank's is of all images
    return Run(tally["samples"], tally["seconds"], whole)


def documents(text: str) -> Iterator[dict[str, Any]]:
    """The JSON documents in `text`, one behind the other."""
    while text := text.lstrip():
        found, end = json.JSONDecoder().raw_decode(text)
        yield found
        text = text[end:]


def rows(path: Path) -> list[list[str]]:
    """The cells of a result file, without the column `time`."""
    cells = [line.split("\t") for line in path.read_text().splitlines()]
    place = cells[0].index("time")
    return [row[:place] + row[place + 1 :] for row in cells]


def compare(model: Path, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures; every round's files are compared with those of the first run."""
    count = arguments.ranks
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "--", "rscli"]
    ways = {"one process": (["rscli"], count), f"{count} ranks": (torchrun, 1)}
    options = [str(model), "--n", str(arguments.n), "--max", str(arguments.images), "--skip", str(arguments.skip)]
    options += ["--batch", str(arguments.batch), "--device", arguments.device, "--data-dir", str(arguments.data_dir)]
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    found = []
    for number in range(arguments.rounds):
        for name, (start, threads) in ways.items():
            out = folder / f"{name.replace(' ', '-')}-{number}.tsv"
            runs[name].append(run(start, options, threads, out))
            found.append(rows(out))
    one, several = runs.values()
    return {
        "images": len(found[0]) - 1,
        "same_rows": all(each == found[0] for each in found),
        "samples_per_second": {name: median(each.speed for each in values) for name, values in runs.items()},
        "whole_seconds": {name: median(each.whole for each in values) for name, values in runs.items()},
        "ratio": median(b.speed / a.speed for a, b in zip(one, several, strict=True)),
        "whole_ratio": median(a.whole / b.whole for a, b in zip(one, several, strict=True)),
        "runs": {name: [asdict(each) for each in values] for name, values in runs.items()},
    }


def show(report: dict[str, Any]) -> None:
    """Prints the figures."""
    for name, speed in report["samples_per_second"].items():
        print(f"  {name:12} {speed:12,.0f} samples/s, {report['whole_seconds'][name]:8.1f} s with start-up")
    print(f"  ranks / one process: {report['ratio']:.2f} in samples/s, {report['whole_ratio']:.2f} in whole time")
    print(f"  {report['images']} rows, all files equal but for the time: {'yes' if report['same_rows'] else 'NO'}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="default: LeNet with random weights, on digits")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--skip", type=int, default=1)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=2, help="and threads of the one process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measures and prints; exit code 1 if the files differ."""
    arguments = parse()
    with tempfile.TemporaryDirectory() as name:
        report = compare(arguments.model or untrained(Path(name)), arguments, Path(name))
    report = {"device": device_name(pick_device(arguments.device)), "ranks": arguments.ranks, **report}
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print(report["device"])
        show(report)
    raise SystemExit(0 if report["same_rows"] else 1)


if __name__ == "__main__":
    main()
