"""`rscli predict`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from rscli.cli import options as opt
from rscli.cli.certify import model_path

if TYPE_CHECKING:
    from rscli.smoothing.predict import Prediction


VOTE = "Vote"
"""The panel of `--help` for what an answer rests on."""


def predict(
    model: Annotated[Path, typer.Argument(help="A model file, or its run folder.", readable=False)],
    images: Annotated[
        list[Path], typer.Argument(help="Images, or folders of images, of any common format and size.", readable=False)
    ],
    json: Annotated[bool, typer.Option("--json", help="Print the answers as JSON lines on stdout.")] = False,
    quiet: opt.Quiet = False,
    certify: Annotated[bool, typer.Option("--certify", help="Also give the certified radius.", rich_help_panel=VOTE)] = False,
    n: Annotated[
        int,
        typer.Option(
            "--n",
            metavar="N",
            min=1,
            callback=opt.at_most(10**12),
            help="Monte Carlo samples per image.",
            rich_help_panel=VOTE,
        ),
    ] = 1000,
    n0: Annotated[
        int,
        typer.Option(
            "--n0",
            metavar="N",
            min=1,
            callback=opt.at_most(10**12),
            help="Samples per image that select the class, with --certify.",
            rich_help_panel=VOTE,
        ),
    ] = 100,
    alpha: Annotated[
        float,
        typer.Option("--alpha", metavar="P", help="Failure probability of an answer, at most.", rich_help_panel=VOTE),
    ] = 0.001,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", metavar="N", min=0, callback=opt.at_most(2**63 - 1), help="Seed of the noise.", rich_help_panel=VOTE
        ),
    ] = 0,
    _plugin: opt.PluginFiles = None,
    device: opt.Device = "auto",
    precision: opt.Precision = "fp32",
    batch: opt.Batch = 256,
    channels_last: opt.ChannelsLast = True,
) -> None:
    """Predict images with the smoothed classifier: a class name, or ABSTAIN when the vote is too close.

    The exit code is 1 if an image could not be read; the others are predicted all the same.

    Examples:

        rscli predict model.safetensors photo.jpg folder/

        rscli predict model.safetensors folder/ --certify --n 10000 --json
    """
    from rscli.cli.output import emit_json_line, listener
    from rscli.models.modelfile import load_model
    from rscli.registry import installed
    from rscli.sampling.options import SamplingOptions
    from rscli.smoothing.certify import build_certifier
    from rscli.smoothing.predict import find_images, vote
    from rscli.smoothing.predict import predict as run

    usual = {"name": installed().default("certifiers"), "n": n, "n0": n0, "alpha": alpha}
    rule = build_certifier(usual) if certify else vote(n, alpha)
    progress = listener(quiet)
    loaded, paths = load_model(model_path(model)), find_images(images, progress)
    sampling = SamplingOptions(device=device, batch=batch, precision=precision, channels_last=channels_last, seed=seed)
    found = []
    for prediction in run(loaded, paths, rule, sampling, progress):
        found.append(prediction)
        if json:
            emit_json_line(_plain(prediction, loaded.noise.norm))
    if not json:
        order = {path: position for position, path in enumerate(paths)}
        _show(sorted(found, key=lambda p: order[cast(Path, p.path)]), loaded.noise.norm if certify else None)
    if any(prediction.error for prediction in found):
        raise typer.Exit(1)


def _plain(prediction: Prediction, norm: str) -> dict[str, Any]:
    if prediction.error:
        return {"path": str(prediction.path), "error": prediction.error}
    plain = {"path": str(prediction.path), "class": prediction.name, "label": prediction.label}
    plain |= {"share": prediction.share, "n": prediction.n}
    return plain if prediction.radius is None else plain | {"radius": prediction.radius, "norm": norm}


def _show(predictions: list[Prediction], norm: str | None) -> None:
    from rich.table import Table

    from rscli.cli.output import stderr, stdout
    from rscli.stats.metrics import round_down
    from rscli.text import one_line

    table = Table("image", "class", "share", *([f"{norm} radius"] if norm else []), box=None, pad_edge=False)
    for p in predictions:
        if p.error is None:
            radius = [] if p.radius is None else [f"{round_down(p.radius, 4):.4f}"]
            table.add_row(one_line(str(p.path)), one_line(p.name), f"{100 * p.share:.1f}%", *radius)
    if table.row_count:
        stdout().print(table)
    for p in predictions:
        if p.error is not None:
            stderr().print(f"not predicted: {p.error}", style="red")
