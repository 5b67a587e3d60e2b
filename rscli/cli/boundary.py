"""The one place where errors become messages and exit codes."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from rscli.cli.one_voice import speaks
from rscli.cli.streams import diverted
from rscli.errors import RscliError, Stopped

P = ParamSpec("P")
R = TypeVar("R")

DEBUG = "RSCLI_DEBUG"


def boundary(command: Callable[P, R]) -> Callable[P, R]:
    """Wraps a command: our own errors are printed without a traceback and answered with their exit code.

    So are errors of the operating system. Ctrl-C answers 130.
    Anything else is a defect and keeps its traceback, as does everything with `--debug`.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with diverted():
                return command(*args, **kwargs)
        except RscliError as error:
            if os.environ.get(DEBUG):
                raise
            if speaks(error):
                show(error)
            raise typer.Exit(error.exit_code) from None
        except OSError as cause:  # what no reader or writer below has answered
            if os.environ.get(DEBUG):
                raise
            in_words = translated(cause)
            if speaks(in_words):
                show(in_words)
            raise typer.Exit(in_words.exit_code) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None

    return run


def translated(cause: OSError) -> RscliError:
    """An error of the operating system in words."""
    from rscli.runtime.files import explained

    return explained(cause)


def show(error: RscliError) -> None:
    """Prints an error, and what to do about it, to stderr."""
    from rscli.cli.output import stderr

    console = stderr()
    if isinstance(error, Stopped):  # its message begins with that word
        console.print(error.message, style="yellow")
    else:
        console.print("error:", style="bold red", end=" ")
        console.print(error.message)
    if error.hint:
        console.print(error.hint, style="dim")
