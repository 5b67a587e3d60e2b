"""The random numbers of the images of an optimiser step, the same however the images are shared out.

They are drawn in blocks of `ROWS` neighbouring images, each block with a generator keyed by the step and the block. A process
or a micro-batch draws the blocks that its images are in, and keeps its own rows: at most two blocks are drawn in vain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rscli.api import Draws, Noise
from rscli.runtime.guard import draw_noise
from rscli.runtime.seeds import generator

ROWS = 16
"""Images in a block: enough that a generator is a small part of the cost, few enough that hardly anything is drawn in vain."""


class StepDraws(Draws):
    """The numbers of the images from place `first` to `end` (not included) of a step that has `size` images of `shape`.

    `key` is the step's. The calls of a step are numbered: processes that make the same calls draw the same numbers.
    """

    def __init__(
        self,
        smoothing: Noise,
        shape: Sequence[int],
        *,
        first: int,
        end: int,
        size: int,
        seed: int,
        key: tuple[str | int, ...],
        device: torch.device,
    ) -> None:
        self._smoothing, self._shape, self._device = smoothing, tuple(shape), device
        self._first, self._end, self._size, self._seed, self._key = first, end, size, seed, key
        self._calls = 0

    def noise(self, m: int) -> Tensor:
        """See `Draws.noise`: (m, batch, channel, height, width).

        Raises `PluginError` for noise of another shape, type or device.
        """

        def draw(rows: int, random: torch.Generator) -> Tensor:
            return draw_noise(self._smoothing, (m, rows, *self._shape), random, self._device)

        return self._rows(draw, 1)

    def uniform(self, *shape: int) -> Tensor:
        """See `Draws.uniform`: (batch, ...)."""

        def draw(rows: int, random: torch.Generator) -> Tensor:
            return torch.rand(rows, *shape, generator=random, device=self._device)

        return self._rows(draw, 0)

    def _rows(self, draw: Callable[[int, torch.Generator], Tensor], images: int) -> Tensor:
        """What `draw(rows, generator)` gives for these images; they are in dimension `images` of it."""
        call, self._calls = self._calls, self._calls + 1
        found = []
        for block in range(self._first // ROWS, -(-self._end // ROWS)):
            begin = block * ROWS
            end = min(begin + ROWS, self._size)
            drawn = draw(end - begin, generator(self._device, self._seed, *self._key, call, block))
            low, high = max(self._first, begin) - begin, min(self._end, end) - begin
            found.append(drawn if (low, high) == (0, end - begin) else drawn.narrow(images, low, high - low))
        return torch.cat(found, images)
