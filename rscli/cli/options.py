"""Options that several commands share."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from rscli.errors import InputError

DataDir = Annotated[
    Path,
    typer.Option(
        "--data-dir", envvar="RSCLI_DATA_DIR", help="Folder that holds the data sets.", show_default=True, readable=False
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps, ...")]
Download = Annotated[bool, typer.Option("--download", help="Fetch a data set that is missing, if it can be fetched.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that was stopped here.")]
Json = Annotated[bool, typer.Option("--json", help="Answer with JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one setting; repeatable. A setting of text takes the text, any other TOML, or yes/no, none, 31,61.",
    ),
]
ChannelsLast = Annotated[bool, typer.Option("--channels-last/--contiguous", help="Memory layout of images and convolutions.")]
Precision = Annotated[str, typer.Option("--precision", help="fp32, tf32 (CUDA) or bf16; recorded with the result.")]
Batch = Annotated[int, typer.Option("--batch", min=1, max=10**6, help="Batch size per forward pass; the noise stays the same.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that read image files.")]


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
        help="A Python file with plugins of your own: it is run; may be given many times.",
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
        raise InputError(f"{option} is {text!r}, but must increase and not be negative", f"As in {option} 0,0.25,0.5")
    return values


def fraction(text: str | None, option: str) -> tuple[int, int] | None:
    """`3/16` as (3, 16). Raises `InputError` naming the `option`."""
    if text is None:
        return None
    left, slash, right = text.partition("/")
    if not (slash and left.isdecimal() and right.isdecimal()):
        raise InputError(f"{option} is {text!r}, but must be K/N", f"As in {option} 3/16")
    return int(left), int(right)
