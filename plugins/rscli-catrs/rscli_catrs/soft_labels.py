"""The soft labels of CAT-RS: for each training image, how a smoothed classifier's votes are shared among the classes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rscli.api import TrainContext
from rscli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

TEACHER_SIGMA = 0.25
"""The noise of the paper's teacher, in training and in its votes."""

ROWS = 1024
"""Noisy images in a forward."""


def read_or_make(context: TrainContext, file: Path | None, teacher: Path | None, votes: int) -> Tensor:
    """The soft labels (images, classes), float32: read from `file`, or made by `teacher` and then kept in `file`.

    Raises `InputError` if the file is broken or of other data, or if there is neither file nor teacher.
    """
    origin = {"data_sha256": context.data_sha256, "votes": str(votes)}
    if teacher is not None:
        origin["teacher_sha256"] = digest(teacher)
    if file is not None and file.exists():
        return read(file, context.images, context.classes, origin)
    if teacher is None:
        raise InputError(f"there are no soft labels {file}", "Name the model that makes them: --set loss.teacher=RUN.")
    found = make(context, teacher, votes)
    if file is not None:
        write(file, found, origin)
        context.note(f"soft labels: {file}")
    return found


def digest(teacher: Path) -> str:
    """SHA-256 of the teacher's model file, or of the one in its run folder. Raises `InputError` if there is none."""
    file = teacher / "model.safetensors" if teacher.is_dir() else teacher
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as cause:
        text = f"the teacher {teacher} cannot be read: {cause.strerror}"
        raise InputError(text, "Train it first: a Gaussian preset of sigma 0.25.") from cause


def make(context: TrainContext, teacher: Path, votes: int) -> Tensor:
    """The vote shares (images, classes), float32, of `votes` copies of each training image under the teacher's own noise."""
    import torch

    network, noise = context.load_model(teacher)
    if noise.sigma != TEACHER_SIGMA:
        context.note(f"the paper's teacher has sigma {TEACHER_SIGMA}, but this one has {noise.sigma:g}")
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


def write(file: Path, labels: Tensor, origin: dict[str, str]) -> None:
    """Keeps `labels` (images, classes) and their `origin` in `file`, whole or not at all.

    Raises `OSError` if the place cannot be written to.
    """
    from safetensors.torch import save

    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}.part")
    beside.write_bytes(save({"soft_labels": labels.contiguous()}, metadata=origin))
    beside.replace(file)


def read(file: Path, images: int, classes: int, origin: dict[str, str]) -> Tensor:
    """The soft labels (images, classes) in `file`.

    Raises `InputError` if it holds no such table, or one of another `origin`: other data, teacher or number of votes.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            made, labels = opened.metadata() or {}, opened.get_tensor("soft_labels")
    except (SafetensorError, KeyError, OSError) as cause:
        raise InputError(
            f"{file} holds no soft labels: {cause}", "Remove it; they are then made again from loss.teacher."
        ) from cause
    if tuple(labels.shape) != (images, classes):
        raise InputError(
            f"the soft labels in {file} are {tuple(labels.shape)} (images, classes), the training data {(images, classes)}",
            "Name another file: --set loss.soft_labels=FILE.",
        )
    if other := [key for key, value in origin.items() if made.get(key) != value]:
        text = f"the soft labels in {file} were made from something else: {', '.join(other)}"
        raise InputError(text, "Name another file (--set loss.soft_labels=FILE), or remove this one to make them again.")
    if not (labels.min() >= 0 and (labels.sum(-1) - 1).abs().max() < 1e-3):
        raise InputError(f"the rows in {file} are not probabilities", "Remove it; they are then made again from loss.teacher.")
    found: Tensor = labels.float()
    return found
