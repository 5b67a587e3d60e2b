"""Reads tables of published figures: a CSV file with one row per setting, beside the presets that reproduce it."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rscli.config.schema import PublishedKey
from rscli.errors import InputError


@dataclass(frozen=True)
class PublishedRow:
    """A published result: mean ACR over `seeds` runs, and certified accuracy by radius ([0, 1] pixels), on `images` images.

    The images are every `stride`-th of the test split; `acr_sd` is the standard deviation over seeds, None for a single run.
    """

    dataset: str
    arch: str
    method: str
    sigma: float
    setting: str
    seeds: int
    acr: float
    acr_sd: float | None
    images: int
    stride: int
    certified: dict[float, float]
    logs_of: str
    repository: str

    @property
    def key(self) -> PublishedKey:
        """What picks this row."""
        return PublishedKey(dataset=self.dataset, arch=self.arch, method=self.method, sigma=self.sigma, setting=self.setting)


@cache
def read_table(path: Path) -> tuple[PublishedRow, ...]:
    """The rows of a table of published figures; none if there is no such file. Raises `InputError` if it is broken."""
    if not path.is_file():
        return ()
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return tuple(_row(fields) for fields in csv.DictReader(file))
    except (KeyError, OSError, TypeError, ValueError) as cause:
        raise InputError(
            f"the table {path} is broken: {type(cause).__name__}: {cause}", "Update the package that ships it."
        ) from cause


def _row(fields: dict[str, str]) -> PublishedRow:
    return PublishedRow(
        dataset=fields["dataset"],
        arch=fields["arch"],
        method=fields["method"],
        sigma=float(fields["sigma"]),
        setting=fields["setting"],
        seeds=int(fields["seeds"]),
        acr=float(fields["acr"]),
        acr_sd=float(fields["acr_sd"]) if fields["acr_sd"] else None,
        images=int(fields["images"]),
        stride=int(fields["stride"]),
        certified={float(name[3:]): float(value) for name, value in fields.items() if name.startswith("ca_")},
        logs_of=fields["logs_of"],
        repository=fields["repository"],
    )
