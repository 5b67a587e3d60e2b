"""The runs that one `rscli train` asks for: settings, seeds and sweeps, each with its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rscli.errors import InputError

if TYPE_CHECKING:
    from rscli.config.layers import Resolved
    from rscli.training.train import TrainOptions


@dataclass(frozen=True)
class PlannedRun:
    """One run; `point` says which point of a sweep it is."""

    resolved: Resolved
    options: TrainOptions
    point: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What tells it from the other runs of the command."""
        return ", ".join([*(f"{key} = {value}" for key, value in self.point.items()), f"seed {self.resolved.config.seed}"])


def plan(
    *,
    preset: str | None,
    config: Path | None,
    sets: Sequence[str],
    flags: Mapping[str, Any],
    seeds: Sequence[int | None],
    several: bool,
    points: Sequence[dict[str, str]],
    out: Path | None,
    options: TrainOptions,
) -> list[PlannedRun]:
    """A run for each of `points` (of a sweep) and `seeds`, the seeds fastest. `out` is the run folder itself, unless there are
    `several` runs, whose folders it then holds. Raises `InputError` for wrong settings, and if two runs had the same folder.
    """
    from rscli.config.layers import resolve
    from rscli.config.run_names import name_of, point_name

    runs = []
    swept = {key: None for point in points for key in point}
    for point in points:
        chosen = [*sets, *(f"{key}={value}" for key, value in point.items())]
        for seed in seeds:
            one = resolve(preset=preset, config_file=config, sets=chosen, flags={**flags, "seed": seed})
            folder = out or Path("runs") / name_of(one, preset, config, swept)
            if point:
                folder /= point_name(one, point)
            if out is None or several:
                folder /= f"seed{one.config.seed}"
            runs.append(PlannedRun(one, replace(options, out=folder), point))
    folders = [run.options.out for run in runs]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise InputError(f"two runs of the sweep would go to {twice}: they have the same settings", "Give each value once.")
    return [_as_it_was_called(run, preset) for run in runs] if options.resume and out is None and not swept else runs


def _as_it_was_called(run: PlannedRun, preset: str | None) -> PlannedRun:
    """`run`; or, to resume, in the folder that an older version of rscli began it in, named after the preset alone."""
    from rscli.config.run_names import older_name
    from rscli.training.run_folder import RunFolder
    from rscli.training.train import record_of

    now = RunFolder(run.options.out)
    older = RunFolder(Path("runs") / older_name(run.resolved, preset) / now.path.name)
    if older.path == now.path or now.config.exists() or not older.config.exists():
        return run
    try:
        older.admit(record_of(run.resolved), resume=True)
    except InputError:  # it is another run
        return run
    return replace(run, options=replace(run.options, out=older.path))


def check_folders(runs: Sequence[PlannedRun]) -> None:
    """Raises `InputError` if one of several folders would be refused: better now than after hours with the runs before it."""
    from rscli.training.run_folder import RunFolder
    from rscli.training.train import record_of

    how = runs[0].options
    used = [str(run.options.out) for run in runs if RunFolder(run.options.out).config.exists()]
    if used and not (how.resume or how.overwrite):
        hint = "Add --resume to continue it, --overwrite to replace it, or choose another folder with --out."
        raise InputError(f"there is already a training run in {', '.join(used)}", hint)
    for run in runs:
        RunFolder(run.options.out).admit(record_of(run.resolved), resume=how.resume, overwrite=how.overwrite)
