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

STEP = 0x9E3779B97F4A7C15
"""An odd number with well-mixed bits (2^64 over the golden ratio): the distance between the seeds of two blocks."""


def derive(seed: int, *parts: str | int) -> int:
    """A 63-bit key for `parts` under `seed`, the same on every machine (BLAKE2b; distinct parts give independent keys)."""
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(device: torch.device | str, seed: int, *parts: str | int) -> torch.Generator:
    """A torch generator on `device`, seeded with the key of `parts`.

    On the CPU torch uses the low 32 bits of a seed only (Mersenne twister), so keys may meet there once in 2^32.
    """
    return _seeded(device, derive(seed, *parts))


def block_generator(device: torch.device | str, seed: int, image: int, block: int) -> torch.Generator:
    """The generator of one block of an image's certification noise; `image` is the image's key.

    A certificate rests on the independence of the samples of one image. Hashed keys could give two of its blocks the same
    seed in torch's 32 bits, so the image's key is stepped by an odd number from block to block instead: all of the first 2^32
    blocks of an image differ, also in the low 32 bits.
    """
    return _seeded(device, (derive(seed, "sample", image) + block * STEP) % 2**63)


def _seeded(device: torch.device | str, key: int) -> torch.Generator:
    import torch

    made = torch.Generator(device=device)
    made.manual_seed(key)
    return made
