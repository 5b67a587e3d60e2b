"""Several seeds: runs that differ in their training seed alone, as mean and standard deviation."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from rscli.config.layers import as_now, decisive
from rscli.report.comparison import Comparison, Group, GroupPoint, Point, Summary
from rscli.results.reader import Results
from rscli.stats import metrics

TRAINING = ("data", "arch", "loss", "attack", "config")
"""What a protocol's `info` tells of the training. Its other entries are about the machine and the order of the work."""


def grouped(comparison: Comparison) -> Comparison:
    """`comparison` with its groups: two runs or more whose protocols tell the training seed, and are equal in all else.

    Equal: everything that the rows depend on but the model itself, and of `info` what it tells of the training. Runs
    without a protocol are in no group; runs that share a seed are not averaged, which a note says.
    """
    alike: dict[str, list[int]] = {}
    for place, run in enumerate(comparison.runs):
        if (kind := _kind(run)) is not None:
            alike.setdefault(kind, []).append(place)
    groups: list[Group] = []
    notes = []
    for places in alike.values():
        runs = [comparison.runs[place] for place in places]
        if len({_seed(run) for run in runs}) < len(runs):
            notes.append(f"not averaged, since two have the same training seed: {', '.join(run.name for run in runs)}")
        elif len(runs) > 1:
            taken = {run.name for run in comparison.runs} | {group.name for group in groups}
            groups.append(_group(_name(runs, taken), runs, [comparison.summaries[place] for place in places]))
    return replace(comparison, groups=tuple(groups), notes=(*comparison.notes, *notes))


def _info(run: Results) -> dict[str, Any]:
    return (run.protocol or {}).get("info") or {}


def _seed(run: Results) -> int | None:
    return _info(run).get("train_seed")


def _kind(run: Results) -> str | None:
    """What the runs of one group have in common, as text; None if the training seed is unknown."""
    if run.protocol is None or _seed(run) is None:
        return None
    certified = {key: value for key, value in run.protocol.items() if key not in ("format", "sha256", "info", "model_sha256")}
    trained = {key: _info(run).get(key) for key in TRAINING}
    config = trained["config"] and decisive(as_now(trained["config"]))  # runs of older versions have fewer settings
    trained["config"] = {key: value for key, value in (config or {}).items() if key != "seed"}
    return json.dumps([certified, trained], sort_keys=True)


def _group(name: str, runs: Sequence[Results], summaries: Sequence[Summary]) -> Group:
    acr, acr_sd = _mean_sd([summary.acr for summary in summaries])
    points = zip(*(summary.points for summary in summaries), strict=True)
    return Group(
        name=name,
        members=tuple(run.name for run in runs),
        seeds=tuple(int(_info(run)["train_seed"]) for run in runs),
        acr=acr,
        acr_sd=acr_sd,
        lower_bound=any(summary.lower_bound for summary in summaries),
        points=tuple(map(_point, points)),
    )


def _point(same: Sequence[Point]) -> GroupPoint:
    mean, sd = _mean_sd([point.accuracy for point in same])
    return GroupPoint(same[0].radius, mean, sd, any(point.lower_bound for point in same))


def _mean_sd(values: Sequence[float]) -> tuple[float, float]:
    mean, sd = metrics.mean_sd(values)
    return mean, sd or 0.0


def _name(runs: Sequence[Results], taken: set[str]) -> str:
    """The name that the runs share but for the seed behind it (`cons/seed0`, `cons-run1`, `cons2`), or else the folder that
    holds them all; if that is taken, their names in a row."""
    stems = {re.sub(r"[\W_]*(seed|run)?\d+$", "", run.name) for run in runs}
    parents = zip(*(run.path.resolve().parent.parts[1:] for run in runs), strict=False)
    folders = [same[0] for same in takewhile(lambda same: len(set(same)) == 1, parents)]
    candidates = [*(stems if len(stems) == 1 else ()), *folders[-1:]]
    return next((name for name in candidates if name and name not in taken), " + ".join(run.name for run in runs))
