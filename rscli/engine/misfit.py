"""What to say of tensors that do not go into a network: every one of them, and what the user most likely wants instead."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor

from rscli.engine.fit import Fit
from rscli.errors import InputError

SHOWN = 20
"""Tensors that do not fit are listed up to this many of a sort: the wrong depth misses hundreds."""


def check_fit(fit: Fit, path: Path, arch: Mapping[str, Any], dataset: str, classes: int) -> None:
    """Checks that the tensors of the file `path` go into the network that `arch` (its name and fields) describes.

    Raises `InputError` with a line for every tensor that is missing, extra, of another shape, or not finite; or, if that is
    all that is wrong, saying that the file is of another number of classes than the `classes` of `dataset`.
    """
    if (theirs := _other_classes(fit, classes)) is not None:
        name, count = theirs
        raise InputError(
            f"{path} was trained on {count} classes (the first dimension of {name}), and {dataset!r} has {classes}",
            "Name the data set that it was trained on: --dataset NAME, with its fields as --set data.KEY=VALUE.",
        )
    sorts = {
        "missing": [f"{name} {_shape(fit.expected[name])}" for name in fit.missing],
        "extra": [f"{name} {_shape(tensor)}" for name, tensor in fit.extra.items()],
        "misshapen": [f"{n} is {_shape(fit.tensors[n])}, and must be {_shape(fit.expected[n])}" for n in fit.misshapen],
        "not finite": [f"{n} holds NaN or infinite values" for n, t in fit.tensors.items() if not t.isfinite().all()],
    }
    if not any(sorts.values()):
        return
    for place, name in enumerate(list(fit.extra)[:SHOWN]):
        sorts["extra"][place] += f"; the nearest expected name is {_nearest(name, fit)}"
    fields = ", ".join(f"{key} = {value}" for key, value in arch.items() if key != "name" and value not in ({}, False))
    counts = ", ".join(f"{len(lines)} {sort}" for sort, lines in sorts.items() if lines)
    lines = [f"the tensors in {path} do not fit {arch['name']}{f' ({fields})' if fields else ''}: {counts}"]
    for sort, found in sorts.items():
        lines += [f"  {sort}: {line}" for line in found[:SHOWN]]
        lines += [f"  {sort}: and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    hint = "Is it of another architecture (--arch NAME), or of other fields (--set arch.KEY=VALUE)?"
    raise InputError("\n".join(lines), hint)


def _other_classes(fit: Fit, classes: int) -> tuple[str, int] | None:
    """A tensor of the last layer and its number of classes, if that number is all that does not fit."""
    if fit.missing or fit.extra or not fit.misshapen:
        return None
    shapes = [(fit.tensors[name].shape, fit.expected[name].shape) for name in fit.misshapen]
    counts = {there[0] if here[:1] == (classes,) and there[1:] == here[1:] else None for there, here in shapes}
    count = counts.pop()
    return (fit.misshapen[0], count) if count is not None and not counts else None


def _nearest(name: str, fit: Fit) -> str:
    """The expected name that an extra tensor most likely means: one that is missing, and of its shape, if there is any."""
    pool = fit.missing or list(fit.expected)
    alike = [other for other in pool if fit.expected[other].shape == fit.extra[name].shape]
    return get_close_matches(name.removeprefix(fit.prefix), alike or pool, n=1, cutoff=0)[0]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
