"""The errors that a user can act on.

The command line catches `RscliError` and its subclasses in one place (`rscli.cli.boundary`) and prints the message and the
hint, without a traceback. Every other exception is a defect of the program and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

MOST_TOLD = 25
"""Problems that are told one by one; a file may have thousands."""


def reason(error: BaseException) -> str:
    """An exception of somebody else's in a line of at most some 500 characters: its type, and what it says, if it can."""
    try:
        text = " ".join(str(error).split())[:500]
    except Exception:  # its own __str__ fails
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def did_you_mean(near: Iterable[str], otherwise: str = "") -> str:
    """A hint for a name that is unknown: the names `near` to it, if there are any, and then what else helps."""
    names = " or ".join(repr(name) for name in near)
    return " ".join(filter(None, [names and f"Did you mean {names}?", otherwise]))


class RscliError(Exception):
    """Something that the user can fix.

    `message` states the value and the rule it breaks; `hint` says what to do next. `exit_code` is what the process answers.
    """

    exit_code = 1
    said_by: Literal["all", "first", "this"] = "all"
    """Which of several processes says it: each that has it, unless the first has already ended the others with it; the first
    alone, since all have it; or this one, at once, since the others end without a word.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n{self.hint}"


class InputError(RscliError):
    """A wrong option, a wrong value, or a file that is missing, broken or of another kind (exit code 2)."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration that does not fit the schema; `problems` holds one line for every wrong key."""

    def __init__(self, problems: list[str], hint: str | None = None) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        rest = [f"  and {len(problems) - MOST_TOLD} more"] if len(problems) > MOST_TOLD else []
        told = [f"  {problem}" for problem in problems[:MOST_TOLD]]
        super().__init__("\n".join([f"the configuration has {count}:", *told, *rest]), hint)


class PluginError(RscliError):
    """A plugin that is unknown, ambiguous, fails to load, or breaks its contract.

    Asking for a plugin that does not exist is wrong input (exit code 2); `exit_code` is 2 for all of them, since the fix is
    always in what the user installed or named.
    """

    exit_code = 2


class Stopped(RscliError):
    """A run that was told to stop, saved its state, and can be resumed (75 for SIGTERM, 130 for Ctrl-C).

    The message begins with "stopped", and is shown without a word in front.
    """

    def __init__(self, message: str, hint: str | None = None, *, exit_code: int = 75) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code
