"""Results beside the published figures: the nearest row of the same data set, architecture, method and sigma."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from rscli.config.published import PublishedRow
from rscli.registry import installed
from rscli.report.align import grid, undecided
from rscli.report.comparison import Beside, Comparison, PublishedPoint
from rscli.report.recipe import Recipe, recipe, setting_differences
from rscli.report.shelf import Shelf, read_shelf, row_images, variance_share
from rscli.results.reader import Results
from rscli.stats import metrics

PROTOCOL = {"n0": 100, "n": 100_000, "alpha": 0.001}
"""What every published figure rests on, with the usual certifier: CERTIFY with fixed n."""

FACTOR = 2.0
"""A difference is within the errors up to so many times its standard deviation."""


def with_published(comparison: Comparison, preset: str | None = None) -> Comparison:
    """`comparison` with the published row of its preset beside each group and each run; notes say what a reader must know.

    Of several rows of one data set, network, method and sigma it is the one of the nearest setting. `preset` is that of results
    which do not record one.

    Raises `InputError` if a table of published figures that is needed is broken.
    """
    shelf = read_shelf()
    found: list[Beside] = []
    remarks: dict[str, list[str]] = {}
    for name, runs in _results(comparison):
        known = recipe(runs[0], preset)
        row = shelf.nearest(known, runs[0].idx) if isinstance(known, Recipe) else None
        if row is None or isinstance(known, str):
            why = known if isinstance(known, str) else f"none for {known.text}"
            remarks.setdefault(f"no published figures: {why}", []).append(name)
            continue
        beside = _beside(name, runs, row, known, shelf, comparison.radii)
        found.append(beside)
        for text in _remarks(beside):
            remarks.setdefault(text, []).append(name)
    notes = [f"{', '.join(names)}: {text}" for text, names in remarks.items()]
    return replace(comparison, published=tuple(found), notes=(*comparison.notes, *notes))


def _results(comparison: Comparison) -> Iterator[tuple[str, list[Results]]]:
    """Every group, then every run, as a name and the runs behind it."""
    for group in comparison.groups:
        yield group.name, [run for run in comparison.runs if run.name in group.members]
    for run in comparison.runs:
        yield run.name, [run]


def _beside(
    name: str, runs: Sequence[Results], row: PublishedRow, known: Recipe, shelf: Shelf, radii: Sequence[float]
) -> Beside:
    radius = np.mean([run.radius * run.correct for run in runs], axis=0)  # of each image, over the seeds
    acrs = [metrics.acr(run.radius, run.correct) for run in runs]
    accuracy = np.mean([metrics.certified_accuracy(run.radius, run.correct, radii) for run in runs], axis=0)
    bounded = {at for run in runs for at in undecided(run, radii)}
    images, shared = radius.size, int(np.isin(runs[0].idx, row_images(row)).sum())
    acr, spread = metrics.mean_sd(acrs)[0], _spread(acrs, row)
    difference = acr - row.acr
    share = variance_share(images, row.images, shared)
    sampling = math.sqrt(float(radius.var(ddof=1)) * share) if images > 1 else None
    margin = FACTOR * math.hypot(spread or 0.0, sampling or 0.0)
    protocol = _other_protocol(runs[0])
    within = True if abs(difference) <= margin else None if spread is None or sampling is None else False
    return Beside(
        name=name,
        row=row,
        settings=setting_differences(known, row, shelf.schedule(row)),
        protocol=protocol,
        images=images,
        shared=shared,
        acr=acr,
        lower_bound=any(map(grid, runs)),
        difference=difference,
        spread=spread,
        sampling=sampling,
        margin=margin,
        within=None if protocol else within,
        points=tuple(
            PublishedPoint(at, row.certified[at], ours - row.certified[at], at in bounded)
            for at, ours in zip(radii, accuracy.tolist(), strict=True)
            if at in row.certified
        ),
    )


def _spread(acrs: Sequence[float], row: PublishedRow) -> float | None:
    """The standard deviation over seeds of a difference of means; None if neither mean is of two runs."""
    sides = [(len(acrs), metrics.mean_sd(acrs)[1]), (row.seeds, row.acr_sd)]
    squares = [((seeds - 1) * sd**2, seeds - 1) for seeds, sd in sides if sd is not None]
    freedom = sum(free for _, free in squares)
    if not freedom:
        return None
    return math.sqrt(sum(square for square, _ in squares) / freedom * sum(1 / seeds for seeds, _ in sides))


def _other_protocol(run: Results) -> tuple[str, ...]:
    """In what the run was certified otherwise than the published ones were: ACR depends on it."""
    protocol = run.protocol or {}
    texts = [f"{key} {protocol.get(key)}, not {value}" for key, value in PROTOCOL.items() if protocol.get(key) != value]
    certifier, usual = (protocol.get("certifier") or {}).get("name"), installed().default("certifiers")
    if certifier != usual:
        texts.append(f"certifier {certifier}, not {usual}")
    if protocol.get("labels"):
        texts.append("labels given to the certifier")
    if grid(run):
        texts.append("only given radii decided")
    return tuple(texts)


def _remarks(beside: Beside) -> Iterator[str]:
    row = beside.row
    if beside.protocol:
        yield f"certified under another protocol than the published figures, so no verdict: {'; '.join(beside.protocol)}"
    if beside.settings:
        yield f"trained differently from the nearest published row: {'; '.join(beside.settings)}"
    if beside.shared < max(beside.images, row.images):
        yield (
            f"{beside.images:,} images, but the published figures are on {row.images:,} ({beside.shared:,} shared): "
            "the margin allows for that as if the images were drawn at random"
        )
    if beside.spread is None:
        yield "one published run and one of ours, so the spread over seeds is unknown"
