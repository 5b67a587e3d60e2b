"""`rscli train`"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rscli.cli import options as opt
from rscli.cli.plans import PlannedRun, check_folders, plan
from rscli.errors import InputError, PluginError, RscliError, Stopped

if TYPE_CHECKING:
    from rscli.runtime.progress import Progress


COST = "Dry run"
"""The panel of what only a dry run takes."""

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
        help="Several seeds, one after the other, as in 0-2 or 0,2,5-7; seed K gets the run folder seedK.",
        rich_help_panel=opt.SEVERAL,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Run folder; of several runs, the folder that holds them.  [default: runs/NAME/seedK]",
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
Autotune = Annotated[
    bool,
    typer.Option(
        "--autotune",
        help="Try a few steps first: which layout is faster and, for a long run, whether compiling helps.",
        rich_help_panel=opt.SPEED,
    ),
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the network with torch.compile.", rich_help_panel=opt.SPEED)]
Profile = Annotated[
    bool,
    typer.Option(
        "--profile",
        help="Write trace.json, a profile of a few steps, for chrome://tracing or ui.perfetto.dev.",
        rich_help_panel=opt.SPEED,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run in the folder; refused if it holds anything that no run wrote.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be done, where every value comes from, and what it costs.")
]
Sweep = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        metavar="KEY=V,V,...",
        help="A run for each value of a setting, one after the other; several make a grid. Values with commas in brackets.",
        rich_help_panel=opt.SEVERAL,
    ),
]
DataLimit = Annotated[
    int | None,
    typer.Option(
        "--data-limit",
        metavar="N",
        min=1,
        help="Train on N images only, the first of every class: for a quick look.",
        rich_help_panel=opt.SETTINGS,
    ),
]
DeviceTflops = Annotated[
    float | None,
    typer.Option(
        "--device-tflops", metavar="X", min=1e-6, help="TFLOP/s of a device, to say how long it takes.", rich_help_panel=COST
    ),
]
Utilization = Annotated[
    float,
    typer.Option(
        "--utilization", metavar="X", min=0.001, max=1, help="Share of --device-tflops reached.", rich_help_panel=COST
    ),
]
Trial = Annotated[
    float | None,
    typer.Option(
        "--trial", metavar="SECONDS", min=0.1, help="Train for so long here, to say how long it takes.", rich_help_panel=COST
    ),
]


def train(
    out: Out = None,
    resume: opt.Resume = False,
    overwrite: Overwrite = False,
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
    sweep: Sweep = None,
    data_limit: DataLimit = None,
    data_dir: opt.DataDir = opt.DATA_DIR,
    download: opt.Download = False,
    workers: opt.Workers = opt.WORKERS,
    device: opt.Device = "auto",
    channels_last: ChannelsLast = None,
    precision: Precision = None,
    micro_batch: MicroBatch = None,
    compile: Compile = False,
    autotune: Autotune = False,
    profile: Profile = False,
    device_tflops: DeviceTflops = None,
    utilization: Utilization = 0.4,
    trial: Trial = None,
) -> None:
    """Train a classifier that can be certified.

    Settings are layered: defaults < --preset < --config < --set < options. A run folder holds the resolved configuration,
    metrics.jsonl, a checkpoint and, at the end, model.safetensors and curves.png. Its name says what was run: the preset,
    and what departs from it.

    Examples:

        rscli train --preset digits-cons-0.25

        rscli train --preset mnist-cons-0.5 --set epochs=5 --set loss.lbd=10 --data-dir data

        rscli train --preset mnist-cons-0.5 --sweep loss.lbd=1,5,10 --seeds 0-2

        rscli train --preset mnist-cons-0.5 --init runs/mnist-cons-0.25/seed0 --set epochs=10

        rscli train --preset imagenet-cons-0.5 --dry-run --device-tflops 312

        torchrun --nproc-per-node 8 -m -- rscli train --preset imagenet-cons-0.5 --precision bf16
    """
    from rscli.cli.output import emit_json, listener
    from rscli.config.run_names import read_seeds, read_sweeps
    from rscli.runtime.progress import Silent
    from rscli.runtime.torchrun import launched
    from rscli.training.train import TrainOptions

    if overwrite and resume:
        raise InputError("--resume and --overwrite are both given", "Go on with the run, or replace it.")
    if autotune and (compile or channels_last is not None):
        raise InputError("--autotune chooses layout and compilation, which are given, too", "Leave one of them out.")
    if not dry_run and (trial is not None or device_tflops is not None):
        raise InputError("--trial and --device-tflops are for the dry run", "Add --dry-run, or leave them out.")
    if seeds is not None and seed is not None:
        raise InputError(f"--seed {seed} and --seeds {seeds} are both given", "Give one of them.")
    several = seeds is not None or bool(sweep)
    runs = plan(
        preset=preset,
        config=config,
        sets=sets or (),
        flags={"limit": data_limit, "precision": precision, "micro_batch": micro_batch, "init": init},
        seeds=[seed] if seeds is None else read_seeds(seeds),
        several=several,
        points=read_sweeps(sweep or ()),
        out=out,
        options=TrainOptions(
            out=out or Path("runs"),
            data_dir=data_dir,
            device=device,
            workers=workers,
            channels_last=channels_last,
            compile=compile,
            autotune=autotune,
            profile=profile,
            resume=resume,
            overwrite=overwrite,
            download=download,
        ),
    )
    first = launched().rank == 0  # of the processes that torchrun started; it speaks for all
    progress = listener(quiet) if first else Silent()
    for note in dict.fromkeys(_notes(runs)):
        progress.note(note)
    if dry_run and not first:
        return
    if dry_run:
        from rscli.cli.dry_run import Pace, show

        show(runs, Pace(device_tflops, utilization, trial), progress, json=json, several=several)
        return
    answers = _train(runs, progress)
    if json and first:
        emit_json({"runs": answers} if several else answers[0])


def _notes(runs: Sequence[PlannedRun]) -> list[str]:
    """What a user should know before runs begin: old names of settings, milestones that never come."""
    from rscli.training.cost import schedule_remark

    remarks = [schedule_remark(run.resolved) for run in runs]
    return [*(note for run in runs for note in run.resolved.notes), *(f"warning: {text}" for text in remarks if text)]


def _train(runs: Sequence[PlannedRun], progress: Progress) -> list[dict[str, Any]]:
    """Trains one after the other; what to answer of each. One that fails does not keep the others from their turn.

    Raises `Stopped` and `InputError` at once, and at the end `RscliError` if some of several failed.
    """
    from rscli.training.train import train

    if len(runs) > 1:
        check_folders(runs)
    answers, failed = [], []
    for run in runs:
        folder = run.options.out
        if len(runs) > 1:
            progress.note(f"{run.label}: {folder}")
        try:
            model = train(run.resolved, run.options, progress)
        except RscliError as error:
            of_one_process = error.said_by == "this"
            if len(runs) == 1 or isinstance(error, InputError | PluginError | Stopped) or of_one_process:
                raise
            failed.append(folder)
            progress.warn(f"{folder} failed: {error}")
            continue
        progress.note(f"model: {model}")
        _picture(folder, progress)
        answers.append({"model": str(model), "folder": str(folder), **({"sweep": run.point} if run.point else {})})
    if failed:
        hint = "`rscli runs` says why; the same command with --resume tries them again."
        failure = RscliError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(map(str, failed))}", hint)
        failure.said_by = "first"
        raise failure
    return answers


def _picture(folder: Path, progress: Progress) -> None:
    """Draws the curves of a finished run into its folder, and on the terminal if there is one; a warning if that fails."""
    from rscli.cli.output import room_for_blocks
    from rscli.report.curves import save_curves, sparklines
    from rscli.report.runs import look
    from rscli.runtime.run_files import RunFiles
    from rscli.runtime.torchrun import launched

    if launched().rank > 0:
        return
    run, files = look(folder), RunFiles(folder)
    drawn = files.curves.exists() and files.curves.stat().st_mtime >= files.model.stat().st_mtime
    if drawn or not run.lines:
        return
    try:
        save_curves({str(folder): run}, files.curves)
    except (RscliError, OSError) as error:
        progress.warn(f"the curves are not drawn: {error}")
    for line in sparklines(run.lines, room_for_blocks()):
        progress.note(line)
