"""Weights to start from: those of a model file, of somebody else's checkpoint, or of the architecture's own source.

All but the head has to fit. The head is what changes with the number of classes (`head_of`): where the classes differ, its rows
are taken over for classes of the same name, and the others are new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rscli.api import Architecture, DataSpec
from rscli.config.layers import Resolved
from rscli.errors import InputError
from rscli.models.importing.foreign import Checkpoint, read_checkpoint
from rscli.models.importing.keys import Fit, fit_tensors
from rscli.models.importing.mismatch import check_fit
from rscli.models.importing.normalization import Normalization, choose_normalization, take_constants
from rscli.models.modelfile import file_digest, is_model_file, read_model
from rscli.models.network import Classifier, Start, head_of
from rscli.runtime.guard import broken, calling
from rscli.text import same_name

SHOWN = 8
"""Names and classes are listed up to this many."""

HINT = (
    "All but the head must fit. Is it of another architecture (--set arch.name=NAME), of other fields of it, or for images of "
    "another size? `rscli import` has ways to take one network out of a file with several."
)

GUESSED = "To choose, start from the model file that `rscli import --normalization` writes."


@dataclass(frozen=True)
class Weights:
    """What a file holds: its tensors, and the classes and the normalisation that it names (None: it does not say)."""

    checkpoint: Checkpoint
    sha256: str
    class_names: tuple[str, ...] | None = None
    normalization: Normalization | None = None


def read_weights(path: Path) -> Weights:
    """The weights in a model file, in the run folder that holds one, or in a checkpoint of other code; no code is run.

    Raises `InputError` as `read_model` and `read_checkpoint` do.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"there is no file {path} to take initial weights from (--init)", "Name a model file or a checkpoint.")
    if not is_model_file(path):
        return Weights(read_checkpoint(path), file_digest(path))
    tensors, card = read_model(path)
    known = Normalization(card.spec.mean, card.spec.std, "that of the model file")
    return Weights(Checkpoint(path, tensors), file_digest(path), card.spec.class_names, known)


def start_from(classifier: Classifier, resolved: Resolved) -> None:
    """Gives a new `classifier`, on the CPU, the weights and the normalisation that the configuration asks for.

    `classifier.start` then says what was taken. Without `init`, the weights stay, and the normalisation becomes what the
    architecture says that they want. Raises `InputError` for a file that cannot be read, or that does not fit.
    """
    if resolved.config.init is None:
        classifier.start = Start(notes=tuple(_wanted_by(resolved.architecture, classifier, resolved)))
        return
    weights = read_weights(Path(resolved.config.init))
    notes = [weights.checkpoint.note] if weights.checkpoint.note else []
    fit = fit_tensors(weights.checkpoint.tensors, classifier.network.state_dict(), resolved.architecture.rename)
    fit, constants = take_constants(fit, weights.checkpoint)
    head = head_of(resolved.architecture, classifier.spec)
    _check(fit, head, weights.checkpoint.path, resolved, classifier.spec)
    notes += _take(classifier, fit, head, weights)
    found = weights.normalization or choose_normalization("auto", constants, classifier.spec, weights.checkpoint, fit.prefix)
    notes += _normalize(classifier, found, resolved)
    if weights.normalization is None and constants is None:
        notes.append(f"the normalisation is a guess: {weights.checkpoint.path} does not say it. {GUESSED}")
    classifier.start = Start(weights.checkpoint.path, weights.sha256, tuple(notes))


def _wanted_by(architecture: Architecture, classifier: Classifier, resolved: Resolved) -> list[str]:
    """Takes the normalisation of pretrained weights, and says so."""
    with calling(architecture, "normalization"):
        wanted = architecture.normalization(classifier.spec)
    if wanted is None:
        return []
    channels = classifier.spec.shape[0]
    if len(wanted) != 2 or any(len(values) != channels for values in wanted) or min(wanted[1]) < 1e-6:
        raise broken(architecture, "normalization", f"gave {wanted!r:.80}, no mean and std of {channels} channels")
    mean, std = (tuple(map(float, values)) for values in wanted)
    return _normalize(classifier, Normalization(mean, std, "that of the pretrained weights"), resolved)


def _normalize(classifier: Classifier, found: Normalization, resolved: Resolved) -> list[str]:
    """Puts the normalisation of the weights in front, unless the user chose another; what there is to say of it."""
    spec, wanted = classifier.spec, (found.mean, found.std)
    if classifier.normalizes or wanted == (spec.mean, spec.std):
        return []
    if "mean" in resolved.dataset.model_fields_set:
        return [f"the weights were trained with another {found}; data.mean and data.std are used, as configured"]
    if found.mean is not None and len(found.mean) != spec.shape[0]:
        raise InputError(f"the weights want images of {len(found.mean)} channels, and the data have {spec.shape[0]}")
    classifier.fit_to(DataSpec.model_validate({**spec.model_dump(), "mean": found.mean, "std": found.std}))
    return [f"{found}, in place of the data set's"]


def _check(fit: Fit, head: frozenset[str], path: Path, resolved: Resolved, spec: DataSpec) -> None:
    """Raises `InputError` unless every tensor of the network but for its `head` is in the file."""
    body = {name: tensor for name, tensor in fit.expected.items() if name not in head}
    found = {name: tensor for name, tensor in fit.tensors.items() if tensor is not fit.expected[name]}
    arch = resolved.config.arch
    if not found:
        raise InputError(f"none of the {len(fit.extra)} tensors in {path} goes into {arch['name']}", HINT)
    deeper = {name.partition(".")[0] for name in body} - {name.partition(".")[0] for name in head}
    extra = {name: t for name, t in fit.extra.items() if name.removeprefix(fit.prefix).partition(".")[0] in deeper}
    taken = {name: tensor for name, tensor in fit.tensors.items() if name in body}
    rest = replace(fit, tensors=taken, expected=body, extra=extra, copies=())
    try:
        check_fit(rest, path, arch, resolved.config.data["name"], spec)
    except InputError as cause:
        raise InputError(cause.message, HINT) from cause


def _take(classifier: Classifier, fit: Fit, head: frozenset[str], weights: Weights) -> list[str]:
    """Loads what fits; what was taken, and what was not."""
    fresh, names = classifier.network.state_dict(), classifier.spec.class_names
    rows = _rows(weights.class_names, names)
    new = {name for name in head if not _usable(fit.tensors.get(name), fresh[name], rows, weights.class_names)}
    mapped = {} if rows is None else {name: fresh[name].clone() for name in head - new}
    for name, tensor in mapped.items():
        for here, there in (rows or {}).items():
            tensor[here] = fit.tensors[name][there].to(tensor)
    body = {name: tensor for name, tensor in fit.tensors.items() if name not in head or (rows is None and name not in new)}
    classifier.network.load_state_dict({**fresh, **body, **mapped})
    taken = sum(tensor is not fit.expected[name] and name not in new for name, tensor in fit.tensors.items())
    notes = [f"took {taken} of {len(fresh)} tensors from {weights.checkpoint.path} (sha256 {weights.sha256[:12]})"]
    if new:
        notes.append(f"the head is new: {_some(sorted(new))}")
    elif rows is not None:
        notes.append(_said_of_rows(rows, names, weights.class_names or ()))
    if fit.extra:
        notes.append(f"left in the file: {_some(list(fit.extra))}")
    return notes


def _rows(theirs: tuple[str, ...] | None, ours: tuple[str, ...]) -> dict[int, int] | None:
    """For each class of `ours` that is one of `theirs`, its place there; None if the classes are the same, or not known."""
    if theirs is None or [*map(same_name, theirs)] == [*map(same_name, ours)]:
        return None
    place = {same_name(name): number for number, name in enumerate(theirs)}
    return {here: place[same_name(name)] for here, name in enumerate(ours) if same_name(name) in place}


def _usable(there: Tensor | None, fresh: Tensor, rows: Mapping[int, int] | None, classes: Sequence[str] | None) -> bool:
    """Whether a tensor of the head can be taken: whole, or for the classes in `rows`."""
    if there is None or not there.is_floating_point() or there.layout is not torch.strided or not there.isfinite().all():
        return False
    if rows is None:
        return there.shape == fresh.shape
    return bool(rows) and there.shape == (len(classes or ()), *fresh.shape[1:])


def _said_of_rows(rows: Mapping[int, int], ours: Sequence[str], theirs: Sequence[str]) -> str:
    new = [name for place, name in enumerate(ours) if place not in rows]
    taken = f"the head has the rows of {len(rows)} of {len(theirs)} classes, matched by name: {_some([ours[k] for k in rows])}"
    return taken + (f"; new are {_some(new)}" if new else "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
