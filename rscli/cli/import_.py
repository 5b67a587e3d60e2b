"""`rscli import`"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rscli.cli import options as opt
from rscli.cli.certify import model_path

if TYPE_CHECKING:
    from rscli.models.importing.convert import Imported


WEIGHTS = "Weights"
"""The panel of `--help` for which tensors are taken."""


def import_(
    checkpoint: Annotated[
        Path, typer.Argument(help="A file of torch.save, or a state dict in safetensors format.", readable=False)
    ],
    dataset: Annotated[
        str, typer.Option("--dataset", metavar="NAME", help="Data set it was trained on; `rscli plugins` lists them.")
    ],
    sigma: Annotated[float, typer.Option("--sigma", metavar="S", help="Noise it was trained with, in [0, 1] pixels.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Model file to write.", readable=False)] = Path(
        "model.safetensors"
    ),
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out.")] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            metavar="NAME",
            help="Architecture; `rscli plugins` lists them.  [default: what the file says]",
            rich_help_panel=opt.SETTINGS,
        ),
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option(
            "--noise",
            metavar="NAME",
            help="Smoothing distribution.  [default: gaussian]",
            rich_help_panel=opt.SETTINGS,
        ),
    ] = None,
    sets: opt.Sets = None,
    _plugin: opt.PluginFiles = None,
    normalization: Annotated[
        str,
        typer.Option(
            "--normalization",
            metavar="NAME",
            help="auto, dataset (the data set's) or none; constants that the file holds take precedence.",
            rich_help_panel=WEIGHTS,
        ),
    ] = "auto",
    ema: Annotated[
        bool,
        typer.Option(
            "--ema", help="Import the EMA weights (moving average) instead of the plain ones.", rich_help_panel=WEIGHTS
        ),
    ] = False,
    prefix: Annotated[
        str,
        typer.Option(
            "--prefix",
            metavar="NAME",
            help="Import only the tensors below this prefix, such as student.",
            rich_help_panel=WEIGHTS,
        ),
    ] = "",
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore",
            metavar="PATTERN",
            help="Leave out the tensors that match a pattern, such as 'criterion.*'; repeatable.",
            rich_help_panel=WEIGHTS,
        ),
    ] = None,
    data_dir: opt.DataDir = opt.DATA_DIR,
) -> None:
    """Import a checkpoint of other code, so that it can be certified: its tensors and what describes them, in one model file.

    Reads what the code of this field publishes (arch, state_dict, epoch; names prefixed with module. or 1.), plain state dicts
    of timm, and those of torchvision where timm's network of that name has the same tensors (ResNet, ResNeXt, DenseNet). The
    format is told by the first bytes, not by the suffix. Known names of architectures: lenet, resnet50, cifar_resnet20,
    cifar_resnet110, cifar_densenet40. If a file holds both plain and EMA weights, the plain ones are imported. Code inside a
    file is never run. The normalisation that was assumed is reported.

    Examples:

        rscli import checkpoint.pth.tar --dataset cifar10 --sigma 0.5

        rscli import lightning.ckpt --arch timm/resnet18 --dataset cifar10 --sigma 0.5 --ignore 'criterion.*'

        rscli import weights.pth --arch cifar-resnet --set arch.depth=110 --dataset cifar10 --sigma 0.5 --normalization none

        rscli import resnet18.safetensors --arch timm/resnet18 --dataset imagefolder --set data.path=photos --sigma 0.25
    """
    from rscli.cli.output import emit_json, listener
    from rscli.models.importing.convert import ImportOptions, import_checkpoint

    progress = listener(quiet)
    found = import_checkpoint(
        ImportOptions(
            checkpoint=checkpoint,
            out=model_path(out),
            dataset=dataset,
            sigma=sigma,
            data_dir=data_dir,
            arch=arch,
            noise=noise,
            normalization=normalization,
            sets=tuple(sets or ()),
            force=force,
            ema=ema,
            prefix=prefix,
            ignore=tuple(ignore or ()),
        ),
        progress,
    )
    progress.note(_line(found))
    progress.note(f"model: {found.model}")
    if json:
        emit_json(asdict(found))


def _line(found: Imported) -> str:
    epochs = "" if found.epochs is None else f", {found.epochs} epochs"
    return f"imported {found.arch['name']}: {found.parameters:,} parameters, {found.classes} classes{epochs}"
