"""The functions behind `import rscli`: the same objects that the commands print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rscli.report.comparison import Comparison
from rscli.report.summary import compare as _compare
from rscli.results.reader import Results
from rscli.results.reader import read_results as _read_results
from rscli.smoothing.classifier import SmoothedClassifier


def load(path: Path | str) -> SmoothedClassifier:
    """The smoothed classifier in a model file or run folder. Raises `InputError`, `PluginError` as `rscli certify` does."""
    return SmoothedClassifier.load(path)


def save(model: SmoothedClassifier, path: Path | str) -> None:
    """Writes `model` to a model file; raises `InputError` for a network that could not be built again from one."""
    model.save(path)


def read_results(path: Path | str) -> Results:
    """The rows of a result file (ours, or of the field's other tools), as arrays. Raises `InputError` for a broken one."""
    return _read_results(Path(path))


def compare(results: Sequence[Results | Path | str], **options: Any) -> Comparison:
    """The comparison of results, or of their files, that `rscli compare` prints; the first is the baseline.

    `options` are those of `rscli.report.summary.compare`: radii, names, allow_different. Raises `InputError` where the
    results cannot be compared.
    """
    return _compare([one if isinstance(one, Results) else read_results(one) for one in results], **options)


__all__ = ["SmoothedClassifier", "compare", "load", "read_results", "save"]
