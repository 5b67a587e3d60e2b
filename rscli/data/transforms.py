"""From an image file to the pixels of a model, and the random changes of a training batch.

Files are decoded, resized and cropped with Pillow on 8-bit pixels, whose fixed-point arithmetic gives the same pixels on every
machine; sizes and offsets round as torchvision's `Resize`, `CenterCrop` and `RandomResizedCrop` do, which the field uses.

The one exception is the random resized crop of a JPEG file, which is read for training alone, and where reading is what
training may wait for: it is decoded by torchvision and resized by torch, which takes two thirds of the time (`bench/loader.py`)
and gives the same pixels but for one grey level in a hundred pixels; of a photograph so large that the part is at least four
times the size of the input, the decoder leaves out the finest detail (`REDUCED`), which takes a fifth of the time.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from rscli.api import Augmentation, Transform
from rscli.data.rand_augment import OPERATIONS, rand_augment
from rscli.errors import InputError, RscliError
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

REDUCED = 2
"""How much larger than the input a part of a JPEG file stays, at least, when the decoder leaves out the finest detail; Pillow
recommends 2 (`Image.thumbnail`, `reducing_gap`) for pixels that look the same."""

ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
"""Share of the area, and height to width, of an erased rectangle (Zhong et al. 2020, section 3; the area as in torchvision)."""

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what Pillow logs of odd files does not belong on stderr


# --- files -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedFile:
    """An image file that lies inside another file: its content, and what a message calls it."""

    content: bytes
    name: str

    def __str__(self) -> str:
        return self.name


def read_image(path: Path | EncodedFile, channels: int) -> Image.Image:
    """The image in a file, upright, 8 bits, grey (`channels` 1) or RGB (3), by the rules at the top of this module.

    Raises `InputError`, naming the file, if it cannot be read, is no regular file, or would be a decompression bomb.
    """
    with _opened(path) as (_, image):
        return _decoded(image, channels)


def load_image(path: Path | EncodedFile, transform: Transform) -> Tensor:
    """The image in a file as a model sees it: uint8 (channel, height, width), resized and cropped as `transform` says.

    An image that already has the right size keeps its pixels; what the crop lacks is filled with zeros on both sides.
    Raises `InputError`, naming the file, if it cannot be read.
    """
    image = read_image(path, transform.channels)
    if transform.resize is not None:
        image = resize_shorter(image, transform.resize)
    return to_tensor(centre_crop(image, transform.crop))


def load_resized_crop(path: Path | EncodedFile, transform: Transform, rng: np.random.Generator) -> Tensor:
    """A random part of the image in a file, at the size of `transform.crop`: uint8 (channel, height, width).

    Raises `InputError`, naming the file, if it cannot be read.
    """
    with _opened(path) as (stream, image):
        if transform.channels == 3 and image.format == "JPEG" and image.mode in ("L", "RGB"):
            return _jpeg_crop(stream, image, transform.crop, rng)
        return to_tensor(random_resized_crop(_decoded(image, transform.channels), transform.crop, rng))


@contextmanager
def _opened(path: Path | EncodedFile) -> Iterator[tuple[BinaryIO, Image.Image]]:
    """The open file, and its image, of which only the header has been read; whatever fails is an `InputError` with its name."""
    try:
        with warnings.catch_warnings(), _stream(path) as stream:
            warnings.simplefilter("ignore")  # about metadata, palettes and sizes; what matters is raised
            with Image.open(stream) as image:
                yield stream, image
    except (MemoryError, RscliError):
        raise
    except Exception as cause:  # decoders raise whatever a broken file trips: OSError, SyntaxError, ValueError, struct.error
        if isinstance(cause, OSError) and cause.errno is not None:
            raise explained(cause, f"cannot read the image {path}") from cause
        hint = "Replace the file, or take it out of the folder."
        raise InputError(f"cannot read the image {path}: {_reason(cause)}", hint) from cause


def _stream(path: Path | EncodedFile) -> BinaryIO:
    if isinstance(path, EncodedFile):
        return BytesIO(path.content)
    check_regular(path)
    # Pillow opens no path: it would map an uncompressed TIFF of orientation 5 to 8 into memory with rows of a wrong length.
    return path.open("rb")


def _decoded(image: Image.Image, channels: int) -> Image.Image:
    """`image`, of which only the header has been read: upright, 8 bits, grey or RGB."""
    level = _level(image)
    image.load()
    return _upright(_flat(_eight_bit(image, level), "L" if channels == 1 else "RGB"), image)


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 (channel, height, width) from an image in mode L or RGB."""
    pixels = np.array(image)  # a copy: what Pillow lends is read-only
    return torch.from_numpy(pixels.reshape(image.height, image.width, -1)).permute(2, 0, 1).contiguous()


@cache
def jpeg_decoder() -> Callable[[Tensor], Tensor] | None:
    """What decodes the bytes of a JPEG file, uint8 (n,), to pixels (channel, height, width); None where torchvision has none.

    Called once before workers are started, so that not each of them has to import it.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except (ImportError, RuntimeError, OSError):  # a torchvision built without it, or for another torch
        return None
    return partial(decode_jpeg, mode=ImageReadMode.UNCHANGED)


def _jpeg_crop(stream: BinaryIO, image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """A random part of a grey or RGB JPEG file, of which only the header has been read: uint8 (3, height, width)."""
    orientation = _orientation(image)
    width, height = image.size[::-1] if orientation >= 5 else image.size
    box = _random_box(width, height, rng)
    reduce = min((box[2] - box[0]) // (REDUCED * size[1]), (box[3] - box[1]) // (REDUCED * size[0]))
    if reduce < 2 and orientation == 1 and (pixels := _quickly(stream, image)) is not None:
        left, top, right, bottom = box
        resized = F.interpolate(pixels[None, :, top:bottom, left:right], size, mode="bilinear", antialias=True)[0]
        return resized.expand(3, *size).contiguous()
    if reduce >= 2:
        image.draft(image.mode, (-(-image.width // reduce), -(-image.height // reduce)))
        whole = _decoded(image, 3)
        across, down = whole.width / width, whole.height / height
        part = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        return to_tensor(whole.resize(size[::-1], Image.Resampling.BILINEAR, box=part))
    return to_tensor(_resized_part(_decoded(image, 3), box, size))


def _quickly(stream: BinaryIO, image: Image.Image) -> Tensor | None:
    """The pixels of a whole JPEG file by torchvision's decoder: uint8 (1 or 3, height, width); None if it refuses."""
    decode = jpeg_decoder()
    if decode is None:
        return None
    stream.seek(0)
    try:
        pixels = decode(torch.frombuffer(bytearray(stream.read()), dtype=torch.uint8))
    except RuntimeError:  # Pillow says better what is wrong, or reads it all the same
        return None
    return pixels if pixels.shape[-2:] == image.size[::-1] else None


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
    orientation = _orientation(source)
    return flat if orientation == 1 else flat.transpose(UPRIGHT[orientation])


def _orientation(source: Image.Image) -> int:
    """How an image is stored, from 1 (upright) to 8."""
    try:
        orientation = source.getexif().get(EXIF_ORIENTATION)
    except Exception:  # garbage where the metadata should be says nothing against the pixels
        return 1
    return int(orientation) if orientation in UPRIGHT else 1


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
    return _resized_part(image, _random_box(image.width, image.height, rng), size)


def _resized_part(image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """The part `box` (left, top, right, bottom) of `image`, resized to `size` (height, width)."""
    return image.crop(box).resize(size[::-1], Image.Resampling.BILINEAR)


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
    """What happens to each image of a batch: tensors (batch,) or (batch, ...).

    Where its crop begins in the padded image, and whether it is flipped; `operations` (batch, n) int64, places in
    `rand_augment.OPERATIONS`, and their `amounts` (batch, n), the magnitude in [-1, 1] with its sign; `erased` (batch, 0 or 7):
    top, left, height and width of a rectangle, as shares of the image (zeros: there is none), and a colour in [0, 1].
    """

    top: Tensor
    left: Tensor
    flip: Tensor
    operations: Tensor
    amounts: Tensor
    erased: Tensor


def draw_moves(count: int, augmentation: Augmentation, generator: torch.Generator) -> Moves:
    """Random moves for `count` images, on the device of `generator`: offsets in 0 .. 2 * padding, flips half of the time."""
    device, span, wanted = generator.device, 2 * augmentation.padding + 1, augmentation.rand_augment
    top, left = torch.randint(0, span, (2, count), generator=generator, device=device)
    flip = torch.rand(count, generator=generator, device=device) < (0.5 if augmentation.flip else 0.0)
    operations = torch.zeros(count, 0, dtype=torch.int64, device=device)
    amounts, erased = torch.zeros(2, count, 0, device=device)
    if wanted:
        operations = torch.randint(0, len(OPERATIONS), (count, wanted), generator=generator, device=device)
        signs = torch.randint(0, 2, (count, wanted), generator=generator, device=device) * 2 - 1
        amounts = signs * (augmentation.rand_magnitude / 30)
    if augmentation.erase:
        erased = _draw_erased(torch.rand(count, 8, generator=generator, device=device), augmentation.erase)
    return Moves(top, left, flip, operations, amounts, erased)


def _draw_erased(uniform: Tensor, probability: float) -> Tensor:
    """Rectangles and colours (batch, 7) from `uniform` numbers (batch, 8): area uniform, aspect log-uniform, then the place."""
    (least, most), (flat, tall) = ERASED_AREA, ERASED_ASPECT
    area = least + (most - least) * uniform[:, 1]
    aspect = torch.exp(math.log(flat) + math.log(tall / flat) * uniform[:, 2])
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 1).clamp(max=1)
    corner = (1 - sides) * uniform[:, 3:5]
    chosen = (uniform[:, :1] < probability).float()
    return torch.cat([chosen * corner, chosen * sides, uniform[:, 5:]], 1)


def apply_moves(images: Tensor, padding: int, moves: Moves) -> Tensor:
    """`images` (batch, channel, height, width) changed by `moves`; same shape and dtype.

    Padded with zeros, cropped and flipped; then, for uint8 images alone, the operations of RandAugment and the erasing.
    """
    moved = _cropped(images, padding, moves) if padding else _flipped(images, moves.flip)
    if moves.operations.shape[1]:
        moved = rand_augment(moved, moves.operations, moves.amounts)
    return _erase(moved, moves.erased) if moves.erased.shape[1] else moved


def _flipped(images: Tensor, flip: Tensor) -> Tensor:
    flip = flip.to(images.device, non_blocking=True)[:, None, None, None]
    return torch.where(flip, images.flip(-1), images)


def _cropped(images: Tensor, padding: int, moves: Moves) -> Tensor:
    batch, channels, height, width = images.shape
    top, left, flip = (each.to(images.device, non_blocking=True)[:, None] for each in moves[:3])
    rows = top + torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    columns = left + torch.where(flip, width - 1 - across, across)
    image = torch.arange(batch, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return F.pad(images, (padding,) * 4)[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _erase(images: Tensor, erased: Tensor) -> Tensor:
    """uint8 `images` with each its rectangle filled; channels beyond three have the colours of the first three again."""
    _, channels, height, width = images.shape
    erased = erased.to(images.device, non_blocking=True)
    scale = torch.tensor([height, width, height, width], device=images.device)
    top, left, tall, wide = (erased[:, :4] * scale).round().T[..., None]
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    inside_rows, inside_columns = (rows >= top) & (rows < top + tall), (columns >= left) & (columns < left + wide)
    inside = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
    colours = (erased[:, 4:] * 255).round().to(images.dtype)[:, torch.arange(channels, device=images.device) % 3]
    return torch.where(inside, colours[:, :, None, None], images)


def augment(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """`images` (batch, channel, height, width), each with its own random moves; `resized_crop` needs files."""
    if not moves_images(augmentation):
        return images
    return apply_moves(images, augmentation.padding, draw_moves(len(images), augmentation, generator))


def moves_images(augmentation: Augmentation) -> bool:
    """Whether there is anything to draw for a batch."""
    return augmentation.padding > 0 or augmentation.flip or augmentation.rand_augment > 0 or augmentation.erase > 0
