"""From an image file to the pixels of a model, and the random changes of a training batch.

Files are decoded, resized and cropped with Pillow on 8-bit pixels, whose fixed-point arithmetic gives the same pixels on every
machine; sizes and offsets round as torchvision's `Resize`, `CenterCrop` and `RandomResizedCrop` do, which the field uses.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from rscli.api import Augmentation, Transform
from rscli.errors import InputError
from rscli.runtime.files import check_regular

EXIF_ORIENTATION = 0x0112
UPRIGHT = {  # Exif 2.32, tag 274: what brings each stored orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# --- files -------------------------------------------------------------------------------------------------------------------


def read_image(path: Path, channels: int) -> Image.Image:
    """The image in a file (the first, if it holds several), upright, 8 bits, grey (`channels` 1) or RGB (3).

    16-bit greys keep their upper range; what is transparent is put on white. Raises `InputError`, naming the file, if it cannot
    be read.
    """
    check_regular(path, "image")
    try:
        with Image.open(path) as image:
            image.load()
            return _flat(_eight_bit(_upright(image)), "L" if channels == 1 else "RGB")
    except MemoryError:
        raise
    except Exception as cause:  # decoders raise whatever a broken file trips: OSError, SyntaxError, ValueError, struct.error
        hint = "Replace the file, or take it out of the folder."
        raise InputError(f"cannot read the image {path}: {_reason(cause)}", hint) from cause


def load_image(path: Path, transform: Transform) -> Tensor:
    """The image in a file as a model sees it: uint8 (channel, height, width), resized and cropped as `transform` says.

    An image that already has the right size keeps its pixels; what the crop lacks is filled with zeros on both sides.
    Raises `InputError`, naming the file, if it cannot be read.
    """
    image = read_image(path, transform.channels)
    if transform.resize is not None:
        image = resize_shorter(image, transform.resize)
    return to_tensor(centre_crop(image, transform.crop))


def load_resized_crop(path: Path, transform: Transform, rng: np.random.Generator) -> Tensor:
    """A random part of the image in a file, at the size of `transform.crop`: uint8 (channel, height, width)."""
    return to_tensor(random_resized_crop(read_image(path, transform.channels), transform.crop, rng))


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 (channel, height, width) from an image in mode L or RGB."""
    pixels = np.array(image)  # a copy: what Pillow lends is read-only
    return torch.from_numpy(pixels.reshape(image.height, image.width, -1)).permute(2, 0, 1).contiguous()


def _reason(cause: Exception) -> str:
    if isinstance(cause, UnidentifiedImageError):
        return "it is no image in a format that Pillow knows"
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # garbage where the metadata should be says nothing against the pixels
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _eight_bit(image: Image.Image) -> Image.Image:
    """Greys of 16 bits brought to 8; Pillow would clip them. Raises `ValueError` where the range of the pixels is unknown."""
    if not image.mode.startswith(("I", "F")):
        return image
    pixels = np.asarray(image).astype(np.int64)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode} have no known range; save them with 8 or 16 bits")
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))


def _flat(image: Image.Image, mode: str) -> Image.Image:
    """In `mode`, without transparency: put on white, the way viewers show it."""
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert(mode)


# --- sizes -------------------------------------------------------------------------------------------------------------------


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """`image` with its shorter side at `size` pixels, its aspect kept; bilinear, antialiased."""
    shorter = min(image.size)
    if shorter == size:
        return image
    width, height = (int(size * side / shorter) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle `size` (height, width) of `image`, with zeros around it where it is smaller."""
    height, width = size
    top, left = _margin(image.height - height), _margin(image.width - width)
    return image.crop((left, top, left + width, top + height))


def _margin(spare: int) -> int:
    return round(spare / 2) if spare >= 0 else -(-spare // 2)


def random_resized_crop(image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A random part of `image`, resized to `size` (height, width).

    8 to 100 % of its area, aspect (width to height) log-uniform in 3/4 to 4/3; the middle, at the nearest such aspect, if ten
    draws do not fit (Szegedy et al. 2015, section 6; the fallback is torchvision's).
    """
    height, width = size
    return image.crop(_random_box(image.width, image.height, rng)).resize((width, height), Image.Resampling.BILINEAR)


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random part."""
    narrow, wide = 3 / 4, 4 / 3
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = math.exp(rng.uniform(math.log(narrow), math.log(wide)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * wide))), min(height, max(1, round(width / narrow)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


# --- batches -----------------------------------------------------------------------------------------------------------------


class Moves(NamedTuple):
    """Where the crop of each image of a batch begins in the padded image, and whether it is flipped: three tensors (batch,)."""

    top: Tensor
    left: Tensor
    flip: Tensor


def draw_moves(count: int, augmentation: Augmentation, generator: torch.Generator) -> Moves:
    """Random moves for `count` images, on the device of `generator`: offsets in 0 .. 2 * padding, flips half of the time."""
    device, span = generator.device, 2 * augmentation.padding + 1
    top, left = torch.randint(0, span, (2, count), generator=generator, device=device)
    flip = torch.rand(count, generator=generator, device=device) < (0.5 if augmentation.flip else 0.0)
    return Moves(top, left, flip)


def apply_moves(images: Tensor, padding: int, moves: Moves) -> Tensor:
    """`images` (batch, channel, height, width) padded with zeros, cropped and flipped by `moves`; same shape and dtype."""
    batch, channels, height, width = images.shape
    top, left, flip = (each.to(images.device, non_blocking=True)[:, None] for each in moves)
    rows = top + torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    columns = left + torch.where(flip, width - 1 - across, across)
    image = torch.arange(batch, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return F.pad(images, (padding,) * 4)[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def augment(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """`images` (batch, channel, height, width), each with its own random crop and flip; `resized_crop` needs files."""
    if not moves_images(augmentation):
        return images
    return apply_moves(images, augmentation.padding, draw_moves(len(images), augmentation, generator))


def moves_images(augmentation: Augmentation) -> bool:
    """Whether there is anything to draw for a batch."""
    return augmentation.padding > 0 or augmentation.flip
