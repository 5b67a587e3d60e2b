"""Brings results together: the same images, in the same order, certified under protocols that may be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rscli.errors import InputError
from rscli.results.protocol import certifier_of
from rscli.results.reader import Results

if TYPE_CHECKING:
    from numpy.typing import NDArray


def grid(run: Results) -> tuple[float, ...]:
    """The radii that the certifier of `run` decided; none if it certified as large a radius as it could (or nobody knows).

    Radii may be recorded although the certifier paid no heed to them: then some row has another one.
    """
    radii = tuple((run.protocol or {}).get("radii") or _certifier(run).get("radii") or ())
    return radii if np.isin(run.radius, (0.0, *radii)).all() else ()


def undecided(run: Results, radii: Sequence[float]) -> tuple[float, ...]:
    """Those of `radii` that the certifier of `run` was not asked for: what it certified there is a lower bound, also at 0."""
    decided = grid(run)
    return tuple(radius for radius in radii if decided and radius not in decided)


def _certifier(run: Results) -> dict[str, Any]:
    return certifier_of(run.protocol or {})


Reader = Callable[[Results], Any]
"""Reads from a protocol what is to be compared."""

UNKNOWN = object()
"""What a `Reader` gives of a run that is not to be compared in this."""


def _at(key: str) -> Reader:
    """Reads the protocol at a dotted `key`; None where there is nothing, or False."""

    def read(run: Results) -> Any:
        value: Any = run.protocol
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value or None

    return read


DECISIVE: dict[str, Reader] = {
    "n": _at("n"),
    "alpha": _at("alpha"),
    "radii decided": lambda run: grid(run) or "as large as possible",
    "labels given to the certifier": _at("labels"),
    "noise": _at("noise.name"),
    "norm": lambda run: (run.protocol or {}).get("norm") or UNKNOWN,
}
"""What must be the same in all protocols. n and alpha bound the radius that can be certified; a certifier that decides given
radii certifies none in between; a test of the label's own class needs no selection; two noises may have two norms."""

WORTH_A_NOTE: dict[str, Reader] = {
    "certifier": _at("certifier.name"),
    "precision": _at("precision"),
    "data set": _at("dataset"),
    "split": _at("split"),
    "fingerprint of the images": _at("data_sha256"),
}
"""What may differ, but should not go unnoticed."""

ELSEWHERE = {"name", "n", "n0", "alpha", "radii", "decisive"}
"""What a protocol tells of the certifier and also by itself."""


def _settings(runs: Sequence[Results], *, decisive: bool) -> dict[str, Reader]:
    """What to compare of the certifiers' own settings, each among the runs of one certifier whose protocols tell it.

    Decisive ones are those that the certifier itself calls so (`Certifier.decisive`): like alpha, they bound the radius. Any
    other that differs is worth a note.
    """
    told = [(certifier, key) for certifier in map(_certifier, runs) for key in certifier if key not in ELSEWHERE]
    chosen = [(one.get("name"), key) for one, key in told if (key in one["decisive"]) == decisive]
    return {f"{key} of {name}": _setting(name, key) for name, key in chosen}


def _setting(name: str | None, key: str) -> Reader:
    def read(run: Results) -> Any:
        certifier = _certifier(run)
        return certifier.get(key, UNKNOWN) if certifier.get("name") == name else UNKNOWN

    return read


@dataclass(frozen=True)
class Aligned:
    """Results of different names about the same images (row i of each about the same one), and what a reader must know."""

    runs: tuple[Results, ...]
    notes: tuple[str, ...]


def align(runs: Sequence[Results], *, names: Sequence[str] = (), allow_different: bool = False) -> Aligned:
    """The images that all `runs` have, in increasing order of their index, named by `names` or by their paths.

    Raises `InputError` if there is no common image, an image has two labels, names are wrong, or the protocols differ in
    what figures depend on (`DECISIVE`, and what certifiers call decisive); with `allow_different` the latter becomes a note.
    """
    named = _named(runs, names)
    notes = [note for run in named for note in run.notes]
    notes += _decisive(named, allow_different)
    notes += _unequal(named, {**WORTH_A_NOTE, **_settings(named, decisive=False)})
    notes += _foreign(named)
    common = reduce(np.intersect1d, [run.idx for run in named])
    if not common.size:
        raise InputError(
            f"{_names(named)} have no image in common", "Compare runs over the same images (--start, --skip, --max, --split)."
        )
    if any(run.idx.size > common.size for run in named):
        sizes = ", ".join(f"{run.idx.size:,} ({run.name})" for run in named)
        notes.append(f"the results are on different images: {sizes}; compared on the {common.size:,} that all share")
    aligned = tuple(_taken(run, common) for run in named)
    _check_labels(aligned)
    return Aligned(aligned, tuple(notes))


def _named(runs: Sequence[Results], names: Sequence[str]) -> list[Results]:
    """The runs under different names: those given, or as many folders of their paths as tell them apart."""
    if not runs:
        raise InputError("no results to compare", "Give one or more result files.")
    if names and len(names) != len(runs):
        raise InputError(f"{len(names)} names for {len(runs)} results ({', '.join(names)})", "Give one name for each file.")
    paths = [run.path.resolve() for run in runs]
    chosen = list(names) or [run.name for run in runs]
    for folders in range(2, max(len(path.parts) for path in paths)):
        if names or len(set(chosen)) == len(chosen):
            break
        chosen = ["/".join(_described(path)[-folders:]) for path in paths]
    twice = next((name for name in chosen if chosen.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two results are called {twice}", "Give each file once, and each name (--names) once.")
    return [replace(run, name=name) for run, name in zip(runs, chosen, strict=True)]


def _described(path: Path) -> tuple[str, ...]:
    """The parts of a path that say something: `results.tsv` is what every run folder has."""
    return path.parts[:-1] if path.name == "results.tsv" else (*path.parts[:-1], path.stem)


def _decisive(runs: Sequence[Results], allowed: bool) -> list[str]:
    texts = _unequal(runs, {**DECISIVE, **_settings(runs, decisive=True)})
    if texts and not allowed:
        raise InputError(
            "the results were not certified under the same protocol:\n" + "\n".join(f"  {text}" for text in texts),
            "ACR and certified accuracy depend on this. Certify again under one protocol, or compare anyway with "
            "--allow-different.",
        )
    return [f"figures are not comparable: {text}" for text in texts]


def _unequal(runs: Sequence[Results], aspects: dict[str, Reader]) -> list[str]:
    """For each of `aspects` in which the runs with a protocol differ: who has which value."""
    texts = []
    for title, read in aspects.items():
        found: dict[str, list[str]] = {}
        for run in runs:
            if run.protocol is not None and (value := read(run)) is not UNKNOWN:
                found.setdefault(str(value), []).append(run.name)
        if len(found) > 1:
            texts.append(f"{title}: " + "; ".join(f"{text} ({', '.join(names)})" for text, names in found.items()))
    return texts


def _foreign(runs: Sequence[Results]) -> list[str]:
    """What is unknown of files without a protocol, and what their radii are worth."""
    notes = []
    unknown = [run for run in runs if run.protocol is None]
    if unknown:
        notes.append(f"n and alpha are unknown for files without a protocol: {_names(unknown)}")
    rounded = [run for run in unknown if _three_digits(run.radius)]
    if rounded:
        notes.append(f"radii are rounded to three digits, some of them up, in {_names(rounded)}")
    return notes


def _three_digits(radius: NDArray[np.float64]) -> bool:
    return all(float(f"{value:.3g}") == value for value in np.unique(radius).tolist())


def _names(runs: Sequence[Results]) -> str:
    return ", ".join(run.name for run in runs)


def _taken(run: Results, wanted: NDArray[np.int64]) -> Results:
    """The rows of `run` about the images `wanted` (increasing)."""
    order = np.argsort(run.idx)
    keep = order[np.searchsorted(run.idx, wanted, sorter=order)]

    def pick(column: Any) -> Any:
        return None if column is None else column[keep]

    return replace(
        run,
        idx=pick(run.idx),
        label=pick(run.label),
        predict=pick(run.predict),
        radius=pick(run.radius),
        correct=pick(run.correct),
        seconds=pick(run.seconds),
        n0=pick(run.n0),
        n=pick(run.n),
        count=pick(run.count),
        runner_up=pick(run.runner_up),
        reason=None if run.reason is None else tuple(run.reason[row] for row in keep),
        saturated=pick(run.saturated),
    )


def _check_labels(runs: Sequence[Results]) -> None:
    first = runs[0]
    for run in runs[1:]:
        wrong = np.flatnonzero(run.label != first.label)
        if wrong.size:
            row = wrong[0]
            raise InputError(
                f"image {first.idx[row]} has the label {first.label[row]} in {first.name} and {run.label[row]} in {run.name} "
                f"({wrong.size:,} of {first.idx.size:,} images differ)",
                "These are results on different data sets or splits; only results on the same images can be compared.",
            )
