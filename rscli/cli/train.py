"""`rscli train`"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rscli.cli import options as opt
from rscli.errors import InputError

if TYPE_CHECKING:
    from rscli.config.layers import Resolved
    from rscli.runtime.progress import Progress
    from rscli.training.train import TrainOptions

    Run = tuple[Resolved, TrainOptions]


Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="Start from a row of a paper; `rscli presets` lists them.",
        rich_help_panel=opt.SETTINGS,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="TOML file of settings, which override the preset's.",
        readable=False,
        rich_help_panel=opt.SETTINGS,
    ),
]
Init = Annotated[
    str | None,
    typer.Option(
        "--init",
        metavar="FILE",
        help="Start from these weights: a model file, or a checkpoint of other code.",
        rich_help_panel=opt.SETTINGS,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", min=0, help="Seed of everything random.", rich_help_panel=opt.SETTINGS),
]
Seeds = Annotated[
    str | None,
    typer.Option(
        "--seeds",
        metavar="N,N,...",
        help="Several seeds, one after the other, as in 0,1,2; seed K gets the run folder seedK.",
        rich_help_panel=opt.SETTINGS,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Run folder; with --seeds, the folder that holds them.  [default: runs/NAME/seedK]",
        readable=False,
    ),
]
ChannelsLast = Annotated[
    bool | None,
    typer.Option(
        "--channels-last/--contiguous",
        help="Memory layout.  [default: channels-last, where that is safe]",
        rich_help_panel=opt.SPEED,
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="NAME",
        help="fp32, tf32 (CUDA), bf16 or fp16.  [default: as configured, or fp32]",
        rich_help_panel=opt.SPEED,
    ),
]
MicroBatch = Annotated[
    int | None,
    typer.Option(
        "--micro-batch",
        metavar="N",
        min=1,
        help="Most noisy images in one forward pass: less memory, the same gradient.",
        rich_help_panel=opt.SPEED,
    ),
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the network with torch.compile.", rich_help_panel=opt.SPEED)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and where every value comes from.")]


def train(
    out: Out = None,
    resume: opt.Resume = False,
    dry_run: DryRun = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    preset: Preset = None,
    config: Config = None,
    init: Init = None,
    sets: opt.Sets = None,
    _plugin: opt.PluginFiles = None,
    seed: Seed = None,
    seeds: Seeds = None,
    data_dir: opt.DataDir = opt.DATA_DIR,
    download: opt.Download = False,
    workers: opt.Workers = opt.WORKERS,
    device: opt.Device = "auto",
    channels_last: ChannelsLast = None,
    precision: Precision = None,
    micro_batch: MicroBatch = None,
    compile: Compile = False,
) -> None:
    """Train a classifier that can be certified.

    Settings are layered: defaults < --preset < --config < --set < options. A run folder holds the resolved configuration,
    metrics.jsonl, a checkpoint and, at the end, model.safetensors.

    Examples:

        rscli train --preset digits-cons-0.25

        rscli train --preset mnist-cons-0.5 --set epochs=5 --set loss.lbd=10 --data-dir data

        rscli train --preset mnist-cons-0.5 --seeds 0,1,2

        rscli train --preset mnist-cons-0.5 --init runs/mnist-cons-0.25/seed0 --set epochs=10

        rscli train --preset imagenet-cons-0.5 --dry-run

        torchrun --nproc-per-node 8 -m -- rscli train --preset imagenet-cons-0.5 --precision bf16
    """
    from rscli.cli.output import emit_json, listener
    from rscli.config.layers import resolve
    from rscli.runtime.torchrun import launched
    from rscli.training.train import TrainOptions
    from rscli.training.train import train as run

    chosen = _seeds(seeds, seed)
    flags = {"precision": precision, "micro_batch": micro_batch, "init": init}
    every = [resolve(preset=preset, config_file=config, sets=sets or (), flags={**flags, "seed": one}) for one in chosen]
    how = TrainOptions(
        out=out or Path("runs") / _name(every[0], preset),
        data_dir=data_dir,
        device=device,
        workers=workers,
        channels_last=channels_last,
        compile=compile,
        resume=resume,
        download=download,
    )
    alone = out is not None and seeds is None  # --out is the run folder itself
    runs = [(one, how if alone else replace(how, out=how.out / f"seed{one.config.seed}")) for one in every]
    first = launched().rank == 0  # of the processes that torchrun started; it speaks for all
    progress = listener(quiet or not first)
    for note in every[0].notes:
        progress.note(note)
    if dry_run:
        _show_plans(runs, json, progress, several=seeds is not None)
        return
    if len(runs) > 1 and not resume:
        _check_unused(runs)
    answers = []
    for resolved, options in runs:
        if len(runs) > 1:
            progress.note(f"seed {resolved.config.seed}: {options.out}")
        model = run(resolved, options, progress)
        progress.note(f"model: {model}")
        answers.append({"model": str(model), "folder": str(options.out)})
    if json and first:
        emit_json(answers[0] if seeds is None else {"runs": answers})


def _seeds(seeds: str | None, seed: int | None) -> list[int | None]:
    """The seeds of `--seeds 0,1,2`, or the one of --seed (None: as configured). Raises `InputError` if they are wrong."""
    if seeds is None:
        return [seed]
    if seed is not None:
        raise InputError(f"--seed {seed} and --seeds {seeds} are both given", "Give one of them.")
    parts = [part.strip() for part in seeds.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise InputError(f"--seeds is {seeds!r}, but must be distinct whole numbers, 0 or more", "As in --seeds 0,1,2")
    return [int(part) for part in parts]


def _name(resolved: Resolved, preset: str | None) -> str:
    """The name of the folder under runs: the preset's, or what the configuration is mainly about."""
    name = preset or f"{resolved.config.data['name']}-{resolved.config.loss['name']}-{resolved.noise.sigma:g}"
    return name.replace("/", "-").replace(":", "-")


def _check_unused(runs: list[Run]) -> None:
    """Raises `InputError` if one of the folders holds a run: better now than after hours with the seeds before it."""
    from rscli.training.run_folder import RunFolder

    used = [str(how.out) for _, how in runs if RunFolder(how.out).config.exists()]
    if used:
        hint = "Add --resume to continue it, or choose another folder with --out."
        raise InputError(f"there is already a training run in {', '.join(used)}", hint)


def _show_plans(runs: list[Run], json: bool, progress: Progress, *, several: bool) -> None:
    """The dry run: configuration with sources, size of the network, steps, files; several runs differ in seed and files."""
    from rich.table import Table

    from rscli.cli.output import emit_json, stdout
    from rscli.config.settings import dotted, leaves
    from rscli.text import one_line
    from rscli.training.train import outlook

    plans = [outlook(resolved, how) for resolved, how in runs]
    for note in plans[0].notes:
        progress.note(note)
    if json:
        answers = [
            {"config": one.as_dict(), "sources": one.sources, **asdict(plan), "files": [str(file) for file in plan.files]}
            for (one, _), plan in zip(runs, plans, strict=True)
        ]
        emit_json({"runs": answers} if several else answers[0])
        return
    resolved, plan = runs[0][0], plans[0]
    seeds = ", ".join(str(one.config.seed) for one, _ in runs)
    table = Table("setting", "value", "source", box=None, pad_edge=False)
    for path, value in leaves(resolved.as_dict()):
        key = dotted(path)
        shown = (key, seeds if key == "seed" else str(value), resolved.sources.get(key, "default"))
        table.add_row(*map(one_line, shown))
    console = stdout()
    console.print(table)
    images = "unknown until the data set is there" if plan.images is None else f"{plan.images:,}"
    steps = "unknown" if plan.steps_per_epoch is None else f"{plan.steps_per_epoch:,}"
    console.print(f"\nparameters      {plan.parameters:,}", highlight=False)
    console.print(f"training images {images}", highlight=False)
    chunks = f" (each batch in {plan.chunks} chunks, one step each)" if plan.chunks > 1 else ""
    console.print(f"steps per epoch  {steps}{chunks}", highlight=False)
    files = [str(file) for plan in plans for file in plan.files]
    console.print("would write     " + "\n                ".join(files), highlight=False)
