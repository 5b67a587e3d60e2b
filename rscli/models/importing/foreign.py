"""Checkpoints of other code, read into tensors and what else they say; nothing in them is ever executed.

The code of Cohen et al. 2019, and all that builds on it, saves a dict with `arch`, `state_dict`, `epoch` and `optimizer`.
MACER's saves `net` and `epoch`. Plain state dicts, of timm or torchvision say, are read as well. Files are loaded with
`weights_only`: tensors and plain values, never code. What wants more is refused, with a way out for those who trust it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rscli.errors import InputError
from rscli.models.importing.harmless import HARMLESS, NumpyArray
from rscli.models.importing.kinds import COPY, kind_of

STATE_KEYS = ("state_dict", "net", "model", "model_state_dict", "model_state", "network", "weights", "params", "module")
"""Where a checkpoint keeps its tensors; MACER's is `net`. One may be inside another."""

EMA = re.compile(r"(^|_)ema(_|$)", re.IGNORECASE)
"""What names an exponential moving average of the weights: `ema`, `model_ema`, `state_dict_ema`, `ema_model`."""


@dataclass(frozen=True)
class Checkpoint:
    """A foreign file, read: its tensors, the key they were under (None: at the top), and what else it says.

    `outside`: the tensors that are not below the wanted prefix. `note`: which of several weights were taken, if there are.
    """

    path: Path
    tensors: dict[str, Tensor]
    key: str | None = None
    arch: str | None = None
    epochs: int | None = None
    outside: dict[str, Tensor] = field(default_factory=dict)
    note: str = ""


def read_checkpoint(path: Path, *, ema: bool = False, prefix: str = "", ignore: Sequence[str] = ()) -> Checkpoint:
    """The tensors in a file of `torch.save`, or in a safetensors file, on the CPU, and what the file says of them.

    `ema`: the moving average of the weights instead of the plain ones; `prefix`: only the tensors below it; `ignore`: without
    those whose names match one of these patterns (`criterion.*`). Raises `InputError` if the file is missing or broken, if its
    pickle wants more than tensors and plain values (nothing of it is then executed), or if it lacks what is asked for.
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    if kind_of(path) == "safetensors":
        content: Any = _read_safetensors(path)
    else:
        content = _read_torch(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dict of tensors, or one with a state_dict")
    found = _choose(path, content, ema)
    arch, epochs = content.get("arch"), content.get("epoch")
    if found.key is not None:
        known = epochs if type(epochs) is int and epochs >= 0 else None
        found = replace(found, arch=arch if isinstance(arch, str) else None, epochs=known)
    return _select(replace(found, tensors=_uncompiled(path, found.tensors)), prefix, ignore)


def _choose(path: Path, content: Mapping[Any, Any], ema: bool) -> Checkpoint:
    """The plain weights or their moving average, and a note if the file has both."""
    averaged = {str(key): state for key, value in content.items() if EMA.search(str(key)) and (state := _state(value))}
    key = next((key for key in STATE_KEYS if _state(content.get(key))), None)
    plain, inside = _split_ema(_tensors(content) if key is None else _state(content[key]))
    if inside:
        averaged.setdefault(next(part for part in next(iter(inside)).split(".") if EMA.search(part)), inside)
    if ema and not averaged:
        raise InputError(f"{path} has no EMA weights, which --ema asks for", "Leave out --ema to import its plain weights.")
    if not plain and not averaged:
        where = next((f"under {key!r}" for key in STATE_KEYS if isinstance(content.get(key), Mapping)), None)
        where = where or f"in it or under {', '.join(STATE_KEYS)}"
        raise InputError(f"{path} has no tensors {where}; its keys are: {', '.join(map(str, content)) or 'none'}")
    if not averaged:
        return Checkpoint(path, plain, key)
    name, weights = next(iter(averaged.items()))
    if ema or not plain:
        why = "as --ema asks" if plain else "the only weights in it"
        return Checkpoint(path, weights, name, note=f"imported the EMA weights of {path}, under {name!r}, {why}")
    where = f"under {key!r}" if key else "at the top"
    note = f"{path} also has EMA weights, under {name!r}; the plain ones, {where}, are imported. --ema imports the EMA weights"
    return Checkpoint(path, plain, key, note=note)


def _state(value: Any, depth: int = 2) -> dict[str, Tensor]:
    """The tensors in a state dict, or in one under a well-known key of it; none if there are none."""
    if not isinstance(value, Mapping):
        return {}
    inner = (_state(value.get(key), depth - 1) for key in STATE_KEYS if depth)
    return _tensors(value) or next((state for state in inner if state), {})


def _tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    plain = {str(name): value.tensor if isinstance(value, NumpyArray) else value for name, value in state.items()}
    return {name: value for name, value in plain.items() if isinstance(value, Tensor)}


def _split_ema(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The plain tensors, and those of a moving average in the same state dict: behind a prefix such as `ema_model.`.

    A network may have layers that are called `ema`: a moving average has about as many tensors as
    the plain weights, by the same names (perhaps with `module.` before them).
    """
    inside = {name for name in tensors if any(EMA.search(part) for part in name.split("."))}
    plain = {name: tensor for name, tensor in tensors.items() if name not in inside}
    known = {".".join(name.split(".")[start:]) for name in plain for start in range(len(name.split(".")))}
    twice = {name for name in inside if known & {_behind_ema(name), _behind_ema(name).partition(".")[2]}}
    if 2 * len(twice) <= max(len(inside), len(plain)) or not plain:
        return tensors, {}
    return plain, {name: tensors[name] for name in twice}


def _behind_ema(name: str) -> str:
    parts = name.split(".")
    last = max(place for place, part in enumerate(parts) if EMA.search(part))
    return ".".join(parts[last + 1 :])


def _uncompiled(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what torch.compile puts into their names, at any place."""
    out = {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): tensor for name, tensor in tensors.items()}
    if len(out) < len(tensors):
        raise InputError(f"{path} has tensors twice, with and without _orig_mod.", "Save the state dict of a single network.")
    return out


def _select(found: Checkpoint, prefix: str, ignore: Sequence[str]) -> Checkpoint:
    """Only the tensors below `prefix`, and none that `ignore` names."""
    tensors = found.tensors
    for pattern in ignore:
        kept = {name: tensor for name, tensor in tensors.items() if not fnmatchcase(name, pattern)}
        if len(kept) == len(tensors):
            raise InputError(f"--ignore {pattern!r} matches no tensor of {found.path}", f"It has: {_begin(tensors)}.")
        tensors = kept
    if prefix and not prefix.endswith("."):
        prefix += "."
    below = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not below:
        what = f"no tensor below --prefix {prefix!r}" if prefix else "no tensor left: --ignore leaves out all of them"
        raise InputError(f"{found.path} has {what}", f"It has: {_begin(found.tensors)}.")
    return replace(found, tensors=below, outside={name: t for name, t in tensors.items() if name not in below})


def _begin(tensors: Mapping[str, Tensor]) -> str:
    """What the names of tensors begin with, a few of them."""
    starts = list(dict.fromkeys(f"{name.partition('.')[0]}.*" if "." in name else name for name in tensors))
    return ", ".join(starts[:8]) + (", ..." if len(starts) > 8 else "")


def _read_torch(path: Path) -> Any:
    try:
        # An open file: by its path, torch would take a .safetensors file for one, whatever is in it.
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS), path.open("rb") as file:
            warnings.simplefilter("ignore")  # torch's advice to whoever wrote the file
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as cause:  # a damaged pickle trips the reader with exceptions of any type
        if isinstance(cause, UnpicklingError) or "TorchScript" in str(cause):
            raise _refused(path, str(cause)) from cause
        reason = (str(cause) or type(cause).__name__).splitlines()[0]
        raise InputError(f"{path} is not a complete torch.save checkpoint: {reason}", COPY) from cause


def _refused(path: Path, reason: str) -> InputError:
    """What to do about a pickle that torch's restricted reader does not read."""
    found = re.search(r"GLOBAL (\S+)", reason)
    what = (
        f" ({found[1]})"
        if found
        else " (a TorchScript program)"
        if "TorchScript" in reason
        else ", or is a pickle that torch's safe reader does not know"
    )
    return InputError(
        f"refused: {path} contains code or objects beyond tensors{what}; none of it was executed",
        "These are often harmless: a whole module instead of its state dict, or a class of the author's. If you trust whoever "
        "made the file, save its tensors and numbers to a new one, and import that. The following runs the file's code:\n"
        f"{_way_out(path)}",
    )


def _way_out(path: Path) -> str:
    """Code that writes what is plain in `path` to a new file beside it, and never over another."""
    stem = path.name.split(".")[0] or path.name
    names = [f"{stem}-weights.pth", *(f"{stem}-weights-{number}.pth" for number in range(2, 1000))]
    new = next((path.with_name(name) for name in names if not path.with_name(name).exists()), path.with_name(names[-1]))
    return (
        f"  import torch; c = torch.load(open({str(path)!r}, 'rb'), map_location='cpu', weights_only=False)\n"
        "  c = (f := lambda v: None if isinstance(v, type) else f(v.state_dict()) if hasattr(v, 'state_dict') else "
        "{str(k): f(w) for k, w in v.items()} "
        "if hasattr(v, 'items') else v if type(v) in (str, int, float) or getattr(v, 'dtype', object) != object else None)(c)\n"
        f"  torch.save(c, open({str(new)!r}, 'xb'))"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            if "rscli" in (file.metadata() or {}):
                raise InputError(f"{path} is already a model file of rscli", "certify and predict read it as it is.")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as cause:
        raise InputError(f"{path} is not a complete safetensors file: {cause}", COPY) from cause
