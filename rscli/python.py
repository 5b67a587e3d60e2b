"""The functions behind `import rscli`: the same objects that the commands print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rscli.models import compose as composing
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


def ensemble(
    models: Sequence[SmoothedClassifier | Path | str], *, sigma: float | None = None, **fields: Any
) -> SmoothedClassifier:
    """The ensemble of `models` (or of their files), whose logits are the mean of theirs; `save` writes a model file of it.

    They must agree in classes, input shape, test transform and noise; `sigma`, in [0, 1] pixels, where theirs differ. `fields`
    are further ones of the architecture `ensemble`. Raises as `compose` does.
    """
    return SmoothedClassifier.of(composing.ensemble([_loaded(one) for one in models], fields, sigma=sigma))


def compose(arch: str, *, sigma: float | None = None, **fields: Any) -> SmoothedClassifier:
    """A classifier of the composite architecture `arch`, put together of models; `save` writes a model file of it.

    `fields` are its hyper-parameters. Those that hold architectures take models that came from model files, or pairs
    (network, section): a network in memory, and the architecture plugin, by name or as a section, that has its tensors:

        rscli.compose("denoised", denoiser=(network, "dncnn"), classifier=rscli.load("model.safetensors"), sigma=0.25)

    The weights are copied. Classes, shape, transform, noise and data are those of the models; `sigma` is in [0, 1] pixels.

    Raises `InputError` for models that do not agree, do not fit, or came from no file; `ConfigError` for other fields.
    """
    return SmoothedClassifier.of(composing.compose(arch, fields, sigma=sigma))


def _loaded(model: SmoothedClassifier | Path | str) -> SmoothedClassifier:
    return load(model) if isinstance(model, str | Path) else model


def read_results(path: Path | str) -> Results:
    """The rows of a result file (ours, or of the field's other tools), as arrays. Raises `InputError` for a broken one."""
    return _read_results(Path(path))


def compare(results: Sequence[Results | Path | str], **options: Any) -> Comparison:
    """The comparison of results, or of their files, that `rscli compare` prints; the first is the baseline.

    `options` are those of `rscli.report.summary.compare`: radii, names, allow_different. Raises `InputError` where the
    results cannot be compared.
    """
    return _compare([one if isinstance(one, Results) else read_results(one) for one in results], **options)


__all__ = ["SmoothedClassifier", "compare", "compose", "ensemble", "load", "read_results", "save"]
