"""`rscli ensemble`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rscli.cli import options as opt
from rscli.cli.certify import model_path


def ensemble(
    models: Annotated[list[Path], typer.Argument(help="Model files, or their run folders.", readable=False)],
    out: Annotated[Path, typer.Option("--out", help="Model file to write.", readable=False)] = Path("ensemble.safetensors"),
    sigma: Annotated[
        float | None, typer.Option("--sigma", help="Noise that it is for, in [0, 1] pixels.  [default: the models']")
    ] = None,
    sets: opt.Sets = None,
    _plugin: opt.PluginFiles = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out.")] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Put models together as one, whose logits are the mean of theirs: a model file that certify and predict read.

    The models must agree in their classes, input shape, test transform and noise. Horváth et al. 2022: ensembles vary less
    under noise, and so certify larger radii. A sample costs as much as one of every model.

    Examples:

        rscli ensemble runs/mnist-cons-0.5/seed0 runs/mnist-cons-0.5/seed1 --out ensemble.safetensors

        rscli ensemble a.safetensors b.safetensors --set arch.average=probabilities
    """
    from rscli.cli.output import emit_json, listener
    from rscli.errors import InputError
    from rscli.models import compose
    from rscli.models.modelfile import card_of, load_model, save_model
    from rscli.models.network import Classifier, parameter_count

    if out.exists() and not force:
        raise InputError(f"{out} is there already", "Choose another --out, or overwrite it with --force.")
    found = compose.ensemble([load_model(model_path(path)) for path in models], _fields(sets or []), sigma=sigma)
    assert isinstance(found.network, Classifier)  # compose makes no other; for mypy
    save_model(out, found.network, card_of(found))
    parameters, progress = parameter_count(found.network), listener(quiet)
    progress.note(f"ensemble of {len(models)}: {parameters:,} parameters, {found.classes} classes, sigma {found.sigma:g}")
    progress.note(f"model: {out}")
    if json:
        card = card_of(found)
        emit_json({"model": str(out), "arch": card.arch, "noise": card.noise, "parameters": parameters, "origin": card.origin})


def _fields(texts: list[str]) -> dict[str, Any]:
    """The fields of the ensemble in `--set arch.KEY=VALUE`. Raises `ConfigError` for any other key."""
    from rscli.config.layers import read_sets
    from rscli.config.settings import Setting, Settings
    from rscli.errors import ConfigError
    from rscli.models.compose import ENSEMBLES
    from rscli.registry import installed

    lower: Settings = {("arch", "name"): Setting(installed().default(ENSEMBLES), "default")}
    chosen, problems = read_sets(texts, lower, {"arch": "architectures"})
    for key in chosen:
        if len(key) != 2 or key[0] != "arch" or key[1] in ("name", "members"):
            problems.append(f"--set {'.'.join(key)} is not a setting of ensemble: it takes arch.KEY=VALUE, but for the members")
    if problems:
        raise ConfigError(problems)
    return {key[1]: setting.value for key, setting in chosen.items()}
