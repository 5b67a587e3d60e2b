"""The application: which commands there are. Each command is a file of its own, and imports what it needs when it runs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from rscli import __version__
from rscli.cli import boundary
from rscli.cli.certify import certify
from rscli.cli.compare import compare
from rscli.cli.doctor import doctor
from rscli.cli.ensemble import ensemble
from rscli.cli.import_ import import_
from rscli.cli.one_voice import Application
from rscli.cli.plugins import plugins
from rscli.cli.predict import predict
from rscli.cli.presets import presets
from rscli.cli.runs import runs
from rscli.cli.train import train

app = typer.Typer(
    name="rscli",
    cls=Application,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"rscli {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
) -> None:
    """Certified robustness by randomized smoothing: train, certify, predict and compare smoothed classifiers.

    Start with `rscli presets`, then `rscli train --preset digits-cons-0.25`.
    """
    if debug:
        os.environ[boundary.DEBUG] = "1"


for command in (train, runs, certify, predict, compare, ensemble, doctor):
    app.command()(boundary.boundary(command))
app.command("import")(boundary.boundary(import_))
app.add_typer(plugins, name="plugins")
app.add_typer(presets, name="presets")
