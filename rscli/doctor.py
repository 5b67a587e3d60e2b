"""What this machine has and can do, and what to do about what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from pydantic import ValidationError

from rscli.api import Dataset, Finding
from rscli.config.presets import list_presets
from rscli.errors import PluginError, RscliError
from rscli.plugin_trial import descriptions
from rscli.registry import Entry, installed, load_entry, problems
from rscli.runtime.devices import device_name, emulated, versions
from rscli.runtime.guard import broken, calling


def examine(data_dir: Path) -> dict[str, list[Finding]]:
    """The findings, by heading. Trains nothing, reads no images, changes nothing."""
    told = descriptions(entry for entry in installed().entries() if entry.kind != "presets")
    return {
        "versions": list(_versions()),
        "devices": list(_devices()),
        f"data sets under {data_dir}": list(_datasets(data_dir, told)),
        "plugins": list(_plugins(told)),
    }


def _versions() -> Iterator[Finding]:
    for package, version in versions().items():
        missing = version == "missing"
        yield Finding(not missing, f"{package} {version}", f"pip install {package}" if missing else None)


def _devices() -> Iterator[Finding]:
    yield Finding(True, f"cpu: {device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads{_abilities('cpu')}")
    for number in range(torch.cuda.device_count()):
        yield Finding(True, f"cuda:{number}: {device_name(torch.device('cuda', number))}{_abilities('cuda')}")
    if torch.backends.mps.is_available():
        yield Finding(True, f"mps{_abilities('mps')}")
    if torch.version.cuda and not torch.cuda.is_available():
        hint = "Nothing to do on a machine without an NVIDIA GPU; elsewhere, check the driver with nvidia-smi."
        yield Finding(True, f"cuda: this torch was built for CUDA {torch.version.cuda}, but finds no GPU", hint)


def _abilities(kind: str) -> str:
    """Whether the device multiplies in bf16 and whether torch.compile is there, by trying."""
    able = []
    try:
        small = torch.ones(8, 8, device=kind)
        with torch.autocast(kind, torch.bfloat16):
            works = (small @ small).dtype == torch.bfloat16
        able.append(_half("bf16", kind) if works else "no bf16")
        if kind == "cpu":
            able.append(_half("fp16", kind))
    except (RuntimeError, ValueError, TypeError):
        able.append("no bf16")
    able.append("compile" if _compiles(kind) else "no compile")
    return f" ({', '.join(able)})"


def _half(precision: str, kind: str) -> str:
    slow = emulated(precision, torch.device(kind))
    return f"slow {precision}: emulated, fp32 is faster" if slow else precision


def _compiles(kind: str) -> bool:
    """torch.compile needs a C++ compiler on the CPU, and Triton on CUDA."""
    if kind == "cuda":
        return find_spec("triton") is not None
    if kind == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            return bool(get_cpp_compiler())
        except (RuntimeError, OSError):
            return False
    return False


def _datasets(data_dir: Path, told: dict[Entry, str | PluginError]) -> Iterator[Finding]:
    if not data_dir.is_dir():
        hint = "Create it, or name another with --data-dir or RSCLI_DATA_DIR; the data set `digits` needs none."
        yield Finding(False, f"there is no folder {data_dir}", hint)
    for entry in installed().entries("datasets"):
        if isinstance(told[entry], PluginError):
            continue  # listed as a plugin; its import may end the process
        try:
            dataset = cast(Dataset, load_entry(entry)())
        except (RscliError, ValidationError):
            continue  # some need settings that only the user knows
        try:
            with calling(dataset, "check"):
                found = list(dataset.check(data_dir))
            if not all(isinstance(finding, Finding) for finding in found):
                raise broken(dataset, "check", f"returned {found!r:.80}, which are not findings")
            yield from found
        except RscliError as error:  # somebody else's code: it must not take the other findings with it
            yield Finding(False, error.message, f"Update {entry.package}.")


def _plugins(told: dict[Entry, str | PluginError]) -> Iterator[Finding]:
    broken = 0
    for problem in problems():
        broken += 1
        yield Finding(False, str(problem), problem.hint)
    for answer in told.values():
        if isinstance(answer, PluginError):
            broken += 1
            yield Finding(False, answer.message, answer.hint)
    for preset in list_presets():
        if preset.problem is not None:
            broken += 1
            yield Finding(False, f"preset {preset.name} of {preset.package}: {preset.problem}")
    if not broken:
        yield Finding(True, f"all {len(installed().entries())} entry points load")
