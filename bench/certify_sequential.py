"""What the sequential certifier saves on a trained model: whole-run time against the reference procedure with fixed n.

    python bench/certify_sequential.py MODEL --data-dir data --images 1000 --fixed fixed.tsv

The reference (see reference.py) is timed on a few images, with n0 + n samples each, and scaled to all of them. Our runs are
those of `rscli certify --certifier sequential --labels`, from opening the model to the finished result file, the trial of batch
sizes and the computation of boundaries included (a cache folder of its own keeps the boundaries from run to run of one
benchmark; the first pays). With --fixed, a result of `rscli certify` with fixed n of the same model, the certified accuracies
of both are compared on the images that both have.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from reference import sample_counts, seconds

from rscli.api import Dataset
from rscli.data.splits import open_split
from rscli.models.modelfile import card_of, load_model
from rscli.registry import installed
from rscli.results.reader import Results, read_results
from rscli.runtime.devices import device_name, pick_device, precision_scope
from rscli.runtime.progress import Silent
from rscli.sampling.options import SamplingOptions
from rscli.smoothing.certify import CertifyOptions, certify

STEP = 0.25
TABLES: dict[str, tuple[float, ...]] = {
    "0.5": (0.5,),
    "1.0": (1.0,),
    "1.5": (1.5,),
    "0 to 1.5": tuple(STEP * step for step in range(7)),
    "0 to 1.75": tuple(STEP * step for step in range(8)),
}
"""The radii of each run."""


def reference_seconds(options: CertifyOptions, images: int) -> float:
    """Seconds an image of the usual way, the mean of the first `images` of the run."""
    device, model = pick_device(options.sampling.device), load_model(options.model)
    card = card_of(model)
    dataset = cast(Dataset, installed().build("datasets", card.data))
    split = open_split(dataset, card.spec, options.split, options.data_dir)
    classifier = model.network.to(device).eval()
    samples, classes = options.certifier["n0"] + options.certifier["n"], model.classes

    def work() -> None:
        for place in range(images):
            image = split.image(options.start + place * options.skip).to(device)
            sample_counts(classifier, image, samples, model.noise.sigma, classes)

    with precision_scope("fp32", device):
        return seconds(work) / images


def run(options: CertifyOptions, radii: tuple[float, ...], folder: Path) -> tuple[float, int, Results]:
    """One sequential run: its whole time, its samples, and its result."""
    out = folder / f"{'-'.join(map(str, radii))}.tsv"
    tallies = []
    spent = seconds(lambda: tallies.append(certify(replace(options, radii=radii, out=out), Silent())))
    return spent, tallies[0].samples, read_results(out)


def accuracies(results: Results, radius: float, images: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """The certified accuracy at `radius`, in percent, on `images` (indices)."""
    here = np.isin(results.idx, images)
    return float(100 * np.mean(results.correct[here] & (results.radius[here] >= radius)))


def agreement(ours: Results, fixed: Results, radii: tuple[float, ...]) -> dict[str, dict[str, float]]:
    """At each radius, the certified accuracy of both on their common images."""
    common = np.intersect1d(ours.idx, fixed.idx)
    return {
        str(radius): {
            "images": len(common),
            "ours": accuracies(ours, radius, common),
            "fixed": accuracies(fixed, radius, common),
        }
        for radius in radii
    }


def show(name: str, found: dict[str, Any]) -> None:
    """Prints one run."""
    print(
        f"radii {name:10} {found['seconds']:9.1f} s, {found['samples_per_image']:10,.1f} samples/image, "
        f"{found['samples_per_second']:9,.0f} samples/s: {found['time_ratio']:7.1f} times less time than the reference"
    )
    for radius, row in found.get("accuracy", {}).items():
        print(
            f"    r = {radius:5} certified accuracy {row['ours']:6.2f} % (fixed n {row['fixed']:6.2f} %, "
            f"difference {row['ours'] - row['fixed']:+.2f}) on {row['images']} images"
        )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--skip", type=int, default=1)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--n0", type=int, default=100)
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--reference-images", type=int, default=10)
    parser.add_argument("--fixed", type=Path, help="a result with fixed n of the same model and split")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measures and prints."""
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    options = CertifyOptions(
        model=arguments.model / "model.safetensors" if arguments.model.is_dir() else arguments.model,
        out=Path(),
        data_dir=arguments.data_dir,
        certifier={"name": "sequential", "n": arguments.n, "n0": arguments.n0, "alpha": arguments.alpha},
        skip=arguments.skip,
        max=arguments.images,
        labels=True,
        sampling=SamplingOptions(arguments.device, precision=arguments.precision),
    )
    fixed = None if arguments.fixed is None else read_results(arguments.fixed)
    each = reference_seconds(options, arguments.reference_images)
    report: dict[str, Any] = {
        "device": device_name(pick_device(arguments.device)),
        "reference_seconds_per_image": each,
        "runs": {},
    }
    if not arguments.json:
        print(f"reference: {each:.2f} s an image (of {arguments.reference_images}, n = {arguments.n:,}; the rest is scaled)")
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.tables:
            spent, samples, results = run(options, TABLES[name], Path(folder))
            images = len(results.idx)
            found: dict[str, Any] = {
                "images": images,
                "seconds": spent,
                "samples_per_image": samples / images,
                "samples_per_second": samples / spent,
                "time_ratio": each * images / spent,
            }
            if fixed is not None:
                found["accuracy"] = agreement(results, fixed, TABLES[name])
            report["runs"][name] = found
            if not arguments.json:
                show(name, found)
    if arguments.json:
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
