"""The running figures of a certification, and what it came to."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from rscli.api import ABSTAIN
from rscli.results.rows import Row


@dataclass(frozen=True)
class Tally:
    """What a run of certification came to, over all rows of its file.

    Where given radii were decided, `acr` is a `lower_bound`. `abstained` and `certified_accuracy` are at `at_radius`: the
    smallest radius that was decided, else 0.
    """

    out: Path
    images: int
    abstained: int
    certified_accuracy: float
    at_radius: float
    acr: float
    lower_bound: bool
    samples: int
    seconds: float


class Score:
    """The running figures of a run: over all rows of its file."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.images = self.abstained = self.correct = 0
        self.radius = 0.0
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Counts one row."""
        self.images += 1
        self.abstained += row.predict == ABSTAIN
        self.correct += row.correct
        self.radius += row.radius if row.correct else 0.0

    def figures(self, speed: float) -> dict[str, str]:
        """For the eye: abstentions, certified accuracy at the smallest radius that is decided, and samples per second."""
        accuracy = f"{100 * self.correct / self.images:.1f}%" if self.images else "-"
        return {"abstained": str(self.abstained), "certified": accuracy, "samples/s": f"{speed:.0f}"}

    def tally(self, out: Path, radii: Collection[float], samples: int, seconds: float) -> Tally:
        """The figures at the end, of the result `out`, for which `radii` were decided (none: as large ones as possible)."""
        images = max(self.images, 1)
        return Tally(
            out=out,
            images=self.images,
            abstained=self.abstained,
            certified_accuracy=self.correct / images,
            at_radius=min(radii, default=0.0),
            acr=self.radius / images,
            lower_bound=bool(radii),
            samples=samples,
            seconds=seconds,
        )
