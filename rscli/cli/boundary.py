"""The one place where errors become messages and exit codes."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from rscli.errors import RscliError, Stopped

P = ParamSpec("P")
R = TypeVar("R")

DEBUG = "RSCLI_DEBUG"


def boundary(command: Callable[P, R]) -> Callable[P, R]:
    """Wraps a command: our own errors are printed without a traceback and answered with their exit code.

    Ctrl-C answers 130, a closed pipe 0 (as `head` expects). Anything else is a defect and keeps its traceback, as does
    everything with `--debug`.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except RscliError as error:
            if os.environ.get(DEBUG):
                raise
            _show(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None

    return run


def _show(error: RscliError) -> None:
    from rscli.cli.output import stderr

    console = stderr()
    word, style = ("stopped", "yellow") if isinstance(error, Stopped) else ("error", "red")
    console.print(f"{word}:", style=f"bold {style}", end=" ")
    console.print(error.message, markup=False)
    if error.hint:
        console.print(error.hint, style="dim", markup=False)
