"""The running figures of a certification, and what it came to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rscli.api import ABSTAIN
from rscli.engine.rows import Row


@dataclass(frozen=True)
class Tally:
    """What a run of certification came to, over all rows of its file."""

    out: Path
    images: int
    abstained: int
    certified_accuracy: float
    acr: float
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
        """For the eye: abstentions, certified accuracy at radius 0, and samples a second."""
        accuracy = f"{100 * self.correct / self.images:.1f}%" if self.images else "-"
        return {"abstained": str(self.abstained), "certified": accuracy, "samples/s": f"{speed:.0f}"}

    def tally(self, out: Path, samples: int, seconds: float) -> Tally:
        """The figures at the end."""
        images = max(self.images, 1)
        return Tally(out, self.images, self.abstained, self.correct / images, self.radius / images, samples, seconds)
