"""The smallest image that a network can take."""

from __future__ import annotations

from rscli.errors import InputError


def check_size(name: str, input_shape: tuple[int, int, int], smallest: int) -> None:
    """Raises `InputError` unless the images `input_shape` (channel, height, width) have `smallest` pixels on each side."""
    _, height, width = input_shape
    if min(height, width) < smallest:
        raise InputError(
            f"{name} takes images of at least {smallest}x{smallest} pixels, not {height}x{width} (height x width)",
            "Choose larger images, or another architecture: `rscli plugins` lists them.",
        )
