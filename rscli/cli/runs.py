"""`rscli runs`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rscli.cli import options as opt

if TYPE_CHECKING:
    from rscli.report.runs import RunState


def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders with run folders somewhere below, or run folders.  [default: runs]", readable=False),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the runs to a .png, .svg or .pdf.", readable=False)] = None,
    json: opt.Json = False,
) -> None:
    """List runs: how far each is, whether somebody works on it, why it ended, and its figures.

    The figures are those of the last epoch: loss, accuracy under noise, certified accuracy if a probe measures it, images a
    second, and the time that is left.

    Examples:

        rscli runs

        rscli runs runs/mnist-cons-0.5 --plot curves.png

        rscli runs runs --json
    """
    from rscli.cli.output import emit_json
    from rscli.report.runs import find_runs

    roots = folders or [Path("runs")]
    found = find_runs(roots)
    named = dict(zip(_names([run.path for run in found], roots), found, strict=True))
    if plot is not None:
        from rscli.report.curves import save_curves  # which brings torch

        save_curves(named, plot)
    if json:
        emit_json({"runs": [{"name": name, **run.as_json()} for name, run in named.items()]})
    else:
        _show(named, roots)


def _names(paths: list[Path], roots: list[Path]) -> list[str]:
    """Paths below the one root that was named, or as they are; the root itself by its own name."""
    if len(roots) > 1:
        return [str(path) for path in paths]
    return [str(path.relative_to(roots[0])) if path != roots[0] else path.resolve().name for path in paths]


def _show(named: dict[str, RunState], roots: list[Path]) -> None:
    from rich.table import Table

    from rscli.cli.output import say, stdout
    from rscli.text import one_line

    if not named:
        say(f"no runs below {', '.join(map(str, roots))}")
        return
    rows = {name: _cells(run) for name, run in named.items()}
    shown = [column for column in COLUMNS if any(row[column] for row in rows.values())]
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for column in shown:
        table.add_column(column, overflow="fold", justify="left" if column in ("state", "note") else "right")
    for name, row in rows.items():
        table.add_row(one_line(name), *(one_line(row[column]) for column in shown))
    stdout().print(table)


COLUMNS = ("state", "epochs", "loss", "accuracy", "certified", "images/s", "left", "note")


def _cells(run: RunState) -> dict[str, str]:
    """The columns of a line; empty where nothing is known."""
    done = "?" if run.epochs is None else str(run.epochs)
    certified = ", ".join(f"{100 * value:.1f}% at {radius}" for radius, value in run.certified.items())
    return {
        "state": run.state,
        "epochs": "" if run.all_epochs is None else f"{done}/{run.all_epochs}",
        "loss": "" if run.loss is None else f"{run.loss:.4f}",
        "accuracy": "" if run.accuracy is None else f"{100 * run.accuracy:.1f}%",
        "certified": certified,
        "images/s": "" if run.images_per_s is None else f"{run.images_per_s:,.0f}",
        "left": "" if run.seconds_left is None else duration(run.seconds_left),
        "note": run.why or "",
    }


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`: two units at most."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"
