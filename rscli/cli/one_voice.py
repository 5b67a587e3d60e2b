"""Of several processes that torchrun, or a cluster's own launcher, started for one command, one says what is wrong.

A wrong option is wrong in each of them, but a file may be missing on one machine alone. So the first one says what it has to
say at once; the others give the launcher time to end them, as torchrun does when the first has failed, and speak only then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from typer import BadParameter
from typer.core import TyperGroup

from rscli.cli.interrupts import Terminated
from rscli.errors import RscliError

SECONDS = 5.0
USAGE = cast(type[Exception], BadParameter.__mro__[2])
"""What typer raises for a command line that it does not understand: the base of all such errors."""


def speaks(error: RscliError) -> bool:
    """Whether this process is to say `error`; waits, if another one may do so. Raises `SystemExit` if it is ended meanwhile."""
    from rscli.runtime.torchrun import is_first

    if is_first() or error.said_by == "this":
        return True
    if error.said_by == "all":
        give_way(error.exit_code)
    return error.said_by == "all"


def give_way(exit_code: int) -> None:
    """Waits for the launcher to end this process, `SECONDS` at most. Raises `SystemExit` with `exit_code` when it does."""
    try:
        time.sleep(SECONDS)
    except Terminated:
        sys.exit(exit_code)


class Application(TyperGroup):
    """The command line, whose wrong use the first process says."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """See click."""
        with _in_turn():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """See click."""
        with _in_turn():
            return super().invoke(ctx)


@contextmanager
def _in_turn() -> Iterator[None]:
    from rscli.runtime.torchrun import is_first

    try:
        yield
    except USAGE as cause:
        if not is_first():
            give_way(getattr(cause, "exit_code", 2))
        raise
