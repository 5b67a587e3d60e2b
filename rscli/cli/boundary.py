"""The one place where errors become messages and exit codes."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from rscli.errors import RscliError, Stopped
from rscli.system import system_error

P = ParamSpec("P")
R = TypeVar("R")

DEBUG = "RSCLI_DEBUG"


def boundary(command: Callable[P, R]) -> Callable[P, R]:
    """Wraps a command: our own errors are printed without a traceback and answered with their exit code.

    So is what the operating system refuses, wherever that was (`rscli.system`). Ctrl-C answers 130. Anything else is a defect
    and keeps its traceback, as does everything with `--debug`.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (RscliError, OSError) as error:
            known = in_words(error)
            if known is None or os.environ.get(DEBUG):
                raise
            show(known)
            raise typer.Exit(known.exit_code) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None

    return run


def in_words(error: RscliError | OSError) -> RscliError | None:
    """An error of ours; one of the system as one of ours; None for an `OSError` that is not the system's, but a library's."""
    if isinstance(error, RscliError):
        return error
    return None if error.errno is None else system_error(error)


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
