"""Everything that was published, and which row of it a result is to be held against."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rscli.config.presets import Preset, list_presets, load_preset, published_rows
from rscli.config.published import PublishedRow
from rscli.errors import InputError
from rscli.report.recipe import Recipe, schedule

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUBSETS = "published_mnist_subsets.csv"
"""A table beside presets: published results on the first 500 and on the first 1,000 test images."""


@dataclass(frozen=True)
class Shelf:
    """Published rows, and the presets that are to reproduce one of them."""

    rows: tuple[PublishedRow, ...]
    presets: tuple[Preset, ...]

    def nearest(self, recipe: Recipe, idx: NDArray[np.int64]) -> PublishedRow | None:
        """The row for a result on the images `idx` (images,): same data set, architecture, method and sigma; None without one.

        Of several, the one with the nearest setting (rows that tell none come last); then one that a preset reproduces; then
        the one on images most like these, which are the very same if there is such a row; then the one of most seeds.
        """

        def key(row: PublishedRow) -> tuple[bool, float, bool, float, int]:
            shared = int(np.isin(idx, row_images(row)).sum())
            share = variance_share(idx.size, row.images, shared)
            return not row.setting, recipe.distance(row), self._preset(row) is None, share, -row.seeds

        return min((row for row in self.rows if recipe.fits(row)), key=key, default=None)

    def schedule(self, row: PublishedRow) -> dict[str, Any]:
        """Epochs, batch, optimiser and the like of the preset that reproduces `row`, by dotted key; empty without one."""
        preset = self._preset(row)
        return {} if preset is None else schedule(preset.settings)

    def _preset(self, row: PublishedRow) -> Preset | None:
        key = row.key
        return next((preset for preset in self.presets if preset.header.published == key), None)


def read_shelf() -> Shelf:
    """All rows that lie beside presets. Raises `InputError` if the table of the first MNIST images is broken."""
    presets = tuple(load_preset(info.name) for info in list_presets() if info.problem is None)
    folders = {preset.path.parent for preset in presets}
    rows = published_rows()
    return Shelf((*rows, *(row for folder in sorted(folders) for row in read_subsets(folder / SUBSETS, rows))), presets)


def row_images(row: PublishedRow) -> NDArray[np.int64]:
    """The indices (images,) of the test images that `row` is about."""
    return np.arange(row.images, dtype=np.int64) * row.stride


def variance_share(ours: int, theirs: int, shared: int) -> float:
    """The variance of a difference of means over `ours` and `theirs` images, `shared` of them the same, for a variance of 1.

    The images are taken as drawn at random, and an image's radius as the same on both sides: 0 on the same images.
    """
    return max(0.0, 1 / ours + 1 / theirs - 2 * shared / (ours * theirs))


def read_subsets(path: Path, whole: Iterable[PublishedRow]) -> list[PublishedRow]:
    """The rows of a table of the first MNIST images, as rows of their own; none if there is no such file.

    The names of the sources come from the rows of `whole` with the same repository. Raises `InputError` if it is broken.
    """
    names = {row.repository: row.logs_of for row in whole}
    try:
        return [row for fields in _lines(path) for row in (_first(fields, 500, names), _first(fields, 1000, names))]
    except (KeyError, OSError, TypeError, ValueError) as cause:
        raise InputError(
            f"the table {path} is broken: {type(cause).__name__}: {cause}", "Update the package that ships it."
        ) from cause


@cache
def _lines(path: Path) -> tuple[dict[str, str], ...]:
    if not path.is_file():
        return ()
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def _first(fields: Mapping[str, str], images: int, names: Mapping[str, str]) -> PublishedRow:
    """One line's figures on the first `images` test images; certified accuracies are there for the first 500 only."""
    sd = fields[f"sd_first{images}"]
    return PublishedRow(
        dataset=fields["dataset"],
        arch=fields["arch"],
        method=fields["method"],
        sigma=float(fields["sigma"]),
        setting=fields["setting"],
        seeds=int(fields["seeds"]),
        acr=float(fields[f"acr_first{images}"]),
        acr_sd=float(sd) if sd else None,
        images=images,
        stride=1,
        certified={float(name[6:]): float(value) for name, value in fields.items() if name.startswith(f"ca{images}_")},
        logs_of=names.get(fields["repository"], fields["repository"]),
        repository=fields["repository"],
    )
