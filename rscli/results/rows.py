"""Result files: one line per image, append-only while a run lasts, sorted by index when it is finished.

A result file is text, separated by tabs, with a header. Its first six columns are those that the field's tools read (they
come from Cohen et al. 2019); the others are ours, and are missing from files that other tools wrote:

| column | meaning |
|---|---|
| idx, label | index of the image in its split, and its class |
| predict | the certified class, or -1 for an abstention |
| radius | certified radius at full precision, 0 for an abstention |
| correct | 1 if `predict` is `label`, else 0 |
| time | H:MM:SS.ffffff since the row before was decided: images are sampled together, and the times add up to the whole |
| n0, n | samples that selected the class, and samples that certified it |
| count, runner_up | of the n: those of the class under test, and those of the most frequent other class |
| reason | why sampling stopped |
| saturated | 1 if so many samples cannot give a larger radius; where only given radii were decided, if all of them hold |

A `saturated` row of the certifier `sequential` thus has the largest radius that was asked for: a larger one might be proved.

Beside a file `results.tsv` lies `results.tsv.protocol.json`: everything that the rows depend on, and under `info` what they
do not. A line is whole or it does not count: whatever was cut off by a crash is sampled again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rscli.api import ABSTAIN
from rscli.errors import InputError

FIELD_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
COLUMNS = (*FIELD_COLUMNS, "n0", "n", "count", "runner_up", "reason", "saturated")
HEADER = "\t".join(COLUMNS) + "\n"

LARGEST_COUNT = 10**12
"""Above every index, class and number of samples (`--n` ends here), and small enough for sums over all images."""

LARGEST_RADIUS = 1000.0
"""In pixels of [0, 1]: no two colour images of 577x577 are farther apart."""

_TIME = re.compile(r"(?:(\d{1,9}) days?, )?(\d{1,9}):(\d\d):(\d\d(?:\.\d{1,99})?)")

_PLAIN_SECONDS = re.compile(r"\d{1,12}(?:\.\d{0,99})?(?:[eE][+-]?\d{1,2})?")


@dataclass(frozen=True)
class Row:
    """One image. `seconds` is the column `time` (NaN: unknown); what else a foreign file does not say is None."""

    idx: int
    label: int
    predict: int
    radius: float
    correct: bool
    seconds: float
    n0: int | None = None
    n: int | None = None
    count: int | None = None
    runner_up: int | None = None
    reason: str | None = None
    saturated: bool | None = None


def format_row(row: Row) -> str:
    """The line of `row`, with its line feed. The radius is written so that it reads back to the same bits."""
    reason = " ".join((row.reason or "").split())  # a plugin's text must not bring tabs or line feeds
    field = (row.idx, row.label, row.predict, repr(float(row.radius)), int(row.correct), _clock(row.seconds))
    ours = (row.n0, row.n, row.count, row.runner_up, reason, None if row.saturated is None else int(row.saturated))
    return "\t".join("" if cell is None else str(cell) for cell in (*field, *ours)) + "\n"


def parse_row(line: str, columns: Sequence[str] = COLUMNS, *, foreign: bool = False) -> Row:
    """The row of a `line` whose cells are `columns`; of a `foreign` one, the time may be plain seconds, or unknown.

    Raises `ValueError` saying what is wrong with it.
    """
    texts = cells_of(line, len(columns))
    if len(texts) != len(columns):
        raise ValueError(f"it has {len(texts)} columns, not {len(columns)}")
    cells = dict(zip(columns, texts, strict=True))

    def integer(name: str) -> int:
        value = int(_number(cells[name], name, int))
        if abs(value) > LARGEST_COUNT:
            raise ValueError(f"{name} is {cells[name][:40]}, but must be at most {LARGEST_COUNT:,}")
        return value

    def optional(name: str) -> int | None:
        return integer(name) if cells.get(name) else None

    row = Row(
        idx=integer("idx"),
        label=integer("label"),
        predict=integer("predict"),
        radius=_number(cells["radius"], "radius", float),
        correct=_flag(cells["correct"], "correct"),
        seconds=_any_seconds(cells.get("time", "")) if foreign else _seconds(cells.get("time", "")),
        n0=optional("n0"),
        n=optional("n"),
        count=optional("count"),
        runner_up=optional("runner_up"),
        reason=cells.get("reason") or None,
        saturated=_flag(cells["saturated"], "saturated") if cells.get("saturated") else None,
    )
    _check(row)
    return row


def _check(row: Row) -> None:
    """Raises `ValueError` for a row that no certification can have written."""
    if row.idx < 0:
        raise ValueError(f"idx is {row.idx}, but an index is never negative")
    if row.predict < ABSTAIN:
        raise ValueError(f"predict is {row.predict}, but a class is never negative, and an abstention is {ABSTAIN}")
    for name in ("n0", "n", "count", "runner_up"):
        if (getattr(row, name) or 0) < 0:
            raise ValueError(f"{name} is {getattr(row, name)}, but samples are never fewer than 0")
    if not (math.isfinite(row.radius) and row.radius >= 0):
        raise ValueError(f"radius is {row.radius}, but a radius is finite and never negative")
    if row.radius > LARGEST_RADIUS:
        raise ValueError(f"radius is {row.radius}, but no radius in pixels of [0, 1] is above {LARGEST_RADIUS:g}")
    if row.correct != (row.predict == row.label):
        raise ValueError(f"correct is {int(row.correct)}, but predict is {row.predict} and label is {row.label}")
    if row.predict == ABSTAIN and row.radius > 0:
        raise ValueError(f"radius is {row.radius}, but an abstention (predict -1) has radius 0")


def cells_of(line: str, wanted: int) -> list[str]:
    """The stripped cells of a line, without empty ones beyond `wanted` (some tools end their lines with blanks)."""
    cells = [cell.strip() for cell in line.split("\t")]
    while len(cells) > wanted and not cells[-1]:
        cells.pop()
    return cells


def _number(text: str, name: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, but must be a{' whole' if kind is int else ''} number") from None


def _flag(text: str, name: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(f"{name} is {text!r}, but must be 0 or 1")
    return text == "1"


def _clock(seconds: float) -> str:
    whole, micro = divmod(round(seconds * 1e6), 1_000_000)
    minutes, second = divmod(whole, 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}.{micro:06d}"


def _seconds(text: str) -> float:
    """Seconds of H:MM:SS, with or without a fraction, and with the days that Python's timedelta puts in front."""
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(f"time is {text!r}, but must be H:MM:SS, as in 0:00:16.301146, or seconds")
    days, hours, minutes, seconds = found.groups()
    return int(days or 0) * 86_400 + int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def _any_seconds(text: str) -> float:
    """As `_seconds`, and of plain seconds, such as Cohen et al.'s logs have (`15.4`); NaN for none."""
    if not text or text.lower() in ("nan", "none", "-"):
        return math.nan
    if _PLAIN_SECONDS.fullmatch(text):
        return float(text)
    return _seconds(text)


def broken(path: Path, number: int, why: object) -> InputError:
    """The error for line `number` of a result file, and why it is one."""
    return InputError(f"{path}, line {number}: {why}", "Restore the file, or remove that line.")
