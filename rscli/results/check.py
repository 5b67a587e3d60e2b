"""Holds every row of ours against its protocol: what the counts say, the certifier and the noise of the protocol recompute.

A row tells the counts of two classes: of the class under test, and of the most frequent other one. What the rest of the samples
were given, the counts of the selection samples, and those of earlier looks are not recorded; a row is refused only if nothing
that they may have been gives it. A protocol that does not say which package its certifier comes from (rscli always does), or
whose certifier is not installed here, leaves what arithmetic alone can tell.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from rscli.api import ABSTAIN, Certifier, Decision, Noise, Plan, Question
from rscli.errors import InputError, PluginError, RscliError
from rscli.registry import installed
from rscli.results.protocol import digest
from rscli.results.radius import certified_radius, threshold_of
from rscli.results.rows import Row, broken

TOLERANCE = 1e-9
"""So much may a recomputed radius differ, relatively, and by a hundredth of it absolutely: on another SciPy, say."""

MANY_CLASSES = 10_000
"""More classes than this are not made up to recompute a row."""

SOME_CLASSES = 100
"""So many classes at least are supposed where the protocol, of an older rscli, does not say."""

MANY_PLANS = 3000
"""So many outcomes of the selection samples are tried at most."""

Counts = NDArray[np.int64]


class _Case(NamedTuple):
    """What determines a row, whatever the class is called."""

    n0: int
    n: int
    hits: int
    runner_up: int


class _Outcome(NamedTuple):
    """What a row says of its case."""

    certified: bool
    radius: float
    reason: str
    saturated: bool

    def same(self, other: _Outcome) -> bool:
        exact = (self.certified, self.reason, self.saturated) == (other.certified, other.reason, other.saturated)
        return exact and math.isclose(self.radius, other.radius, rel_tol=TOLERANCE, abs_tol=TOLERANCE / 100)


def check_rows(path: Path, rows: Sequence[Row], lines: Iterable[int], protocol: dict[str, Any]) -> None:
    """Raises `InputError` with file and line for the first of `rows` (on `lines`) that cannot be under `protocol`."""
    check = _checks(protocol)
    for row, line in zip(rows, lines, strict=True):
        fault = check.fault(row)
        if fault is not None:
            raise broken(path, line, fault)


def unchecked(protocol: dict[str, Any]) -> str | None:
    """Why the rows under `protocol` are not recomputed, if rscli wrote it; None if they are."""
    return _checks(protocol).why_not


_known: dict[str, _Checks] = {}


def _checks(protocol: dict[str, Any]) -> _Checks:
    """The checks of a protocol; what they have recomputed is kept for the other files under it."""
    return _known.setdefault(digest(protocol), _Checks(protocol))


class _Checks:
    """What a row must be under one protocol."""

    def __init__(self, protocol: dict[str, Any]) -> None:
        info, section = protocol.get("info") or {}, protocol.get("certifier") or {}
        self.classes: int | None = info.get("classes")
        self.images: int | None = info.get("images")
        self.most: int | None = protocol.get("n")
        self.labels = bool(protocol.get("labels"))
        self.ours = "package" in section
        self.why_not: str | None = None
        self._recompute: _Recompute | None = None
        self._faults: dict[tuple[_Case, _Outcome], str | None] = {}
        if self.ours:
            try:
                self._recompute = _Recompute(protocol, self.classes)
            except (PluginError, InputError, ValidationError, KeyError, TypeError) as cause:
                why = cause.message if isinstance(cause, RscliError) else "the fields do not fit"
                self.why_not = f"its certifier or noise cannot be built here ({why})"

    def fault(self, row: Row) -> str | None:
        """What is wrong with `row`: what it says, and what it must be. None if nothing is."""
        return self._arithmetic(row) or self._recomputed(row)

    def _arithmetic(self, row: Row) -> str | None:
        if self.classes is not None and not (0 <= row.label < self.classes and row.predict < self.classes):
            name = "predict" if 0 <= row.label < self.classes else "label"
            return f"{name} is {getattr(row, name)}, but the model has the classes 0 to {self.classes - 1}"
        if row.label < 0:
            return f"label is {row.label}, but a class is never negative"
        if self.images is not None and row.idx >= self.images:
            return f"idx is {row.idx}, but the split has {self.images:,} images, from 0 on"
        if row.n is None or row.n0 is None or row.count is None or row.runner_up is None or row.saturated is None:
            missing = next(name for name in ("n0", "n", "count", "runner_up", "saturated") if getattr(row, name) is None)
            return f"{missing} is empty, but rscli always writes it" if self.ours else None
        if self.most is not None and row.n > self.most:
            return f"n is {row.n}, but the protocol allows at most {self.most} samples"
        if row.count + row.runner_up > row.n:
            return f"count is {row.count} and runner_up is {row.runner_up}, but together they are at most n, which is {row.n}"
        if self.ours and self.labels and row.predict not in (ABSTAIN, row.label):
            return f"predict is {row.predict}, but with --labels it is the label, {row.label}, or {ABSTAIN}"
        return None

    def _recomputed(self, row: Row) -> str | None:
        if self._recompute is None:
            return None
        case = _Case(cast(int, row.n0), cast(int, row.n), cast(int, row.count), cast(int, row.runner_up))
        said = _Outcome(row.predict != ABSTAIN, row.radius, row.reason or "", bool(row.saturated))
        key = (case, said)
        if key not in self._faults:
            try:
                self._faults[key] = self._recompute.fault(case, said)
            except Exception as cause:  # a plugin's, of any kind: it must not keep anybody from reading a file
                self.why_not = f"its certifier cannot recompute it ({type(cause).__name__}: {cause})"
                self._faults[key] = None
        return self._faults[key]


class _Recompute:
    """The certifier and the noise of a protocol, asked again. The class under test is 0 here: its name makes no difference."""

    def __init__(self, protocol: dict[str, Any], classes: int | None) -> None:
        section = dict(protocol["certifier"])
        package, name = section.pop("package"), section["name"]
        section.pop("decisive", None)
        recorded = section.pop("version", None)
        certifier = installed().build("certifiers", {**section, "name": f"{package}:{name}"})
        self.noise = cast(Noise, installed().build("noises", protocol["noise"]))
        self.name, self.certifier, self.classes = name, cast(Certifier, certifier), classes
        self.radii = tuple(protocol.get("radii") or ())
        self.thresholds = tuple(threshold_of(self.noise, radius) for radius in self.radii)
        self.label = 0 if protocol.get("labels") else None
        version = installed().provenance("certifiers", f"{package}:{name}").version
        if package != "rscli" and recorded != version:
            raise PluginError(f"{package} is {version} here, was {recorded or 'unknown'}")
        self._selections: dict[tuple[int, bool], list[Counts]] = {}
        self._earlier: dict[tuple[bytes, int], list[tuple[int, int, bytes]]] = {}

    def fault(self, case: _Case, said: _Outcome) -> str | None:
        """What is wrong with a row that says `said` of `case`; None if it may be."""
        classes = self._classes(case)
        if isinstance(classes, str):
            return classes
        if classes > MANY_CLASSES and self.classes is None:
            return None
        question = Question(classes, self.thresholds, self.label)
        wanted = self.certifier.selection(question)
        if case.n0 != wanted:
            return f"n0 is {case.n0}, but under this protocol {wanted} samples select the class"
        starts = self._starts(case.n, question, wanted)
        if not starts:
            return self._no_look(case.n, question, wanted)
        counts, found = _spread(case.hits, case.runner_up, case.n, classes), None
        for start in starts:
            found = self._outcome(self._decide(question, start, [(counts, case.n)]))
            if found is not None and found.same(said):
                return None
            if any(said.same(other) for other in self._after_earlier(case, question, start, counts)):
                return None
        crowded = _crowded(case.hits, case.runner_up, case.n, classes)
        if any(found != self._outcome(self._decide(question, start, [(crowded, case.n)])) for start in starts[-1:]):
            return None  # it depends on counts that are not recorded
        return self._difference(case, said, found)

    def _classes(self, case: _Case) -> int | str:
        """How many classes there are, at least; a text if no number of them can have been given the samples."""
        rest = case.n - case.hits - case.runner_up
        if case.n and rest and not case.runner_up:
            return f"runner_up is 0, but {rest} of the {case.n} samples were given other classes than the one under test"
        others = 1 + (-(-rest // case.runner_up) if rest else 0)
        if self.classes is None:
            return max(1 + others, SOME_CLASSES)
        if 1 + others > self.classes and (case.runner_up or rest):
            least = -(-(case.n - case.hits) // max(self.classes - 1, 1))
            return f"runner_up is {case.runner_up}, but of {self.classes} classes one other has at least {least} samples"
        return self.classes

    def _starts(self, n: int, question: Question, wanted: int) -> list[Counts]:
        """Counts of the selection samples, each leading to another plan, after which a look at `n` is possible."""
        few = self._plans(question, wanted, every=False)
        starts = [counts for counts in few if self._looks(counts, question, n)]
        return starts or [counts for counts in self._plans(question, wanted, every=True) if self._looks(counts, question, n)]

    def _looks(self, counts: Counts, question: Question, n: int) -> bool:
        looks = self._plan(counts, question).looks
        return n in looks or (n == 0 and not looks)

    def _plan(self, counts: Counts, question: Question) -> Plan:
        return self.certifier.plan(counts.copy(), question)

    def _plans(self, question: Question, wanted: int, *, every: bool) -> list[Counts]:
        """Selection counts that choose class 0, one for each different plan; a few of them, or (almost) `every` one."""
        key = (question.classes, every)
        if key not in self._selections:
            found: dict[Any, Counts] = {}
            for counts in _selections(wanted, question, 3 if not every else MANY_PLANS):
                plan = self._plan(counts, question)
                if plan.candidate == 0:
                    found.setdefault((tuple(plan.looks), _state(plan)), counts)
            self._selections[key] = list(found.values())
        return self._selections[key]

    def _no_look(self, n: int, question: Question, wanted: int) -> str | None:
        """No selection gives a look at `n`: a text, if the plans depend on nothing but what was tried."""
        if wanted > MANY_PLANS:
            return None
        for counts in _selections(wanted, question, 50):
            other = np.sort(counts[1:])[::-1]
            crowded = np.concatenate([counts[:1], _crowd(int(other.sum()), int(counts[0]), question.classes - 1)])
            if self._plan(counts, question).looks != self._plan(crowded, question).looks:
                return None
        plans = {look for counts in self._plans(question, wanted, every=True) for look in self._plan(counts, question).looks}
        near = ", ".join(map(str, sorted(sorted(plans, key=lambda look: abs(look - n))[:3])))
        return f"n is {n}, but the certifier {self.name} does not look at so many samples under this protocol (near: {near})"

    def _decide(self, question: Question, start: Counts, looks: Sequence[tuple[Counts, int]]) -> Decision | None:
        """What is decided at the last of `looks` (counts, n); None if nothing is, or something before it."""
        plan = self._plan(start, question)
        decision = None
        for place, (counts, n) in enumerate(looks):
            decision = self.certifier.decide(counts.copy(), n, plan)
            if decision is not None and place < len(looks) - 1:
                return None
        return decision

    def _outcome(self, decision: Decision | None) -> _Outcome | None:
        if decision is None:
            return None
        certified, reason = decision.predict != ABSTAIN, " ".join(decision.reason.split())
        radius = certified_radius(decision, self.noise, self.radii)
        return _Outcome(certified, radius, reason, bool(decision.saturated))

    def _after_earlier(self, case: _Case, question: Question, start: Counts, counts: Counts) -> Iterator[_Outcome]:
        """What else may be decided at `n`, if an earlier look changed the certifier's state."""
        plan, tried = self._plan(start, question), set[bytes]()
        for look in plan.looks:
            if look >= case.n:
                return
            least, most = max(0, case.hits - (case.n - look)), min(look, case.hits)
            for low, high, state in self._states(question, start, look):
                hits = max(low, least)
                if hits > min(high, most) or state in tried:
                    continue
                tried.add(state)
                before = _spread(hits, -(-(look - hits) // (question.classes - 1)), look, question.classes)
                found = self._outcome(self._decide(question, start, [(before, look), (counts, case.n)]))
                if found is not None:
                    yield found

    def _states(self, question: Question, start: Counts, look: int) -> list[tuple[int, int, bytes]]:
        """The states in which a `look` that does not decide leaves the certifier: from so many hits, to so many, the state.

        Found by bisection: hits that leave the same state are taken to lie side by side.
        """
        key = (start.tobytes(), look)
        if key in self._earlier:
            return self._earlier[key]

        def state(hits: int) -> bytes:
            plan = self._plan(start, question)
            counts = _spread(hits, -(-(look - hits) // (question.classes - 1)), look, question.classes)
            decision = self.certifier.decide(counts, look, plan)
            return _state(plan) if decision is None else b"decided" + repr(decision).encode()

        found: list[tuple[int, int, bytes]] = []
        open_ = [(0, look, state(0), state(look))]
        while open_:
            low, high, first, last = open_.pop()
            if first == last:
                found.append((low, high, first))
            elif high - low == 1:
                found += [(low, low, first), (high, high, last)]
            else:
                middle = (low + high) // 2
                half = state(middle)
                open_ += [(low, middle, first, half), (middle, high, half, last)]
        self._earlier[key] = [one for one in found if not one[2].startswith(b"decided")]
        return self._earlier[key]

    def _difference(self, case: _Case, said: _Outcome, found: _Outcome | None) -> str:
        """What the row says, and what it must be."""
        given = f"{case.hits} of {case.n} samples (runner-up {case.runner_up})"
        if found is None:
            return f"{_shown(said)}, but {given} do not lead the certifier {self.name} to that under this protocol"
        if said.certified != found.certified:
            answer = "a certificate" if found.certified else "an abstention"
            return f"predict is {'a class' if said.certified else ABSTAIN}, but {given} give {answer} under this protocol"
        for name in ("reason", "saturated", "radius"):
            old, new = getattr(said, name), getattr(found, name)
            if old != new and not (name == "radius" and said.same(found._replace(reason=said.reason))):
                return f"{name} is {_cell(old)}, but under this protocol {given} give {_cell(new)}"
        return f"{_shown(said)}, but {given} give {_shown(found)} under this protocol"


def _state(plan: Plan) -> bytes:
    return pickle.dumps(plan.state)


def _selections(wanted: int, question: Question, most: int) -> Iterator[Counts]:
    """Counts of `wanted` selection samples that put class 0 first: at most so many of them, evenly spaced."""
    if wanted == 0 or question.label is not None:
        yield _spread(wanted, 0, wanted, question.classes)
        return
    fewest = -(-wanted // question.classes)
    for hits in sorted({round(place) for place in np.linspace(fewest, wanted, most).tolist()}, reverse=True):
        yield np.concatenate([[hits], _even(wanted - hits, question.classes - 1)]).astype(np.int64)


def _even(total: int, places: int) -> Counts:
    """`total` in `places` as equal as can be."""
    share, more = divmod(total, max(places, 1))
    found = np.full(places, share, np.int64)
    found[:more] += 1
    return found


def _crowd(total: int, most: int, places: int) -> Counts:
    """`total` in as few of `places` as can be, with at most `most` in each."""
    full, rest = divmod(total, most) if most else (0, 0)
    found = np.zeros(places, np.int64)
    found[:full] = most
    found[full : full + 1] = rest
    return found


def _spread(count: int, runner_up: int, n: int, classes: int) -> Counts:
    """Counts (classes,): `count` of class 0, `runner_up` of class 1, and the rest of `n` over the others, evenly."""
    if classes < 2:
        return np.array([count], np.int64)
    runner_up = min(runner_up, n - count)
    return np.concatenate([[count, runner_up], _even(n - count - runner_up, classes - 2)]).astype(np.int64)


def _crowded(count: int, runner_up: int, n: int, classes: int) -> Counts:
    """As `_spread`, but the rest in as few classes as can be."""
    if classes < 2:
        return np.array([count], np.int64)
    return np.concatenate([[count, runner_up], _crowd(n - count - runner_up, runner_up, classes - 2)]).astype(np.int64)


def _cell(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(int(value)) if isinstance(value, bool) else repr(value)


def _shown(outcome: _Outcome) -> str:
    what = f"a radius of {outcome.radius!r}" if outcome.certified else "an abstention"
    return f"{what}, reason {outcome.reason!r}, saturated {int(outcome.saturated)}"
