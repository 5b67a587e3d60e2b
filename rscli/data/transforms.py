"""From an image file to the pixels of a model, and the random changes of a training batch.

Files are decoded, resized and cropped with Pillow on 8-bit pixels, whose fixed-point arithmetic gives the same pixels on every
machine; sizes and offsets round as torchvision's `Resize`, `CenterCrop` and `RandomResizedCrop` do, which the field uses.

What a file may hold, and how it is read:
- several frames or sizes: the first frame, of an icon the largest size;
- an orientation (Exif, TIFF): the image is turned upright;
- transparency, as an alpha channel or as a transparent colour (tRNS): the image is put on white, as RGBA would be;
- 1 bit: black and white; palettes, CMYK, YCbCr: as Pillow converts them, without colour profiles;
- greys of 16 bits: scaled to 8 bits and rounded; colours of 16 bits: the higher 8;
- 32-bit integers and floating point: refused, for nothing says which number is white.
"""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from rscli.api import Augmentation, Transform
from rscli.errors import InputError
from rscli.runtime.files import check_regular, explained

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


SIXTEEN_BITS = ("PNG", "PPM")
"""The formats whose greys of 16 bits have the mode `I` of 32 in some versions of Pillow."""

PNG_LEVELS = {"1": 255, "L;2": 85, "L;4": 17}
"""By how much Pillow multiplies the greys of a PNG file with fewer than 8 bits, but not its transparent grey."""

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what Pillow logs of odd files does not belong on stderr


# --- files -------------------------------------------------------------------------------------------------------------------


def read_image(path: Path, channels: int) -> Image.Image:
    """The image in a file, upright, 8 bits, grey (`channels` 1) or RGB (3), by the rules at the top of this module.

    Raises `InputError`, naming the file, if it cannot be read, is no regular file, or would be a decompression bomb.
    """
    try:
        check_regular(path)
        # Pillow opens no path: it would map an uncompressed TIFF of orientation 5 to 8 into memory with rows of a wrong length.
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # about metadata, palettes and sizes; what matters is raised
            with Image.open(file) as image:
                level = _level(image)
                image.load()
                flat = _flat(_eight_bit(image, level), "L" if channels == 1 else "RGB")
                return _upright(flat, image)
    except (MemoryError, InputError):
        raise
    except Exception as cause:  # decoders raise whatever a broken file trips: OSError, SyntaxError, ValueError, struct.error
        if isinstance(cause, OSError) and cause.errno is not None:
            raise explained(cause, f"cannot read the image {path}") from cause
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
        return "it is not an image in a format that Pillow knows"
    if isinstance(cause, Image.DecompressionBombError):
        return f"it would unpack to more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, as a decompression bomb does"
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def _level(image: Image.Image) -> int:
    """What takes the transparent colour of a PNG file that is not loaded yet to the scale of its pixels; 0: 16 to 8 bits."""
    if not isinstance(image, PngImageFile) or not image.tile:
        return 1
    layout = image.tile[0][3]
    raw = layout[0] if isinstance(layout, tuple) else layout
    return 0 if raw == "RGB;16B" else PNG_LEVELS.get(str(raw), 1)


def _upright(flat: Image.Image, source: Image.Image) -> Image.Image:
    """`flat` as the metadata of its `source` turn it; not `ImageOps.exif_transpose`, which fails on other broken metadata."""
    try:
        orientation = source.getexif().get(EXIF_ORIENTATION)
    except Exception:  # garbage where the metadata should be says nothing against the pixels
        return flat
    return flat.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else flat


def _eight_bit(image: Image.Image, level: int) -> Image.Image:
    """Greys of 16 bits brought to 8 (Pillow would clip them), and the transparent colour with them, by `level`.

    Raises `ValueError` where the range of the pixels is unknown.
    """
    colour = image.info.get("transparency")
    if not image.mode.startswith(("I", "F")):
        if level == 0 and isinstance(colour, tuple):
            image.info["transparency"] = tuple(value >> 8 for value in colour)
        elif level > 1 and isinstance(colour, int):
            image.info["transparency"] = colour * level
        return image
    pixels = np.asarray(image).astype(np.int64)
    if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN_BITS):
        raise ValueError(f"pixels of mode {image.mode} (32 bits) have no known range; save them with 8 or 16 bits")
    grey = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    if isinstance(colour, int):
        grey.putalpha(Image.fromarray(np.where(pixels == colour, 0, 255).astype(np.uint8)))
    return grey


def _flat(image: Image.Image, mode: str) -> Image.Image:
    """In `mode`, without transparency: put on white, the way viewers show it."""
    if image.mode == "La":
        image = image.convert("LA")  # premultiplied grey, which Pillow takes no further
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
