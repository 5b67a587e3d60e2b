"""What run folders say of their runs: how far each is, whether somebody works on it, and why it ended."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rscli.errors import InputError, RscliError
from rscli.runtime.files import read_json
from rscli.runtime.run_files import RunFiles

LARGEST_LOG = 256 * 2**20
"""Bytes of a log that are read, at most."""

LAST_EPOCHS = 5
"""Epochs whose mean duration says how long the rest takes."""

CERTIFIED = re.compile(r"certified_(\d+(?:\.\d+)?)")
"""How a probe calls the certified accuracy at a radius."""


@dataclass(frozen=True)
class RunState:
    """A run as its folder shows it.

    `state` is running, stopped, finished, failed or broken (a folder that cannot be read); `why` says more. `epochs` are done,
    of `all_epochs`. `loss` and `accuracy` (under noise, in [0, 1]) are those of the last epoch, `certified` the last certified
    accuracies of a probe by radius, after `certified_epoch` epochs. `seconds_left` is at the pace of the last epochs. `updated`
    is when something was last written (ISO 8601, UTC). What is unknown is None. `lines` is the log.
    """

    path: Path
    state: str
    why: str | None = None
    epochs: int | None = None
    all_epochs: int | None = None
    loss: float | None = None
    accuracy: float | None = None
    certified: dict[str, float] = field(default_factory=dict)
    certified_epoch: int | None = None
    images_per_s: float | None = None
    seconds_left: float | None = None
    updated: str | None = None
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    lines: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the configuration and the log."""
        told = {key: value for key, value in vars(self).items() if key not in ("path", "config", "lines")}
        return {"folder": str(self.path), **told}


def find_runs(roots: Sequence[Path]) -> list[RunState]:
    """The runs at and below the folders `roots`, in natural order. Raises `InputError` if a root is no folder."""
    for root in roots:
        if not root.is_dir():
            hint = "Name a folder that holds run folders, such as runs."
            raise InputError(f"there is no folder {root}" if not root.exists() else f"{root} is no folder", hint)
    folders = dict.fromkeys(folder for root in roots for folder in _folders(root))
    return [look(folder) for folder in sorted(folders, key=_natural)]


def _folders(root: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        found = RunFiles(Path(folder))
        marks = {each.name for each in (found.config, found.running, found.failed, found.checkpoint, found.metrics)} & {*files}
        if marks - {found.config.name} or (marks and _is_a_run(found.config)):
            yield found.path


def _is_a_run(config: Path) -> bool:
    """Whether a config.json that stands alone may be a run's: models of other libraries have one, too."""
    try:
        value = read_json(config, "configuration")
    except RscliError:
        return True  # its line says what is wrong
    return isinstance(value, dict) and isinstance(value.get("config"), dict)


def _natural(path: Path) -> list[tuple[int, str]]:
    """seed2 before seed10."""
    return [(int(digits or 0), word) for word, digits in re.findall(r"(\D*)(\d*)", str(path))]


def look(folder: Path) -> RunState:
    """The state of the run in `folder`; whatever is wrong with the folder is in its `why`."""
    files = RunFiles(folder)
    try:
        recorded = read_json(files.config, "configuration of the run")
        config = recorded.get("config") if isinstance(recorded, dict) else None
        if not isinstance(config, dict):
            return RunState(folder, "broken", f"{files.config} is not the configuration of a run")
        lines = read_log(folder, config)
        return _state(files, config, lines)
    except RscliError as error:
        return RunState(folder, "broken", error.message)
    except OSError as cause:
        return RunState(folder, "broken", f"{cause.strerror or cause}: {cause.filename or folder}")


def _state(files: RunFiles, config: dict[str, Any], lines: list[dict[str, Any]]) -> RunState:
    every = config.get("epochs")
    every = every if type(every) is int else None
    state, why = _progress(files)
    done = lines[-1]["epoch"] if lines else (every if state == "finished" else None if files.checkpoint.exists() else 0)
    last = lines[-1] if lines else {}
    probed: dict[str, Any] = next((line for line in reversed(lines) if any(map(CERTIFIED.fullmatch, line))), {})
    return RunState(
        path=files.path,
        state=state,
        why=why,
        epochs=done,
        all_epochs=every,
        loss=_number(last, "loss"),
        accuracy=_number(last, "accuracy"),
        certified={
            found[1]: value
            for key in probed
            if (found := CERTIFIED.fullmatch(key)) and (value := _number(probed, key)) is not None
        },
        certified_epoch=probed.get("epoch"),
        images_per_s=_number(last, "images_per_s"),
        seconds_left=_left(lines, done, every) if state in ("running", "stopped") else None,
        updated=_updated(files, config),
        config=config,
        lines=lines,
    )


def _progress(files: RunFiles) -> tuple[str, str | None]:
    """The state of a run that has a configuration, and what there is to say of it."""
    worker = files.worker()
    if worker is not None and worker.alive is not False:
        return "running", worker.text if worker.alive else f"{worker.text}, as far as can be told from here"
    if files.model.exists():
        return "finished", None
    if files.failed.exists():
        return "failed", files.failed.read_text(encoding="utf-8", errors="replace")[:2000].strip().splitlines()[0]
    go_on = "--resume goes on" if files.checkpoint.exists() else "nothing is saved yet; --resume begins again"
    if files.running.exists():
        gone = "" if worker is None else f" ({worker.text} is gone)"
        return "failed", f"killed, or crashed{gone}; {go_on}"
    return "stopped", go_on


def _left(lines: Sequence[Mapping[str, Any]], done: int | None, every: int | None) -> float | None:
    """Seconds that the epochs to come take, at the mean pace of the last ones."""
    paces = [pace for line in lines[-LAST_EPOCHS:] if (pace := _number(line, "seconds")) is not None]
    if not paces or done is None or every is None:
        return None
    return max(every - done, 0) * sum(paces) / len(paces)


def _updated(files: RunFiles, config: Mapping[str, Any]) -> str | None:
    times = [file.stat().st_mtime for file in (*files.files(), *files.logs(config), files.failed) if file.exists()]
    return datetime.fromtimestamp(max(times), UTC).isoformat(timespec="seconds") if times else None


def _number(line: Mapping[str, Any], key: str) -> float | None:
    """The finite number under `key`."""
    value = line.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e308 else None  # not NaN, either


def read_log(folder: Path, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of a run's log, one an epoch, increasing; empty if it keeps none that can be read as JSON lines.

    Lines that are no such thing are left out: the last one may be torn. Raises `OSError` if the system refuses.
    """
    path = next((path for path in RunFiles(folder).logs(config) if path.is_file()), None)
    if path is None or path.stat().st_size > LARGEST_LOG:
        return []
    found: dict[int, dict[str, Any]] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and type(line.get("epoch")) is int and line["epoch"] >= 1:
                found[line["epoch"]] = line
    return [found[epoch] for epoch in sorted(found)]


def series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The epochs that have a number under `key`, and the numbers."""
    points = [(line["epoch"], value) for line in lines if (value := _number(line, key)) is not None]
    return [epoch for epoch, _ in points], [value for _, value in points]
