"""Comparisons for programs: CSV and JSON at full precision, whose columns and keys only ever grow."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from io import StringIO
from typing import Any

from rscli.report.summary import LEVEL, RHO, Comparison, Difference, Summary

SCHEMA = 1
"""Rises when a column or key is renamed, removed, or changes its meaning."""


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON values: accuracies and p-values in [0, 1], radii in pixels, times in seconds."""
    return {
        "schema": SCHEMA,
        "radii": list(comparison.radii),
        "level": LEVEL,
        "rho": RHO,
        "results": [asdict(summary) for summary in comparison.summaries],
        "differences": [asdict(difference) for difference in comparison.differences],
        "notes": list(comparison.notes),
    }


def to_json(comparison: Comparison) -> str:
    """`as_json` as text."""
    return json.dumps(as_json(comparison), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(comparison: Comparison) -> str:
    """One line for each run and radius, the run's own figures repeated; empty where nothing is known or compared."""
    page = StringIO()
    differences: dict[str, Difference] = {difference.name: difference for difference in comparison.differences}
    lines = [line for summary in comparison.summaries for line in _lines(summary, differences.get(summary.name))]
    writer = csv.DictWriter(page, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return page.getvalue()


def _lines(summary: Summary, difference: Difference | None) -> list[dict[str, Any]]:
    run = {key: value for key, value in asdict(summary).items() if key != "points"}
    run |= {
        "baseline": difference and difference.baseline,
        "acr_difference": difference and difference.acr.difference,
        "acr_difference_low": difference and difference.acr.low,
        "acr_difference_high": difference and difference.acr.high,
    }
    tests = difference.tests if difference else [None] * len(summary.points)
    return [
        {
            **run,
            **asdict(point),
            "only_this": test and test.only_first,
            "only_baseline": test and test.only_second,
            "p_value": test and test.p_value,
            "p_adjusted": test and test.adjusted,
        }
        for point, test in zip(summary.points, tests, strict=True)
    ]
