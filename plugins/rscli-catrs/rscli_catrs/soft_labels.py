"""The soft labels of CAT-RS: for each training image, how a smoothed classifier's votes are shared among the classes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rscli.api import TrainContext
from rscli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 1024
"""Noisy images in a forward."""


def read_or_make(context: TrainContext, file: Path | None, teacher: Path | None, votes: int) -> Tensor:
    """The soft labels (images, classes), float32: read from `file`, or made by `teacher` and then kept in `file`.

    Raises `InputError` if the file is broken or of other data, or if there is neither file nor teacher.
    """
    if file is not None and file.exists():
        return read(file, context.images, context.classes)
    if teacher is None:
        raise InputError(f"there are no soft labels {file}", "Name the model that makes them: --set loss.teacher=RUN.")
    found = make(context, teacher, votes)
    if file is not None:
        write(file, found)
        context.note(f"soft labels: {file}")
    return found


def make(context: TrainContext, teacher: Path, votes: int) -> Tensor:
    """The vote shares (images, classes), float32, of `votes` copies of each training image under the teacher's own noise."""
    import torch

    network, noise = context.load_model(teacher)
    context.note(f"making soft labels: {votes} votes of {teacher} for each of {context.images:,} training images")
    out = torch.zeros(context.images, context.classes)
    copies = max(1, min(votes, ROWS // 8))
    with torch.inference_mode():
        for indices, images, _ in context.batches(max(1, ROWS // copies)):
            counts = torch.zeros(len(images), context.classes, device=images.device)
            for done in range(0, votes, copies):
                m = min(copies, votes - done)
                drawn = noise.sample((m, *images.shape), generator=context.generator, device=images.device)
                answers = network(noise.apply(images, drawn).flatten(0, 1)).argmax(-1).reshape(m, -1)
                counts += torch.nn.functional.one_hot(answers, context.classes).sum(0)
            out[indices] = (counts / votes).cpu()
    return out


def write(file: Path, labels: Tensor) -> None:
    """Keeps `labels` (images, classes) in `file`, whole or not at all. Raises `OSError` if the place cannot be written to."""
    from safetensors.torch import save

    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}.part")
    beside.write_bytes(save({"soft_labels": labels.contiguous()}))
    beside.replace(file)


def read(file: Path, images: int, classes: int) -> Tensor:
    """The soft labels (images, classes) in `file`. Raises `InputError` if it holds no such table, or one of other data."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        labels = load(file.read_bytes())["soft_labels"]
    except (SafetensorError, KeyError, OSError) as cause:
        raise InputError(
            f"{file} holds no soft labels: {cause}", "Remove it, and they are made again from loss.teacher."
        ) from cause
    if tuple(labels.shape) != (images, classes):
        raise InputError(
            f"the soft labels in {file} are {tuple(labels.shape)} (images, classes), the training data {(images, classes)}",
            "Name another file: --set loss.soft_labels=FILE.",
        )
    if not (labels.min() >= 0 and (labels.sum(-1) - 1).abs().max() < 1e-3):
        raise InputError(f"the rows in {file} are not probabilities", "Remove it, and they are made again from loss.teacher.")
    return labels.float()
