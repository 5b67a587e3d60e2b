"""Where every random number comes from: keys, not states.

Each random draw of the engine (the order of an epoch, the noise of an optimiser step, a block of certification noise) uses a
generator seeded with a key derived from the run's seed and what the draw is for. No generator state has to be saved: a resumed
run, another order of the images or another number of processes repeats the same numbers by deriving the same keys.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *parts: str | int) -> int:
    """A 63-bit key for `parts` under `seed`, the same on every machine (BLAKE2b; distinct parts give independent keys)."""
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(device: torch.device | str, seed: int, *parts: str | int) -> torch.Generator:
    """A torch generator on `device`, seeded with the key of `parts`."""
    import torch

    made = torch.Generator(device=device)
    made.manual_seed(derive(seed, *parts))
    return made
