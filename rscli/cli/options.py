"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from rscli.errors import InputError

SETTINGS, DATA, SPEED, SEVERAL = "Settings", "Data", "Device and speed", "Several runs"
"""The panels of `--help`, besides a command's own; what is in none of them comes first."""


def at_most(most: int) -> Callable[[int | None], int | None]:
    """A callback that refuses a number above `most`: as a bound of the option itself it would fill the help."""

    def check(value: int | None) -> int | None:
        if value is not None and value > most:
            raise typer.BadParameter(f"{value} is more than {most}.")
        return value

    return check


DataDir = Annotated[
    Path,
    typer.Option(
        "--data-dir",
        metavar="FOLDER",
        envvar="RSCLI_DATA_DIR",
        help="Folder that holds the data sets.",
        show_default=True,
        readable=False,
        rich_help_panel=DATA,
    ),
]
Download = Annotated[
    bool,
    typer.Option("--download", help="Download the data set if it is missing (where that is possible).", rich_help_panel=DATA),
]
Workers = Annotated[
    int, typer.Option("--workers", metavar="N", min=0, help="Processes that read image files.", rich_help_panel=DATA)
]
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, ...", rich_help_panel=SPEED)
]
ChannelsLast = Annotated[
    bool,
    typer.Option("--channels-last/--contiguous", help="Memory layout of images and convolutions.", rich_help_panel=SPEED),
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision", metavar="NAME", help="fp32, tf32 (CUDA) or bf16; recorded with the result.", rich_help_panel=SPEED
    ),
]
Batch = Annotated[
    int,
    typer.Option(
        "--batch",
        metavar="N",
        min=1,
        callback=at_most(10**6),
        help="Batch size per forward pass; does not change the noise.",
        rich_help_panel=SPEED,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run that was stopped here.")]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one setting; repeatable. Text is taken as written, any other value as TOML, or as yes/no, none, 31,61.",
        rich_help_panel=SETTINGS,
    ),
]


def _run_plugin_files(paths: list[Path] | None) -> list[Path] | None:
    from rscli.cli.streams import diverted
    from rscli.plugin_files import load_plugin_file

    with diverted():
        for path in paths or ():
            load_plugin_file(path)
    return paths


PluginFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        metavar="FILE",
        callback=_run_plugin_files,
        is_eager=True,
        help="Run a Python file that defines plugins, and use them; repeatable.",
        rich_help_panel=SETTINGS,
    ),
]

DATA_DIR = Path("data")
WORKERS = min(4, os.cpu_count() or 1)


def numbers(text: str | None, option: str) -> tuple[float, ...]:
    """The numbers in a comma-separated `text`, increasing. Raises `InputError` naming the `option`."""
    if text is None:
        return ()
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} is {text!r}, but must be numbers separated by commas", f"As in {option} 0.25,0.5") from None
    if any(b <= a for a, b in pairwise(values)) or not all(0 <= v < float("inf") for v in values):
        raise InputError(f"{option} is {text!r}, but must be increasing numbers, 0 or more", f"As in {option} 0,0.25,0.5")
    return values


def fraction(text: str | None, option: str) -> tuple[int, int] | None:
    """`3/16` as (3, 16). Raises `InputError` naming the `option`."""
    if text is None:
        return None
    left, slash, right = text.partition("/")
    if not (slash and left.isdecimal() and right.isdecimal()):
        raise InputError(f"{option} is {text!r}, but must be K/N", f"As in {option} 3/16")
    return int(left), int(right)
