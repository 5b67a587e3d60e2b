"""The tables of a comparison, as cells of text that know nothing of terminals, Markdown or LaTeX.

Certified accuracies, ACR and intervals are estimates and are rounded to the nearest; radii, and whatever is a lower bound, are
rounded down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from rscli.report.comparison import LEVEL, RHO, Beside, Comparison, Difference, Group, GroupPoint, Point, Summary
from rscli.report.differences import difference_texts
from rscli.smoothing.summary import Tally
from rscli.stats import metrics, paired

UNKNOWN = "–"
_PERCENT = f"{100 * LEVEL:g} %"
_BOUND = " ≥ marks a lower bound: only given radii were decided."


@dataclass(frozen=True)
class Cell:
    """A figure, and what is set smaller beside or below it: its uncertainty."""

    text: str
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """A table: the first `fixed` columns name the row, and are repeated where a narrow page splits the others."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str
    fixed: int = 1


def tables(comparison: Comparison) -> list[Table]:
    """Certified accuracy, of single runs and over seeds; differences to the first run, and to what was published; and what
    the figures rest on. Tables without a row are left out."""
    out = [_accuracy(comparison)]
    if comparison.groups:
        out.append(_groups(comparison))
    if comparison.differences:
        out.append(_differences(comparison))
    if comparison.published:
        out.append(_published(comparison))
    if any(beside.points for beside in comparison.published):
        out.append(_published_accuracy(comparison))
    if comparison.training:
        out.append(_training(comparison))
    return [*out, _protocol(comparison)]


def _training(comparison: Comparison) -> Table:
    texts = difference_texts(comparison.training)
    return Table(
        title="What differs in training",
        header=("model", *next(iter(texts.values()))),
        rows=tuple((Cell(name), *map(Cell, values.values())) for name, values in texts.items()),
        caption=f"Settings in which the runs differ; {UNKNOWN}: the run has no such setting.",
    )


def radius_text(radius: float) -> str:
    """A radius that was asked for: two digits where they are exact, else all of them."""
    return f"{radius:.2f}" if round(radius, 2) == radius else repr(radius)


def acr_text(summary: Summary | Group | Beside | Tally) -> str:
    """ACR with four digits; a lower bound is marked, and rounded down."""
    return f"≥ {metrics.round_down(summary.acr, 4):.4f}" if summary.lower_bound else f"{summary.acr:.4f}"


def _accuracy(comparison: Comparison) -> Table:
    digits = _digits(comparison)
    caption = f"± is the longer side of the {_PERCENT} Clopper-Pearson interval, for the choice of the test images."
    return Table(
        title=f"Certified accuracy (%) by {comparison.norm} radius, {comparison.summaries[0].images:,} images",
        header=("model", "ACR", *map(radius_text, comparison.radii)),
        rows=tuple(
            (Cell(summary.name), Cell(acr_text(summary)), *(_point(point, digits) for point in summary.points))
            for summary in comparison.summaries
        ),
        caption=caption + _BOUND * _bounded(comparison),
        fixed=2,
    )


def _bounded(comparison: Comparison) -> bool:
    """Whether a figure is marked as a lower bound."""
    return any(summary.lower_bound for summary in comparison.summaries)


def _digits(comparison: Comparison) -> int:
    """Decimal digits of a percentage: a second one means nothing with fewer than 1,000 images."""
    return 2 if comparison.summaries[0].images >= 1000 else 1


def _point(point: Point, digits: int) -> Cell:
    side = max(point.high - point.accuracy, point.accuracy - point.low)
    return Cell(_accuracy_text(point, digits), f"±{100 * side:.{digits}f}")


def _accuracy_text(point: Point | GroupPoint, digits: int) -> str:
    """In percent; a lower bound is marked, and rounded down."""
    if not point.lower_bound:
        return f"{100 * point.accuracy:.{digits}f}"
    return f"≥ {100 * metrics.round_down(point.accuracy, digits + 2):.{digits}f}"


def _groups(comparison: Comparison) -> Table:
    digits = _digits(comparison)

    def row(group: Group) -> tuple[Cell, ...]:
        accuracies = (Cell(_accuracy_text(p, digits), f"±{100 * p.accuracy_sd:.{digits}f}") for p in group.points)
        seeds = Cell(f"{len(group.seeds)}", f"({', '.join(map(str, group.seeds))})")
        return (Cell(group.name), seeds, Cell(acr_text(group), f"±{group.acr_sd:.4f}"), *accuracies)

    return Table(
        title=f"Mean over training seeds: certified accuracy (%) by {comparison.norm} radius",
        header=("model", "seeds", "ACR", *map(radius_text, comparison.radii)),
        rows=tuple(row(group) for group in comparison.groups),
        caption="± is the sample standard deviation over the seeds. All runs are on the same images, so it does not include "
        "the choice of images." + _BOUND * _bounded(comparison),
        fixed=3,
    )


def _differences(comparison: Comparison) -> Table:
    images, digits = comparison.summaries[0].images, _digits(comparison)
    caption = f"ACR with its {_PERCENT} paired bootstrap interval; p: exact McNemar test, Holm-adjusted over the radii."
    if _bounded(comparison):
        caption += f" Lower bounds of ACR are compared as they are; {UNKNOWN}: not decided by both."

    def row(difference: Difference) -> tuple[Cell, ...]:
        acr, tests = difference.acr, {test.radius: test for test in difference.tests}
        gain = Cell(_signed(acr.difference, 4), f"[{_signed(acr.low, 4)}, {_signed(acr.high, 4)}]")
        return (Cell(difference.name), gain, *(_test(tests.get(radius), images, digits) for radius in comparison.radii))

    return Table(
        title=f"Difference from {comparison.differences[0].baseline}, paired by image (percentage points)",
        header=("model", "ACR", *map(radius_text, comparison.radii)),
        rows=tuple(row(difference) for difference in comparison.differences),
        caption=caption,
        fixed=2,
    )


def _test(test: paired.RadiusTest | None, images: int, digits: int) -> Cell:
    if test is None:
        return Cell(UNKNOWN)
    points = 100 * (test.only_first - test.only_second) / images
    p = "p <0.001" if test.adjusted < 0.001 else f"p {test.adjusted:.3f}"
    return Cell(_signed(points, digits), p)


def _published(comparison: Comparison) -> Table:
    def row(beside: Beside) -> tuple[Cell, ...]:
        theirs = beside.row
        spread = "" if theirs.acr_sd is None else f"±{theirs.acr_sd:.4f}"
        same = beside.images == beside.shared == theirs.images
        return (
            Cell(beside.name),
            Cell(acr_text(beside)),
            Cell(f"{theirs.acr:.4f}", spread),
            Cell(
                _signed(beside.difference, 4, lower_bound=beside.lower_bound),
                f"±{beside.margin:.4f}" if beside.margin else "",
            ),
            Cell(_verdict(beside), "; ".join(beside.protocol)),
            Cell(f"{beside.images:,}", "" if same else f"{beside.shared:,} of their {theirs.images:,}"),
            Cell(f"{theirs.seeds}"),
            Cell(theirs.setting or UNKNOWN, "; ".join(beside.settings)),
            Cell(theirs.logs_of),
        )

    return Table(
        title="Comparison with the published figures",
        header=("model", "ACR", "published", "difference", "within?", "images", "their seeds", "their setting", "source"),
        rows=tuple(row(beside) for beside in comparison.published),
        caption="The published row of the preset, or the one with the nearest setting. within: the difference is at "
        "most ±, twice its standard deviation, from the seeds of both sides and, where the images differ, from their choice "
        "(as if drawn at random). Below a setting: where ours differs." + _BOUND * _bounded(comparison),
    )


def _verdict(beside: Beside) -> str:
    """Whether the difference is within the errors, or why that cannot be told."""
    if beside.within is not None:
        return "within" if beside.within else "beyond"
    return "other protocol" if beside.protocol else "unknown"


def _published_accuracy(comparison: Comparison) -> Table:
    digits = _digits(comparison)

    def row(beside: Beside) -> tuple[Cell, ...]:
        at = {point.radius: point for point in beside.points}
        cells = (
            Cell(
                f"{100 * at[radius].accuracy:.{digits}f}",
                _signed(100 * at[radius].difference, digits, lower_bound=at[radius].lower_bound),
            )
            if radius in at
            else Cell(UNKNOWN)
            for radius in comparison.radii
        )
        return (Cell(beside.name), *cells)

    return Table(
        title=f"Published certified accuracy (%) by {comparison.norm} radius",
        header=("model", *map(radius_text, comparison.radii)),
        rows=tuple(row(beside) for beside in comparison.published),
        caption="Signed: ours minus theirs, in percentage points. Each is on its own images and under its own protocol."
        + _BOUND * _bounded(comparison),
    )


def _signed(value: float, digits: int, *, lower_bound: bool = False) -> str:
    """With a sign, unless it is 0 as shown; the minus is the character of that name.

    A lower bound is marked, and rounded down; but for what the subtraction of two floats left in the last bits.
    """
    if lower_bound:
        return f"≥ {_signed(math.floor(round(value * 10**digits, 6)) / 10**digits, digits)}"
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def _protocol(comparison: Comparison) -> Table:
    columns: dict[str, Callable[[Summary], str]] = {
        "model": lambda s: s.name,
        "σ": lambda s: _known(s.sigma, "g"),
        "n0": lambda s: _known(s.n0, ","),
        "n": lambda s: _known(s.n, ","),
        "α": lambda s: _known(s.alpha, "g"),
        "abstained": _abstained,
        "saturated": lambda s: _known(s.saturated, ","),
        "largest radius": lambda s: f"{metrics.round_down(s.largest, 3):.3f}",
        "false certificates": lambda s: "" if s.may_be_wrong is None else f"≤ {s.may_be_wrong}",
        "samples": lambda s: _known(s.samples, ","),
        "time": lambda s: "" if s.seconds is None else str(timedelta(seconds=round(s.seconds))),
    }
    return Table(
        title="What the figures rest on",
        header=tuple(columns),
        rows=tuple(tuple(Cell(show(summary) or UNKNOWN) for show in columns.values()) for summary in comparison.summaries),
        caption="saturated: n samples cannot give a larger radius; where only given radii were decided, all of them hold, and "
        "larger ones might. largest radius: of a correct answer. false certificates: at most so many, at confidence "
        f"{1 - RHO:g}. time: the sum over all images.",
    )


def _abstained(summary: Summary) -> str:
    """The abstentions, and their share; an upper bound is marked, and rounded up."""
    if not summary.abstained_upper_bound:
        return f"{summary.abstained:,} ({100 * summary.abstained / summary.images:.1f} %)"
    per_mille = -(-1000 * summary.abstained // summary.images)
    return f"≤ {summary.abstained:,} ({per_mille / 10:.1f} %)"


def _known(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def widths(table: Table) -> Sequence[int]:
    """The characters that each column needs when details stand below their figures."""
    columns = zip(*table.rows, strict=True)
    return [
        max(len(name), *(max(len(cell.text), len(cell.detail)) for cell in cells))
        for name, cells in zip(table.header, columns, strict=True)
    ]
