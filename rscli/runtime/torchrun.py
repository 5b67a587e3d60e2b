"""The environment in which torchrun, or a cluster's own launcher, starts processes: read here, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from rscli.errors import InputError

LEFTOVER = "Start it with torchrun, which sets all of these variables, or unset WORLD_SIZE and RANK."
SECONDS = "RSCLI_RENDEZVOUS_SECONDS"
"""How long processes wait for each other in the beginning."""


@dataclass(frozen=True)
class Launch:
    """Which of how many processes this is, and where they meet (`address` and `port` are empty if there is one).

    `kept` says that torchrun keeps the key-value store there; `note` what was ignored, if anything was.
    """

    rank: int = 0
    world: int = 1
    address: str = ""
    port: int = 0
    kept: bool = False
    attempt: str = "0"
    note: str | None = None


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes there are: 1 if nothing is said. Raises `InputError` for a value that cannot be."""
    return _whole(environment, "WORLD_SIZE", 1, None) or 1


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """What the variables say; empty ones count as unset, and without WORLD_SIZE the process is alone, whatever RANK says.

    Raises `InputError`, naming the variable, for a value that cannot be.
    """
    world = _whole(environment, "WORLD_SIZE", 1, None)
    if world is None:
        left = environment.get("RANK", "").strip()
        note = f"RANK is {left!r}, but WORLD_SIZE is not set: RANK is ignored, and this process works alone"
        return Launch(note=None if left in ("", "0") else note)
    rank = _whole(environment, "RANK", 0, world - 1, f", as WORLD_SIZE is {world}")
    if world == 1:
        return Launch()
    address, port = environment.get("MASTER_ADDR", "").strip(), _whole(environment, "MASTER_PORT", 1, 65535)
    for name, value in (("RANK", rank), ("MASTER_ADDR", address or None), ("MASTER_PORT", port)):
        if value is None:
            raise InputError(f"WORLD_SIZE is {world}, but {name} is not set", LEFTOVER)
    kept = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Launch(rank or 0, world, address, port or 0, kept, environment.get("TORCHELASTIC_RESTART_COUNT", "0"))


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether no other process speaks for this one; so it is, too, where the variables cannot be understood."""
    try:
        return launched(environment).rank == 0
    except InputError:
        return True


def local_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Which of the processes of this machine this is. Raises `InputError` for a value that cannot be."""
    return _whole(environment, "LOCAL_RANK", 0, None) or 0


def patience(environment: Mapping[str, str] = os.environ) -> int:
    """Seconds to wait for the other processes in the beginning; 600 if nothing is said. Raises `InputError` for odd values."""
    return _whole(environment, SECONDS, 1, None) or 600


def _whole(environment: Mapping[str, str], name: str, least: int, most: int | None, why: str = "") -> int | None:
    """The whole number in a variable; None if it is not set, or empty."""
    text = environment.get(name, "").strip()
    if not text:
        return None
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
    if value is None or value < least or (most is not None and value > most):
        limits = f"of {least} or more" if most is None else f"from {least} to {most}"
        hint = LEFTOVER if name != SECONDS else None
        raise InputError(f"the environment variable {name} is {text!r}, but must be a whole number {limits}{why}", hint)
    return value
