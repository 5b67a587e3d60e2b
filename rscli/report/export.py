"""Comparisons for programs: CSV and JSON at full precision, whose columns and keys only ever grow."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from io import StringIO
from typing import Any

from rscli.config.run_names import settings_text
from rscli.report.comparison import LEVEL, RHO, Beside, Comparison, Difference, Group, GroupPoint, Point, Summary
from rscli.stats import paired
from rscli.text import one_line

SCHEMA = 1
"""Rises when a column or key is renamed, removed, or changes its meaning."""


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON values: accuracies and p-values in [0, 1], radii in pixels, times in seconds."""
    return {
        "schema": SCHEMA,
        "radii": list(comparison.radii),
        "norm": comparison.norm,
        "level": LEVEL,
        "rho": RHO,
        "results": [asdict(summary) for summary in comparison.summaries],
        "differences": [asdict(difference) for difference in comparison.differences],
        "notes": list(comparison.notes),
        "groups": [asdict(group) for group in comparison.groups],
        "training": comparison.training,
        "published": [asdict(beside) for beside in comparison.published],
    }


def to_json(comparison: Comparison) -> str:
    """`as_json` as text, in ASCII: any stream and file can take it, whatever the names of the results."""
    return json.dumps(as_json(comparison), indent=2, allow_nan=False) + "\n"


def to_csv(comparison: Comparison) -> str:
    """One line for each run and radius, then for each group and radius, the run's own figures repeated.

    Cells are empty where nothing is known or compared. `seeds` says how many runs a line averages.
    """
    page = StringIO()
    differences: dict[str, Difference] = {difference.name: difference for difference in comparison.differences}
    lines = [line for summary in comparison.summaries for line in _lines(summary, differences.get(summary.name))]
    lines += [{**dict.fromkeys(lines[0]), **line} for group in comparison.groups for line in _group_lines(group)]
    published = {beside.name: beside for beside in comparison.published}
    lines = [{**line, **_published(published.get(line["name"]), line["radius"])} for line in lines]
    lines = [{**line, "training": settings_text(comparison.training.get(line["name"], {})) or None} for line in lines]
    writer = csv.DictWriter(page, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([{column: _cell(value) for column, value in line.items()} for line in lines])
    return page.getvalue()


def _cell(value: Any) -> Any:
    """`value` as a cell. Text that a spreadsheet would run as a formula gets an apostrophe in front (OWASP, CSV injection)."""
    if not isinstance(value, str):
        return value
    text = one_line(value)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


def _lines(summary: Summary, difference: Difference | None) -> list[dict[str, Any]]:
    run = {key: value for key, value in asdict(summary).items() if key != "points"}
    run |= {
        "baseline": difference and difference.baseline,
        "acr_difference": difference and difference.acr.difference,
        "acr_difference_low": difference and difference.acr.low,
        "acr_difference_high": difference and difference.acr.high,
    }
    tests = {test.radius: test for test in difference.tests} if difference else {}
    return [
        {
            **run,
            **_point(point),
            **_test(tests.get(point.radius)),
            "seeds": 1,
            "acr_sd": None,
            "accuracy_sd": None,
        }
        for point in summary.points
    ]


def _point(point: Point | GroupPoint) -> dict[str, Any]:
    """Its columns: beside those of a run, `lower_bound` needs another name."""
    columns = asdict(point)
    columns["accuracy_lower_bound"] = columns.pop("lower_bound")
    return columns


def _test(test: paired.RadiusTest | None) -> dict[str, Any]:
    return {
        "only_this": test and test.only_first,
        "only_baseline": test and test.only_second,
        "p_value": test and test.p_value,
        "p_adjusted": test and test.adjusted,
    }


def _group_lines(group: Group) -> list[dict[str, Any]]:
    run = {"name": group.name, "acr": group.acr, "acr_sd": group.acr_sd, "lower_bound": group.lower_bound}
    return [{**run, "seeds": len(group.seeds), **_point(point)} for point in group.points]


def _published(beside: Beside | None, radius: float) -> dict[str, Any]:
    """The published row beside a run or group, and its certified accuracy at `radius`."""
    row = beside and beside.row
    point = next((point for point in beside.points if point.radius == radius), None) if beside else None
    return {
        "published_source": row and row.logs_of,
        "published_setting": row and row.setting,
        "published_seeds": row and row.seeds,
        "published_images": row and row.images,
        "published_acr": row and row.acr,
        "published_acr_sd": row and row.acr_sd,
        "published_difference": beside and beside.difference,
        "published_margin": beside and beside.margin,
        "published_within": beside and beside.within,
        "published_other_setting": beside and "; ".join(beside.settings),
        "published_other_protocol": beside and "; ".join(beside.protocol),
        "published_accuracy": point and point.accuracy,
        "published_accuracy_difference": point and point.difference,
    }
