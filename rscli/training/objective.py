"""What is trained: the classifier and its objective as one module, and an attack before it; what plugins return is checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from rscli.api import Attack, Loss, TrainStep
from rscli.runtime.guard import broken, calling

RESERVED = {"loss", "accuracy", "epoch", "batch", "chunk", "lr", "grad_norm", "images_per_s", "seconds"}
"""Figures that the log has for itself."""


class Objective(nn.Module):
    """The network in training, whose `forward` is a whole objective: the named terms of a step.

    A loss may run the network as often as it likes, attack inside, or call a teacher: several processes average the gradients
    of this one module (`DistributedDataParallel` wraps it), once a step, and need not know. `step.model` is the network itself.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss: Loss, step: TrainStep) -> dict[str, Tensor]:
        """The named terms, scalars. Raises `PluginError` unless they are, at least one."""
        return _terms(loss, step)


def attacked(attack: Attack, step: TrainStep) -> TrainStep:
    """The step that the loss trains on after `attack`, checked and detached; the model is left as it was.

    Raises `PluginError` if the attack returns something else, tensors of another shape, or pixels outside [0, 1] or NaN.
    """
    with step.frozen(), calling(attack, "perturb"), _untouched(attack, "perturb", step):
        moved = attack.perturb(step)
    if not isinstance(moved, TrainStep):
        raise broken(attack, "perturb", f"returned a {type(moved).__name__}: it must return step.moved(images=...)")
    for what in ("images", "noise"):
        here, there = getattr(step, what), getattr(moved, what)
        if not isinstance(there, Tensor) or there.dtype != here.dtype or there.device != here.device:
            raise broken(attack, "perturb", f"returned {what} that are no tensor of {here.dtype} on {here.device}")
        if there.shape != here.shape:
            raise broken(attack, "perturb", f"returned {what} of shape {tuple(there.shape)}, not {tuple(here.shape)}")
    images = moved.images.detach()
    low, high = torch.stack(torch.aminmax(images)).tolist()  # the host waits once for a whole attack
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise broken(attack, "perturb", f"returned pixels from {low:g} to {high:g}: they must be in [0, 1]")
    if not all(isinstance(tensor, Tensor) for tensor in moved.extra.values()):
        raise broken(attack, "perturb", f"added {', '.join(moved.extra)}, of which not all are tensors")
    extra = {key: tensor.detach() for key, tensor in moved.extra.items()}
    return replace(step, images=images, noise=moved.noise.detach(), extra=extra)


def _terms(loss: Loss, step: TrainStep) -> dict[str, Tensor]:
    """The named terms of the objective. Raises `PluginError` unless they are scalars, at least one."""
    with calling(loss, "step"), _untouched(loss, "step", step):
        terms = loss.step(step)
    if not isinstance(terms, dict) or not all(isinstance(k, str) and isinstance(term, Tensor) for k, term in terms.items()):
        raise broken(loss, "step", f"returned {terms!r:.80}: it must return named scalars, such as {{'ce': ...}}")
    if not terms or any(term.ndim for term in terms.values()):
        shapes = {name: tuple(term.shape) for name, term in terms.items()}
        raise broken(loss, "step", f"must return at least one named scalar, and returned {shapes}")
    if taken := RESERVED & terms.keys() - ({"loss"} if len(terms) == 1 else set()):
        raise broken(loss, "step", f"calls a term {' and '.join(sorted(taken))}, which the log has for itself; call it ce, say")
    if not any(term.requires_grad for term in terms.values()):
        raise broken(loss, "step", "returned terms without gradients, from which nothing can be learned")
    return terms


@contextmanager
def _untouched(plugin: Attack | Loss, method: str, step: TrainStep) -> Iterator[None]:
    """Raises `PluginError` if the body changes the tensors of `step` in place: others are to see them, too."""
    handed = {name: getattr(step, name) for name in ("images", "clean", "labels", "noise")}
    before = {name: tensor._version for name, tensor in handed.items()}
    yield
    changed = [name for name, tensor in handed.items() if tensor._version != before[name]]
    if changed:
        raise broken(plugin, method, f"changed the step's {' and '.join(changed)} in place")
