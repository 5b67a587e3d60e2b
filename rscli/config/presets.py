"""Finds presets: the *.toml files of the packages that announce themselves in the entry-point group `rscli.presets`.

A package is located without being imported, and a broken package or file is marked in the listing and harms nothing else. A
`published.csv` beside the presets holds the figures that they are to reproduce.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rscli import registry
from rscli.config.files import read_settings
from rscli.config.published import PublishedRow, read_table
from rscli.config.schema import PresetHeader
from rscli.errors import InputError, PluginError, did_you_mean


@dataclass(frozen=True)
class PresetInfo:
    """A line of the listing. `name` is `package:name` where two packages ship one; `problem` says why it cannot be used."""

    name: str
    package: str
    version: str
    title: str
    problem: str | None = None


@dataclass(frozen=True)
class Preset:
    """A preset file: what it says about itself, and its settings."""

    name: str
    package: str
    version: str
    path: Path
    header: PresetHeader
    settings: dict[str, Any]


@dataclass(frozen=True)
class _File:
    """Where a preset is, unread; or, without a path, why a package has none."""

    name: str
    entry: registry.Entry
    path: Path | None
    problem: str | None = None


def list_presets() -> list[PresetInfo]:
    """Every preset of every installed package, by name; what is broken (a table of published figures, too) with its problem."""
    files = _files()
    return [_info(file) for file in files] + [info for file in _one_a_folder(files) if (info := _broken_table(file))]


def load_preset(name: str) -> Preset:
    """The preset called `name`, or `package:name`. Raises `InputError` if it is unknown (naming the nearest) or broken."""
    return _load(_find(name))


def show(name: str) -> str:
    """The text of a preset's file, its comments included. Raises `InputError` as `load_preset` does, if it is unknown."""
    return _path(_find(name)).read_text(encoding="utf-8")


def published_rows() -> list[PublishedRow]:
    """Every row of every `published.csv` that lies beside presets; broken tables are left out (the listing marks them)."""
    return [row for file in _one_a_folder(_files()) if not _broken_table(file) for row in read_table(_table(file))]


def published_for(preset: str) -> PublishedRow | None:
    """The published figures that a preset is to reproduce; None if it names none.

    Raises `InputError` if the preset is unknown, or names a row that no table has.
    """
    key = load_preset(preset).header.published
    if key is None:
        return None
    row = next((row for row in published_rows() if row.key == key), None)
    if row is None:
        raise InputError(
            f"the preset {preset} refers to published figures that are in no table: {key}", "Fix its [preset.published]."
        )
    return row


def _files() -> list[_File]:
    """Every preset file that can be located, and one entry without a path for a package that cannot."""
    files = [file for entry in registry.installed().entries("presets") for file in _of_package(entry)]
    shared = {name for name, count in Counter(file.name for file in files).items() if count > 1}
    named = [_File(f"{f.entry.package}:{f.name}", f.entry, f.path, f.problem) if f.name in shared else f for f in files]
    return sorted(named, key=lambda file: file.name)


def _of_package(entry: registry.Entry) -> Iterator[_File]:
    module = entry.target.partition(":")[0]
    try:
        folders = _locate(module)
        problem = None if folders else f"there is no package {module}"
    except Exception as cause:  # a finder of somebody else's, or a name that is none
        folders, problem = [], f"{module} cannot be located: {type(cause).__name__}: {cause}"
    if problem:
        yield _File(entry.name, entry, None, problem)
    for folder in folders:
        for path in sorted(Path(folder).glob("*.toml")):
            yield _File(path.stem, entry, path)


def _locate(module: str) -> list[str]:
    """The folders of a package. Not even its parents are imported, as `find_spec` would: they may do anything."""
    first, *rest = module.split(".")
    spec = find_spec(first)
    for name in rest:
        if spec is None:
            break
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations or []))
    return list(spec.submodule_search_locations or []) if spec else []


def _one_a_folder(files: list[_File]) -> list[_File]:
    return list({file.path.parent: file for file in files if file.path}.values())


def _table(file: _File) -> Path:
    return _path(file).parent / "published.csv"


def _broken_table(file: _File) -> PresetInfo | None:
    """The line of the listing for the table beside `file`, if it is there and broken."""
    try:
        read_table(_table(file))
    except InputError as error:
        return PresetInfo("published.csv", file.entry.package, file.entry.version, "", error.message)
    return None


def _info(file: _File) -> PresetInfo:
    title, problem = "", file.problem
    if file.path is not None:
        try:
            title = _load(file).header.title
        except InputError as error:
            problem = error.message
    return PresetInfo(file.name, file.entry.package, file.entry.version, title, problem)


def _find(name: str) -> _File:
    files = _files()
    found = [file for file in files if name in (file.name, f"{file.entry.package}:{file.name}")]
    if found:
        return found[0]
    shared = [file.name for file in files if file.name.endswith(f":{name}")]
    if shared:
        raise InputError(f"{len(shared)} packages ship a preset {name!r}", f"Write {' or '.join(shared)}.")
    near = difflib.get_close_matches(name, [file.name for file in files], n=1)
    raise InputError(f"there is no preset {name!r}", did_you_mean(near, "`rscli presets` lists them."))


def _path(file: _File) -> Path:
    if file.path is None:
        raise PluginError(f"the presets {file.name!r} of {file.entry.package} cannot be used: {file.problem}", _fix(file))
    return file.path


def _load(file: _File) -> Preset:
    path = _path(file)
    settings = read_settings(path)
    try:
        header = PresetHeader.model_validate(settings.pop("preset", {}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(["preset", *map(str, first["loc"])])
        raise InputError(f"the preset {file.name} is broken: {where}: {first['msg']} ({path})", _fix(file)) from error
    return Preset(file.name, file.entry.package, file.entry.version, path, header, settings)


def _fix(file: _File) -> str:
    return f"Update or uninstall {file.entry.package} {file.entry.version}; other presets are not affected."
