"""`rscli train`"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rscli.cli import options as opt

if TYPE_CHECKING:
    from rscli.config.layers import Resolved
    from rscli.engine.train import TrainOptions


def train(
    preset: Annotated[str | None, typer.Option("--preset", help="Start from a row of a paper: see `rscli presets`.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A TOML file of settings, above the preset.")] = None,
    sets: opt.Sets = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of everything random.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder.  [default: runs/NAME/seedK]")] = None,
    data_dir: opt.DataDir = opt.DATA_DIR,
    device: opt.Device = "auto",
    channels_last: opt.ChannelsLast = True,
    workers: opt.Workers = opt.WORKERS,
    download: opt.Download = False,
    resume: opt.Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, with the source of every value.")
    ] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Train a classifier that can be certified.

    Settings are layered: defaults < --preset < --config < --set < options. A run folder holds the resolved configuration,
    metrics.jsonl, a checkpoint and, at the end, model.safetensors.

    Examples:

        rscli train --preset digits-cons-0.25

        rscli train --preset mnist-cons-0.5 --set epochs=5 --set loss.lbd=10 --data-dir data

        rscli train --preset imagenet-cons-0.5 --dry-run
    """
    from rscli.cli.output import emit_json, listener
    from rscli.config.layers import resolve
    from rscli.engine.train import TrainOptions
    from rscli.engine.train import train as run

    flags = {} if seed is None else {"seed": seed}
    resolved = resolve(preset=preset, config_file=config, sets=sets or (), flags=flags)
    name = preset or f"{resolved.config.data['name']}-{resolved.config.loss['name']}-{resolved.noise.sigma:g}"
    folder = out or Path("runs") / name.replace("/", "-").replace(":", "-") / f"seed{resolved.config.seed}"
    how = TrainOptions(
        out=folder,
        data_dir=data_dir,
        device=device,
        workers=workers,
        channels_last=channels_last,
        resume=resume,
        download=download,
    )
    if dry_run:
        _show_plan(resolved, how, json)
        return
    progress = listener(quiet)
    model = run(resolved, how, progress)
    progress.note(f"model: {model}")
    if json:
        emit_json({"model": str(model), "folder": str(folder)})


def _show_plan(resolved: Resolved, how: TrainOptions, json: bool) -> None:
    """The dry run: configuration with sources, size of the network, steps, files."""
    from rich.table import Table

    from rscli.cli.output import emit_json, stdout
    from rscli.engine.train import outlook

    plan = outlook(resolved, how)
    if json:
        plain = {key: value for key, value in asdict(plan).items() if key != "files"}
        emit_json({"config": resolved.as_dict(), "sources": resolved.sources, **plain, "files": [str(f) for f in plan.files]})
        return
    table = Table("setting", "value", "source", box=None, pad_edge=False)
    for key, value in leaves(resolved.as_dict()):
        table.add_row(key, str(value), resolved.sources.get(key, "default"))
    console = stdout()
    console.print(table)
    images = "unknown until the data are there" if plan.images is None else f"{plan.images:,}"
    steps = "unknown" if plan.steps_an_epoch is None else f"{plan.steps_an_epoch:,}"
    console.print(f"\nparameters      {plan.parameters:,}", highlight=False)
    console.print(f"training images {images}", highlight=False)
    chunks = f" (each batch in {plan.chunks} chunks, a step each)" if plan.chunks > 1 else ""
    console.print(f"steps an epoch  {steps}{chunks}", highlight=False)
    console.print("would write     " + "\n                ".join(str(f) for f in plan.files), highlight=False, markup=False)


def leaves(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested dictionaries as (dotted key, value)."""
    found: list[tuple[str, Any]] = []
    for key, item in value.items():
        if isinstance(item, dict) and item:
            found += leaves(item, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", item))
    return found
