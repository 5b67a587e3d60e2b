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


def import_(
    checkpoint: Annotated[Path, typer.Argument(help="A file of torch.save, or a safetensors state dict.", readable=False)],
    dataset: Annotated[str, typer.Option("--dataset", help="What it was trained on; see `rscli plugins`.")],
    sigma: Annotated[float, typer.Option("--sigma", help="Noise it was trained for, in [0, 1] pixels.")],
    arch: Annotated[
        str | None, typer.Option("--arch", help="Architecture; see `rscli plugins`.  [default: as the file says]")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Model file to write.", readable=False)] = Path("model.safetensors"),
    normalization: Annotated[
        str, typer.Option("--normalization", help="auto, dataset (the data set's), or none; what the file holds comes first.")
    ] = "auto",
    ema: Annotated[bool, typer.Option("--ema", help="Take the EMA weights (a moving average), not the plain ones.")] = False,
    prefix: Annotated[str, typer.Option("--prefix", help="Take only the tensors below this, such as student.")] = "",
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", help="Leave out the tensors of this pattern, such as 'criterion.*'; repeatable."),
    ] = None,
    noise: Annotated[str | None, typer.Option("--noise", help="Smoothing distribution.  [default: gaussian]")] = None,
    sets: opt.Sets = None,
    _plugin: opt.PluginFiles = None,
    data_dir: opt.DataDir = opt.DATA_DIR,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out.")] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Import a checkpoint of other code, so that it can be certified: tensors and their description in one model file.

    What a file is, its first bytes say, whatever its suffix. Of plain weights and a moving average (EMA) it takes the plain.
    Reads what the codes of this field publish (arch, state_dict, epoch; names behind module. or 1.), and plain state dicts of
    timm, or of torchvision where timm's network of that name has the same tensors (ResNet, ResNeXt, DenseNet). The field's
    names of architectures are known: lenet, resnet50, cifar_resnet20, cifar_resnet110, cifar_densenet40. Code inside a file is
    never run. Says which normalisation it assumed.

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
