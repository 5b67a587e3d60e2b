"""What `rscli train --dry-run` shows: settings and their sources, what the run costs, and whether it would be refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rscli.cli.plans import PlannedRun
from rscli.cli.runs import duration
from rscli.errors import InputError

if TYPE_CHECKING:
    from rscli.runtime.progress import Progress
    from rscli.training.cost import Cost, Trial
    from rscli.training.train import Outlook


@dataclass(frozen=True)
class Pace:
    """On what device a run is imagined: its TFLOP/s, and which share of them a network reaches; or a trial of some seconds."""

    tflops: float | None = None
    utilization: float = 0.4
    trial: float | None = None


@dataclass(frozen=True)
class _Shown:
    """A run and what is to be said of it."""

    run: PlannedRun
    outlook: Outlook
    cost: Cost
    trial: Trial | None
    hours: float | None
    refused: str | None


def show(runs: Sequence[PlannedRun], pace: Pace, progress: Progress, *, json: bool, several: bool) -> None:
    """Prints the dry run: several runs differ in seed, swept settings and files."""
    shown = [_look(run, pace, progress) for run in runs]
    if json:
        from rscli.cli.output import emit_json

        answers = [_as_json(one) for one in shown]
        emit_json({"runs": answers} if several else answers[0])
        return
    _settings(shown)
    _print(_lines(shown, pace))
    for one in shown:
        if one.refused:
            progress.warn(f"the run would be refused: {one.refused}")


def _look(run: PlannedRun, pace: Pace, progress: Progress) -> _Shown:
    from rscli.training.cost import cost_of, trial
    from rscli.training.run_folder import RunFolder
    from rscli.training.train import outlook, record_of

    options = run.options
    seen = outlook(run.resolved, options)
    for note in seen.notes:
        progress.note(note)
    cost = cost_of(run.resolved, options, seen.images)
    tried = None if pace.trial is None else trial(run.resolved, options, pace.trial, progress)
    hours = tried.hours if tried else cost.hours(pace.tflops, pace.utilization) if pace.tflops else None
    refused = None
    try:
        RunFolder(options.out).admit(record_of(run.resolved), resume=options.resume, overwrite=options.overwrite)
    except InputError as error:
        refused = str(error)
    return _Shown(run, seen, cost, tried, hours, refused)


def _as_json(one: _Shown) -> dict[str, Any]:
    from rscli.training.cost import schedule_remark

    resolved = one.run.resolved
    return {
        "config": resolved.as_dict(),
        "sources": resolved.sources,
        **asdict(one.outlook),
        "files": [str(file) for file in one.outlook.files],
        "cost": {**asdict(one.cost), "hours": one.hours, "trial": one.trial and asdict(one.trial)},
        "refused": one.refused,
        "remark": schedule_remark(resolved),
        **({"sweep": one.run.point} if one.run.point else {}),
    }


def _settings(shown: Sequence[_Shown]) -> None:
    """The table of settings; where runs differ, every value."""
    from rich.table import Table

    from rscli.cli.output import stdout
    from rscli.config.settings import dotted, leaves
    from rscli.text import one_line

    flat = [{dotted(path): value for path, value in leaves(one.run.resolved.as_dict())} for one in shown]
    table = Table("setting", "value", "source", box=None, pad_edge=False)
    for key in dict.fromkeys(key for values in flat for key in values):
        values = dict.fromkeys(str(each[key]) for each in flat if key in each)
        source = next(one.run.resolved.sources.get(key, "default") for one in shown if key in one.run.resolved.sources)
        table.add_row(*map(one_line, (key, ", ".join(values), source)))
    stdout().print(table)


def _lines(shown: Sequence[_Shown], pace: Pace) -> list[tuple[str, str]]:
    """The lines below the settings, each with its title."""
    plan, cost = shown[0].outlook, shown[0].cost
    chunks = f" (each batch in {plan.chunks} chunks, a step each)" if plan.chunks > 1 else ""
    steps = "unknown" if plan.steps_per_epoch is None else f"{plan.steps_per_epoch:,}{chunks}"
    files = [str(file) for one in shown for file in one.outlook.files]
    return [
        ("parameters", f"{plan.parameters:,}"),
        ("training images", "unknown until the data are there" if plan.images is None else f"{plan.images:,}"),
        ("steps per epoch", steps),
        *_cost_lines(cost),
        *_time_lines(shown, pace),
        ("would write", ("\n" + " " * WIDTH).join(files)),
    ]


def _cost_lines(cost: Cost) -> list[tuple[str, str]]:
    lines = [("rows per epoch", _rows(cost))]
    if cost.trained_rows is not None:
        lines.append(("rows in all", f"{cost.epochs * cost.trained_rows:,.0f} forward-backward passes in {cost.epochs} epochs"))
    forward = "unknown" if cost.forward_flops is None else f"{quantity(cost.forward_flops)}FLOPs an image"
    whole = "unknown" if cost.training_flops is None else f"{quantity(cost.training_flops)}FLOPs for the whole run"
    return [*lines, ("forward", forward), ("training", whole), ("memory", _memory(cost))]


def _rows(cost: Cost) -> str:
    if cost.trained_rows is None:
        return "unknown until the data are there"
    parts = [f"{cost.trained_rows:,.0f} trained on"]
    if cost.attacked_rows is None:
        return f"{parts[0]}; the attack does not say what it costs"
    parts += [f"{cost.attacked_rows:,.0f} attacked"] if cost.attacked_rows else []
    parts += [f"{cost.forward_rows:,.0f} forward only"] if cost.forward_rows else []
    return ", ".join(parts)


def _memory(cost: Cost) -> str:
    if cost.memory_bytes is None or cost.row_bytes is None or cost.weights_bytes is None:
        return "unknown"
    rows = f"{cost.rows_in_step:,.0f} rows of {size(cost.row_bytes)}"
    return f"at least {size(cost.memory_bytes)} in fp32: weights and optimiser {size(cost.weights_bytes)}, a step keeps {rows}"


def _time_lines(shown: Sequence[_Shown], pace: Pace) -> list[tuple[str, str]]:
    if all(one.hours is None for one in shown):
        return [("time", "--device-tflops or --trial says")]
    known = [one.hours for one in shown if one.hours is not None]
    tried = shown[0].trial
    if tried is not None:
        how = f"at {tried.images_per_s:,.0f} images/s, as in a trial of {tried.seconds:.0f} s, without probes"
    else:
        how = f"if {100 * (pace.utilization):g} % of {pace.tflops:g} TFLOP/s are reached"
    lines = [("time", f"{_hours(known[0])} {how}")]
    return [*lines, ("all runs", _hours(sum(known)))] if len(known) > 1 else lines


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 0.95 else duration(3600 * hours)


WIDTH = 17


def _print(lines: Sequence[tuple[str, str]]) -> None:
    from rscli.cli.output import stdout

    console = stdout()
    console.print("")
    for title, text in lines:
        console.print(f"{title:<{WIDTH}}{text}", highlight=False)


def quantity(value: float) -> str:
    """`4.09 G`, with a prefix of thousands and a blank behind the number."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if value < 999.5:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} Z"


def size(count: float) -> str:
    """Bytes as `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1023.5:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
