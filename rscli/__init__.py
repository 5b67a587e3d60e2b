"""Certified robustness by randomized smoothing: train, certify, predict and compare smoothed classifiers.

In Python (docs/python.md):

    model = rscli.load("model.safetensors")
    certificates = model.certify(images, n=100_000)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rscli.python import SmoothedClassifier, compare, compose, ensemble, load, read_results, save

__all__ = ["SmoothedClassifier", "__version__", "compare", "compose", "ensemble", "load", "read_results", "save"]


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is asked for: `import rscli` by itself brings no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rscli import python

    return getattr(python, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
