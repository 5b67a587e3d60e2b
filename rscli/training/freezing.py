"""Freezing: parameters that stay as they are, and with them the statistics of their normalisation layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from rscli.errors import InputError
from rscli.models.network import Classifier

ALL_BUT_HEAD = "all but the head"
"""In place of a pattern: everything but what changes with the number of classes."""


def freeze(classifier: Classifier, patterns: Sequence[str], head: Callable[[], Collection[str]]) -> None:
    """Freezes the parameters that `patterns` name: they need no gradient. `classifier.start` says how many.

    A pattern is the name of a parameter or of a module, in the classifier (`network.layer1`) or in its network (`layer1`), and
    may have the wildcards `*`, `?` and `[...]`; `ALL_BUT_HEAD` is everything but `head()`, names in the network. A layer with
    running statistics all of whose parameters are frozen keeps them: it stays in eval mode whatever `train` says.

    Raises `InputError` for a pattern that matches nothing (with names that are close), and if nothing is left to train.
    """
    if not patterns:
        return
    parameters = dict(classifier.named_parameters())
    statistics = {name: [f"{name}.{each}" for each in _running(module)] for name, module in classifier.named_modules()}
    names = [*parameters, *(each for owned in statistics.values() for each in owned)]
    frozen = {name for pattern in patterns for name in _matched(pattern, names, head)}
    for name in frozen & parameters.keys():
        parameters[name].requires_grad_(False)
    if all(name in frozen for name in parameters):
        raise InputError(f"freeze = {list(patterns)} leaves no parameter to train", "Leave something out of it.")
    kept = [name for name, owned in statistics.items() if owned and _kept(classifier, name, owned, frozen)]
    classifier.kept = tuple(kept)
    classifier.train(classifier.training)
    count = sum(parameters[name].numel() for name in frozen & parameters.keys())
    layers = f", and the statistics of {len(kept)} normalisation layers" if kept else ""
    said = f"frozen: {len(frozen & parameters.keys())} of {len(parameters)} tensors ({count:,} parameters){layers}"
    classifier.start = replace(classifier.start, notes=(*classifier.start.notes, said))


def _running(module: nn.Module) -> list[str]:
    """The buffers in which a layer itself keeps statistics of its input: those of batch normalisation, by their usual names."""
    return [name for name, _ in module.named_buffers(recurse=False) if name.startswith("running_")]


def _kept(classifier: Classifier, name: str, statistics: Iterable[str], frozen: Collection[str]) -> bool:
    """Whether a layer keeps its statistics: its parameters are frozen; of a layer without any, its statistics are named."""
    own = [f"{name}.{each}" for each, _ in classifier.get_submodule(name).named_parameters(recurse=False)]
    return all(each in frozen for each in own or statistics)


def _matched(pattern: str, names: Sequence[str], head: Callable[[], Collection[str]]) -> list[str]:
    """The names that `pattern` names. Raises `InputError` if there are none."""
    if pattern.strip().lower() == ALL_BUT_HEAD:
        own = {f"network.{name}" for name in head()}
        return [name for name in names if name not in own]
    found = [name for name in names if _matches(pattern, name)]
    if not found:
        raise InputError(f"freeze: nothing is called {pattern!r} in this network", _near(pattern, names))
    return found


def _matches(pattern: str, name: str) -> bool:
    short = name.removeprefix("network.")
    return any(fnmatchcase(each, one) for each in (name, short) for one in (pattern, f"{pattern}.*"))


def _near(pattern: str, names: Sequence[str]) -> str:
    """What the user may have meant: parameters and modules of a close name."""
    short = [name.removeprefix("network.") for name in names]
    parts = dict.fromkeys(".".join(name.split(".")[:n]) for name in short for n in range(1, name.count(".") + 2))
    near = get_close_matches(pattern.removeprefix("network.").strip("*."), parts, n=4)
    begin = dict.fromkeys(name.split(".")[0] for name in short)
    hint = f"Close to it: {', '.join(near)}." if near else f"Its parts are: {', '.join([*begin][:20])}."
    return f"{hint} Patterns may have *, as in layer1.*; {ALL_BUT_HEAD!r} freezes everything but the last layer."
