"""Checkpoints of other code, read into tensors and what else they say; nothing in them is ever executed.

The code of Cohen et al. 2019, and all that builds on it, saves a dict with `arch`, `state_dict`, `epoch` and `optimizer`.
MACER's saves `net` and `epoch`. Plain state dicts, of timm or torchvision say, are read as well. Files are loaded with
`weights_only`: tensors and plain values, never code. What wants more is refused, with a way out for those who trust it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rscli.errors import InputError
from rscli.system import open_regular, utf8_name

STATE_KEYS = ("state_dict", "net", "model", "model_state_dict")
"""Where a checkpoint keeps its tensors; MACER's is `net`."""

COPY = "Copy or download it again."


@dataclass(frozen=True)
class Checkpoint:
    """A foreign file, read: its tensors, the key they were under (None: at the top), and what else it says."""

    path: Path
    tensors: dict[str, Tensor]
    key: str | None = None
    arch: str | None = None
    epochs: int | None = None


def read_checkpoint(path: Path) -> Checkpoint:
    """The tensors in a file of `torch.save`, or in a safetensors file, on the CPU, and what the file says of them.

    Raises `InputError` if the file is missing or broken, if its pickle wants more than tensors and plain values (nothing of
    it is then executed), or if it holds no state dict.
    """
    open_regular(path, "checkpoint").close()
    if path.suffix == ".safetensors":
        return Checkpoint(path, _read_safetensors(path))
    content = _read_torch(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint: a dict of tensors, or with a state_dict")
    key = next((key for key in STATE_KEYS if isinstance(content.get(key), Mapping)), None)
    state = content if key is None else content[key]
    tensors = {str(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if not tensors:
        where = f"under {key!r}" if key else f"in it or under {', '.join(STATE_KEYS)}"
        raise InputError(f"{path} has no tensors {where}; its keys are: {', '.join(map(str, content)) or 'none'}")
    if key is None:
        return Checkpoint(path, tensors)
    arch, epochs = content.get("arch"), content.get("epoch")
    return Checkpoint(
        path, tensors, key, arch if isinstance(arch, str) else None, epochs if type(epochs) is int and epochs >= 0 else None
    )


def _read_torch(path: Path) -> Any:
    with path.open("rb") as file:
        if file.read(1) not in (b"P", b"\x80"):  # a zip archive, and before torch 1.6 a pickle
            raise InputError(f"{path} is not a whole checkpoint of torch.save: it begins otherwise", COPY)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice to whoever wrote the file
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as cause:  # a damaged pickle trips the reader with exceptions of any type
        if isinstance(cause, UnpicklingError) or "TorchScript" in str(cause):
            raise _refused(path, str(cause)) from cause
        reason = (str(cause) or type(cause).__name__).splitlines()[0]
        raise InputError(f"{path} is not a whole checkpoint of torch.save: {reason}", COPY) from cause


def _refused(path: Path, reason: str) -> InputError:
    """What to do about a pickle that torch's restricted reader does not read."""
    found = re.search(r"GLOBAL (\S+)", reason)
    what = f" ({found[1]})" if found else ", or is a pickle that torch's safe reader does not know"
    return InputError(
        f"refused: {path} contains code or objects beyond tensors{what}; nothing of it was executed",
        "Often these are harmless: numpy numbers in the state of the optimiser, or a whole module instead of its state dict. "
        "If you trust whoever made the file, write what is needed to a new one, and import that. This runs the file's code:\n"
        f"  import torch; c = torch.load({str(path)!r}, map_location='cpu', weights_only=False)\n"
        "  c = {'state_dict': c.state_dict()} if hasattr(c, 'state_dict') else c\n"
        f"  torch.save({{k: c[k] for k in {('arch', 'epoch', *STATE_KEYS)} if k in c}}, 'weights.pth')",
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with utf8_name(path) as name, safe_open(name, framework="pt") as file:
            if "rscli" in (file.metadata() or {}):
                raise InputError(f"{path} is one of rscli's model files already", "certify and predict read it as it is.")
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as cause:
        raise InputError(f"{path} is not a whole safetensors file: {cause}", COPY) from cause
