"""`rscli predict`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rscli.cli import options as opt
from rscli.cli.certify import model_path

if TYPE_CHECKING:
    from rscli.smoothing.predict import Prediction


def predict(
    model: Annotated[Path, typer.Argument(help="A model file, or its run folder.", readable=False)],
    images: Annotated[
        list[Path], typer.Argument(help="Images, or folders of images, of any common format and size.", readable=False)
    ],
    n: Annotated[int, typer.Option("--n", min=1, help="Samples an image.")] = 1000,
    n0: Annotated[int, typer.Option("--n0", min=1, help="Selection samples an image, with --certify.")] = 100,
    alpha: Annotated[float, typer.Option("--alpha", help="Probability that an answer is wrong, at most.")] = 0.001,
    certify: Annotated[bool, typer.Option("--certify", help="Also give the certified radius.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the noise.")] = 0,
    device: opt.Device = "auto",
    batch: opt.Batch = 256,
    precision: opt.Precision = "fp32",
    channels_last: opt.ChannelsLast = True,
    json: Annotated[bool, typer.Option("--json", help="Answer with JSON lines on stdout.")] = False,
    quiet: opt.Quiet = False,
) -> None:
    """Predict images with the smoothed classifier: a class name, or ABSTAIN when the vote is too close.

    Exit code 1 if an image could not be read; the others are predicted all the same.

    Examples:

        rscli predict model.safetensors photo.jpg folder/

        rscli predict model.safetensors folder/ --certify --n 10000 --json
    """
    from rscli.cli.output import emit_json_line, listener
    from rscli.models.modelfile import load_model
    from rscli.sampling.options import SamplingOptions
    from rscli.smoothing.certify import build_certifier
    from rscli.smoothing.predict import find_images, vote
    from rscli.smoothing.predict import predict as run

    rule = build_certifier({"name": "cohen", "n": n, "n0": n0, "alpha": alpha}) if certify else vote(n, alpha)
    loaded, paths = load_model(model_path(model)), find_images(images)
    sampling = SamplingOptions(device=device, batch=batch, precision=precision, channels_last=channels_last, seed=seed)
    found = []
    for prediction in run(loaded, paths, rule, sampling, listener(quiet)):
        found.append(prediction)
        if json:
            emit_json_line(_plain(prediction))
    if not json:
        order = {path: position for position, path in enumerate(paths)}
        _show(sorted(found, key=lambda p: order[p.path]), certify)
    if any(prediction.error for prediction in found):
        raise typer.Exit(1)


def _plain(prediction: Prediction) -> dict[str, Any]:
    if prediction.error:
        return {"path": str(prediction.path), "error": prediction.error}
    plain = {"path": str(prediction.path), "class": prediction.name, "label": prediction.label}
    plain |= {"share": prediction.share, "n": prediction.n}
    return plain if prediction.radius is None else plain | {"radius": prediction.radius}


def _show(predictions: list[Prediction], certify: bool) -> None:
    from rich.table import Table

    from rscli.cli.output import cell, stderr, stdout
    from rscli.stats.metrics import round_down

    table = Table("image", "class", "share", *(["radius"] if certify else []), box=None, pad_edge=False)
    for p in predictions:
        if p.error is None:
            radius = [] if p.radius is None else [f"{round_down(p.radius, 4):.4f}"]
            table.add_row(cell(str(p.path)), cell(p.name), f"{100 * p.share:.1f}%", *radius)
    if table.row_count:
        stdout().print(table)
    for p in predictions:
        if p.error is not None:
            stderr().print(f"not predicted: {p.error}", style="red")
