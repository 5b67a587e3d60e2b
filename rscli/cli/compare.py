"""`rscli compare`"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rscli.cli import options as opt
from rscli.cli.streams import answers


class Format(StrEnum):
    """How a comparison is written."""

    table = "table"
    markdown = "markdown"
    latex = "latex"
    csv = "csv"
    json = "json"


def compare(
    results: Annotated[
        list[Path],
        typer.Argument(help="Result files, or folders with a results.tsv; the first is the baseline.", readable=False),
    ],
    radii: Annotated[
        str | None,
        typer.Option("--radii", metavar="R,R,...", help="Radii to show besides 0, as in 0.25,0.5.  [default: every 0.25]"),
    ] = None,
    names: Annotated[str | None, typer.Option("--names", metavar="A,B,...", help="Names of the results, one for each.")] = None,
    form: Annotated[
        Format, typer.Option("--format", metavar="NAME", help="table, markdown, latex, csv or json.")
    ] = Format.table,
    json: opt.Json = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Also draw the curves, as .png, .svg or .pdf.", readable=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the tables to a file instead of stdout.", readable=False),
    ] = None,
    allow_different: Annotated[
        bool, typer.Option("--allow-different", help="Compare even if n, alpha, the radii decided or the like differ.")
    ] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Show the published row of its preset beside each result.")
    ] = False,
    reproduces: Annotated[
        str | None,
        typer.Option("--reproduces", metavar="PRESET", help="The preset of results that do not record one."),
    ] = None,
    groups: Annotated[
        bool, typer.Option("--groups/--no-groups", help="Average runs that differ only in their training seed.")
    ] = True,
) -> None:
    """Compare results: ACR and certified accuracy with intervals, and paired tests against the first.

    Reads the result files of rscli and of the field's other tools. Only images that all results share are compared; results
    under different n, alpha or the like are refused. Runs that differ only in their training seed are also shown as mean and
    standard deviation. With --published, each result is set beside the paper's figures, and the difference is held against the
    errors of both.

    Examples:

        rscli compare runs/gaussian runs/consistency --plot curves.svg

        rscli compare a.tsv b.tsv --names Gaussian,Consistency --radii 0.5,1.0 --format latex

        rscli compare runs/mnist-cons-0.5/seed* --published
    """
    from rscli.cli.output import stderr, stdout
    from rscli.errors import InputError
    from rscli.report.groups import grouped
    from rscli.report.plot import check_plot_path, save_plot
    from rscli.report.published import with_published
    from rscli.report.render import print_tables, render
    from rscli.report.summary import compare as compared
    from rscli.results.protocol import protocol_path
    from rscli.results.reader import read_results
    from rscli.runtime.files import write_answer

    form = Format.json if json else form
    if plot is not None:
        check_plot_path(plot)
    read = [read_results(path) for path in results]
    if out is not None and os.path.realpath(out) in [
        os.path.realpath(p) for run in read for p in (run.path, protocol_path(run.path))
    ]:
        raise InputError(f"--out {out} is one of the results, or its protocol", "Choose another file.")
    chosen = names.split(",") if names else ()
    comparison = compared(read, radii=opt.numbers(radii, "--radii"), names=chosen, allow_different=allow_different)
    if groups:
        comparison = grouped(comparison)
    if published or reproduces is not None:
        comparison = with_published(comparison, reproduces)
    for note in comparison.notes:
        stderr().print(f"warning: {note}", style="yellow")
    if plot is not None:
        save_plot(comparison, plot)
    if out is not None:
        write_answer(out, render(comparison, form))
    elif form is Format.table:
        print_tables(comparison, stdout())
    else:
        answers().write(render(comparison, form))
