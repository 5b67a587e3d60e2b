"""What to say of tensors that do not go into a network: every one of them, and what the user most likely wants instead."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rscli.api import DataSpec
from rscli.errors import InputError
from rscli.models.importing.keys import Fit

SHOWN = 20
"""Tensors that do not fit are listed up to this many of a sort: the wrong depth misses hundreds."""


def check_fit(
    fit: Fit, path: Path, arch: Mapping[str, Any], dataset: str, spec: DataSpec, other_arch: str | None = None
) -> None:
    """Checks that the tensors of the file `path` go into the network that `arch` (its name and fields) describes.

    Raises `InputError` with a line for every tensor that is missing, extra, of another shape, or not finite; or, if that is
    all that is wrong, saying that the file is of another number of classes or channels than `dataset`, which `spec` describes.
    `other_arch`: what the file itself says of its architecture, if it contradicts `arch`.
    """
    if (said := _other_classes(fit, len(spec.class_names)) or _other_channels(fit, spec.shape[0])) is not None:
        raise InputError(
            f"{path} was trained on {said[0]}, but {dataset!r} has {said[1]}",
            "Name the data set that it was trained on: --dataset NAME, with its fields as --set data.KEY=VALUE.",
        )
    sorts = {
        "missing": [f"{name} {_shape(fit.expected[name])}" for name in fit.missing],
        "extra": [f"{name} {_shape(tensor)}" for name, tensor in fit.extra.items()],
        "of the wrong shape": [
            f"{n} is {_shape(fit.tensors[n])}, but must be {_shape(fit.expected[n])}" for n in fit.wrong_shape
        ],
        "of the wrong type": [
            f"{n} is {_type(fit.tensors[n])}, but must be plain floating-point numbers" for n in fit.wrong_type
        ],
        "not finite": [
            f"{n} holds NaN or infinite values"
            for n, t in fit.tensors.items()
            if n not in fit.wrong_type and not t.isfinite().all()
        ],
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
    hint = _only_extra(fit) or "Is it another architecture (--arch NAME), or one with other fields (--set arch.KEY=VALUE)?"
    if other_arch is not None:
        hint = f"The file says arch = {other_arch!r}: leave out --arch and --set arch.KEY=VALUE to import it as that."
    raise InputError("\n".join(lines), hint)


def _only_extra(fit: Fit) -> str | None:
    """How to leave out what is extra, if nothing else is wrong: another network, or what training needed."""
    if fit.missing or fit.wrong_shape or not fit.extra:
        return None
    if len(fit.copies) > 1:
        ways = " or ".join(f"--prefix {prefix}" for prefix in fit.copies if prefix)
        return f"It holds {len(fit.copies)} networks that fit. Name the one to import: {ways}."
    own = {name.partition(".")[0] for name in fit.expected}
    if any(n.startswith(fit.prefix) and n.removeprefix(fit.prefix).partition(".")[0] in own for n in fit.extra):
        return None  # more of the network's own parts: it is a deeper one
    starts = dict.fromkeys(f"{name.rpartition('.')[0]}.*" if "." in name else name for name in fit.extra)
    roots = dict.fromkeys(start.partition(".")[0] for start in starts)
    if not any((fit.prefix + name).partition(".")[0] in roots for name in fit.tensors):
        starts = dict.fromkeys(root if root in fit.extra else f"{root}.*" for root in roots)
    ways = " ".join(f"--ignore '{start}'" for start in list(starts)[:8])
    return f"The network is complete. If the extra tensors were for training only, leave them out: {ways}"


def _other_classes(fit: Fit, classes: int) -> tuple[str, int] | None:
    """What the file was trained on, and the number of `classes`, if the last layer's number is all that does not fit."""
    if fit.missing or fit.extra or not fit.wrong_shape:
        return None
    shapes = [(fit.tensors[name].shape, fit.expected[name].shape) for name in fit.wrong_shape]
    counts = {there[0] if here[:1] == (classes,) and there[1:] == here[1:] else None for there, here in shapes}
    count = counts.pop()
    if count is None or counts:
        return None
    return f"{count} classes (the first dimension of {fit.wrong_shape[0]})", classes


def _other_channels(fit: Fit, channels: int) -> tuple[str, int] | None:
    """What the file was trained on, and the number of `channels`, if the first layer's number is all that does not fit."""
    if fit.missing or fit.extra or len(fit.wrong_shape) != 1:
        return None
    (name,) = fit.wrong_shape
    there, here = fit.tensors[name].shape, fit.expected[name].shape
    if len(there) != len(here) or here[1:2] != (channels,) or (there[0], *there[2:]) != (here[0], *here[2:]):
        return None
    return f"images of {there[1]} channels (the second dimension of {name})", channels


def _nearest(name: str, fit: Fit) -> str:
    """The expected name that an extra tensor most likely means: missing, and of its shape or at least its size, if any is."""
    pool, tensor = fit.missing or list(fit.expected), fit.extra[name]
    same_shape = [other for other in pool if fit.expected[other].shape == tensor.shape]
    same_size = [other for other in pool if fit.expected[other].numel() == tensor.numel()]
    return get_close_matches(name.removeprefix(fit.prefix), same_shape or same_size or pool, n=1, cutoff=0)[0]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _type(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    how = [] if tensor.layout is torch.strided else [str(tensor.layout).removeprefix("torch.")]
    return " ".join([*how, *(["without values"] if tensor.is_meta else []), kind])
