"""The console script: what surrounds every command line. The commands themselves are in `rscli.cli.commands`.

Nothing slow is imported above: `main` is to hear Ctrl-C before the rest of the program is read.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from typing import Any

from rscli import distributions
from rscli.cli import interrupts, streams
from rscli.errors import RscliError


def main() -> None:
    """Runs the command line and exits: with the command's code, or with that of a signal or a stream that does not work."""
    with interrupts.heard():
        streams.secure()
        faulthandler.enable(2)  # a crash in native code says in which signal it ended, and where
        distributions.leave_out_broken()
        from rscli.cli import boundary
        from rscli.cli.commands import app
        from rscli.cli.one_voice import speaks

        try:
            try:
                app()
            finally:
                sys.stdout.flush()  # here a full disk can still be reported; when the interpreter ends it could not
        except (RscliError, OSError) as cause:  # from outside the commands: --help, --version, --plugin, and the flush
            if os.environ.get(boundary.DEBUG):
                raise
            error = boundary.translated(cause) if isinstance(cause, OSError) else cause
            if speaks(error):
                boundary.show(error)
            sys.exit(error.exit_code)


def __getattr__(name: str) -> Any:
    """`app`, the application, which is imported when somebody asks for it."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rscli.cli.commands import app

    return app
