"""What results come to: ACR, certified accuracy and its uncertainty, and paired differences between runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rscli.api import ABSTAIN
from rscli.report.align import align, grid, undecided
from rscli.report.comparison import LEVEL, RHO, Comparison, Difference, Point, Summary
from rscli.report.differences import training_differences
from rscli.results.reader import Results
from rscli.stats import metrics, paired

STEP = 0.25
"""Distance of the radii that are shown unless others are asked for: the field's tables have these."""


def compare(
    results: Sequence[Results], *, radii: Sequence[float] = (), names: Sequence[str] = (), allow_different: bool = False
) -> Comparison:
    """Aligns `results` and summarises each; every further run is compared with the first, on the images that all have.

    `radii` are increasing and >= 0; 0 is always added. Without them: those that the certifier was asked for, or every 0.25
    up to the largest radius that any run certifies. What a certifier was not asked for, 0 included, is a lower bound, is said
    to be one, and is not tested. Raises `InputError` for results that do not fit together (see `align`).
    """
    aligned = align(results, names=names, allow_different=allow_different)
    first, *others = aligned.runs
    chosen = tuple(sorted({0.0, *map(float, radii)})) if radii else _default_radii(aligned.runs)
    return Comparison(
        radii=chosen,
        runs=aligned.runs,
        summaries=tuple(summarise(run, chosen) for run in aligned.runs),
        differences=tuple(_difference(run, first, chosen) for run in others),
        notes=(*aligned.notes, *_between(aligned.runs, chosen)),
        training=training_differences(aligned.runs),
    )


def summarise(run: Results, radii: Sequence[float]) -> Summary:
    """The figures of one run at `radii` (increasing, >= 0)."""
    protocol = run.protocol or {}
    images, alpha = run.idx.size, protocol.get("alpha")
    samples = None if run.n is None or run.n0 is None else int(run.n.sum() + run.n0.sum())
    return Summary(
        name=run.name,
        path=str(run.path),
        images=images,
        sigma=protocol.get("sigma"),
        n0=protocol.get("n0"),
        n=protocol.get("n"),
        alpha=alpha,
        certifier=(protocol.get("certifier") or {}).get("name"),
        norm=protocol.get("norm") or "L2",
        acr=metrics.acr(run.radius, run.correct),
        lower_bound=bool(grid(run)),
        largest=float(run.radius.max(initial=0, where=run.correct)),
        points=tuple(_points(run, radii)),
        abstained=int((run.predict == ABSTAIN).sum()),
        abstained_upper_bound=bool(undecided(run, [0.0])),
        saturated=None if run.saturated is None else int(run.saturated.sum()),
        samples=samples,
        seconds=None if np.isnan(run.seconds).any() else float(run.seconds.sum()),
        may_be_wrong=None if alpha is None else metrics.wrong_certificates(images, alpha, RHO),
    )


def _points(run: Results, radii: Sequence[float]) -> list[Point]:
    images, bounded = run.idx.size, undecided(run, radii)
    shares = metrics.certified_accuracy(run.radius, run.correct, radii)
    counts = [round(share * images) for share in shares.tolist()]
    return [
        Point(radius, count, count / images, *metrics.certified_interval(count, images, LEVEL), lower_bound=radius in bounded)
        for radius, count in zip(radii, counts, strict=True)
    ]


def _default_radii(runs: Sequence[Results]) -> tuple[float, ...]:
    asked = {radius for run in runs for radius in grid(run)}
    if asked:
        return tuple(sorted({0.0, *asked}))
    largest = max(float(run.radius.max(initial=0, where=run.correct)) for run in runs)
    return tuple((np.arange(int(largest / STEP) + 1) * STEP).tolist())


def _between(runs: Sequence[Results], radii: Sequence[float]) -> list[str]:
    """A note for each run whose certifier was not asked for some of the radii shown."""
    notes = []
    for run in runs:
        if unasked := undecided(run, radii):
            text = ", ".join(map(repr, unasked))
            more = ", and its abstentions are an upper bound" if 0 in unasked else ""
            notes.append(f"{run.name} did not decide the radius {text}: its certified accuracy there is a lower bound{more}")
    return notes


def _difference(run: Results, baseline: Results, radii: Sequence[float]) -> Difference:
    bounded = {*undecided(run, radii), *undecided(baseline, radii)}
    columns = (run.radius, run.correct, baseline.radius, baseline.correct)
    return Difference(
        name=run.name,
        baseline=baseline.name,
        acr=paired.compare_acr(*columns, level=LEVEL),
        tests=tuple(paired.compare_radii(*columns, [radius for radius in radii if radius not in bounded])),
    )
