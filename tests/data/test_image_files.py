"""What an image of a folder is, and how its pixels are read: every kind of file, by table and by generation."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from rscli.api import ImageListing, has_images, list_images
from rscli.data.splits import FileSplit
from rscli.data.transforms import read_image
from rscli.errors import InputError
from rscli.image_files import IMAGE_SUFFIXES, class_folders, find_images, is_image_name, loose_images, skipped_text
from rscli_core.datasets.imagefolder import ImageFolder
from rscli_core.datasets.imagenet import ImageNet

RNG = np.random.default_rng(0)


def noise(*shape: int, below: int = 256, kind: type = np.uint8) -> np.ndarray:
    return RNG.integers(0, below, shape, dtype=kind)


def write(path: Path, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(*size, 3)).save(path, "PNG")
    return path


# --- suffixes ----------------------------------------------------------------------------------------------------------------

Image.init()
OPENED = {suffix: kind for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
NO_IMAGES = {
    "only identified, not decoded": {".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr"},
    "drawn by other programs": {".eps", ".ps", ".wmf", ".emf"},
    "floating point or instruments": {".fit", ".fits", ".pfm"},
    "animations, cursors, textures, brushes and the like": {
        *(
            ".fli",
            ".flc",
            ".cur",
            ".icns",
            ".dcx",
            ".blp",
            ".ftc",
            ".ftu",
            ".gbr",
            ".im",
            ".iim",
            ".msp",
            ".pcd",
            ".pxr",
            ".icb",
            ".vda",
            ".vst",
        )
    },
}


@pytest.mark.parametrize("suffix", sorted(OPENED))
def test_every_suffix_that_pillow_registers_is_decided_on(suffix):
    assert (suffix in IMAGE_SUFFIXES) != any(suffix in some for some in NO_IMAGES.values())


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES & OPENED.keys()))
def test_what_counts_as_an_image_is_decoded(suffix, tmp_path):
    kind = OPENED[suffix]
    if kind not in Image.SAVE:
        pytest.skip(f"Pillow writes no {kind}")
    mode = {"XBM": "1", "SGI": "L"}.get(kind, "RGBA" if kind == "ICO" else "RGB")
    path = tmp_path / f"a{suffix}"
    Image.new(mode, (64, 64)).save(path, kind)
    assert list_images(tmp_path).paths == (path,)
    assert read_image(path, 3).size == (64, 64)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("a.JPEG", True),
        ("a.b.PnG", True),
        ("._a.png", False),
        (".png", False),
        ("png", False),
        ("a.png.txt", False),
        ("a.h5", False),
    ],
)
def test_names(name, counts):
    assert is_image_name(name) is counts


# --- folders -----------------------------------------------------------------------------------------------------------------


def test_what_lies_about_in_folders_is_skipped_and_counted(tmp_path):
    kept = [write(tmp_path / name) for name in ("a.png", "z.jfif", "sub/b.png", "sub/deeper/c.PNG")]
    for name in ("._a.png", ".DS_Store", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/a.png", "sub/.hidden.png"):
        write(tmp_path / name)
    for name in ("notes.txt", "features.h5", "clip.mpg", "fig.eps", "README", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    (tmp_path / "sub" / "up").symlink_to("..")
    found = list_images(tmp_path)
    assert list(found.paths) == kept
    assert found.skipped == Counter(
        {"hidden": 5, ".txt": 1, ".h5": 1, ".mpg": 1, ".eps": 1, ".db": 1, "without a suffix": 1}
        | {"pipes or devices": 1, "broken links": 2, "linked folders that were already read": 1}
    )
    assert skipped_text(found.skipped).startswith("15 files skipped (5 hidden, 2 broken links, ")
    assert has_images(tmp_path)
    assert class_folders(tmp_path) == ["sub"]
    assert loose_images(tmp_path) == ["a.png", "z.jfif"]


def test_hidden_files_alone_are_not_worth_a_word():
    assert skipped_text(Counter({"hidden": 3})) == ""
    assert skipped_text(Counter()) == ""
    assert skipped_text(Counter({".txt": 1})) == "1 file skipped (1 .txt)"


def test_a_folder_behind_links_is_read_once_and_under_its_own_name(tmp_path):
    write(tmp_path / "real" / "x" / "a.png")
    (tmp_path / "top").mkdir()
    for name in ("l1", "l2"):
        (tmp_path / "top" / name).symlink_to("../real")
    assert [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path / "top").paths] == ["top/l1/x/a.png"]
    (tmp_path / "real" / "a-link").symlink_to("x")
    assert [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path / "real").paths] == ["real/x/a.png"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    for question in (list_images, has_images, loose_images, class_folders):
        with pytest.raises(InputError, match="Permission denied") as caught:
            question(tmp_path)
        assert str(tmp_path) in caught.value.message


TREES = st.lists(
    st.tuples(
        st.lists(st.sampled_from(["a", "b", "A", "a b", "ab", "1", "10", "9"]), max_size=3),
        st.sampled_from(["1.png", "10.png", "9.PNG", "a.jpg", "B.jpeg", "c.png", "x.png", "x-.png"]),
    ),
    min_size=1,
    max_size=12,
)


@given(TREES)
@settings(max_examples=60, deadline=None)
def test_any_tree_is_listed_as_torchvision_lists_it(tree):
    import tempfile

    from torchvision.datasets import ImageFolder as Reference

    with tempfile.TemporaryDirectory() as folder:
        for parts, name in tree:
            path = Path(folder, "cat", *parts, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        expected = [path for path, _ in Reference(folder).samples]
        assert [str(path) for path in list_images(Path(folder) / "cat").paths] == expected


def test_find_images_takes_named_files_whatever_their_suffix_and_each_once(tmp_path):
    a, odd = write(tmp_path / "a.png"), write(tmp_path / "photo.bin")
    found = find_images([a, tmp_path / "." / "a.png", odd, tmp_path])
    assert found == ImageListing((a, odd), Counter({".bin": 1}))
    os.mkfifo(tmp_path / "pipe.png")
    for wrong, said in ((tmp_path / "nowhere", "there is no image"), (tmp_path / "pipe.png", "neither a file nor a folder")):
        with pytest.raises(InputError, match=said):
            find_images([wrong])


@pytest.fixture
def places(tmp_path) -> Path:
    """Two classes, one with images in folders of its own, and files that are none."""
    for split in ("train", "test"):
        for name in ("cat/0.png", "cat/2021/1.png", "cat/2021/2.jfif", "dog/0.png"):
            write(tmp_path / split / name)
        (tmp_path / split / "cat" / "notes.txt").write_text("x")
        write(tmp_path / split / "__MACOSX" / "0.png")
    return tmp_path


def test_images_in_folders_of_a_class_belong_to_it_and_the_rest_is_counted(places):
    data = ImageFolder(size=8)
    train = data.load("train", places)
    assert [path.name for path in train.paths] == ["0.png", "1.png", "2.jfif", "0.png"]
    assert train.labels.tolist() == [0, 0, 0, 1]
    assert data.spec(places).sizes == {"train": 4, "test": 4}
    assert train.note == f"{places / 'train'}: 1 file skipped (1 .txt)"
    assert [finding.text for finding in data.check(places)] == [
        f"imagefolder: 4 images in {places / split}: 1 file skipped (1 .txt)" for split in ("train", "test")
    ]
    (places / "test").rename(places / "val")
    assert len(ImageNet(classes=2).load("test", places).paths) == 4


def test_the_fingerprint_of_a_plain_folder_is_what_it_was(tmp_path):
    """Worked out by the formula of the first version: sorted by class and name, one line a file, and the labels."""
    import hashlib

    for name in ("cat/b.png", "cat/a.png", "dog/C.JPG", "dog/a.tif"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"x" * len(name))
    found = ImageFolder(size=8).load("train", tmp_path)
    lines = b"cat/a.png\t9\ncat/b.png\t9\ndog/C.JPG\t9\ndog/a.tif\t9\n"
    expected = hashlib.sha256(lines + np.array([0, 0, 1, 1], "<i8").tobytes()).hexdigest()
    split = FileSplit(found.paths, found.labels, ImageFolder(size=8).spec(tmp_path))
    assert split.fingerprint() == expected


# --- orientation -------------------------------------------------------------------------------------------------------------

BACK = {1: None} | {
    orientation: getattr(Image.Transpose, name)
    for orientation, name in enumerate(
        ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"), 2
    )
}
"""What brings an upright image into each stored orientation."""


@pytest.mark.parametrize("orientation", BACK)
@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "CMYK", "P", "I;16"])
@pytest.mark.parametrize("form", ["tif", "tif-lzw", "png"])
def test_every_orientation_of_every_mode_is_turned_upright(orientation, mode, form, tmp_path):
    if form == "png" and mode == "CMYK":
        pytest.skip("PNG has no CMYK")
    if mode == "I;16":
        upright = Image.fromarray(noise(9, 6, below=65536, kind=np.uint16))
    else:
        upright = Image.fromarray(noise(9, 6, 4), "RGBA")
        upright = upright.convert("RGB").quantize(20) if mode == "P" else upright.convert("RGB" if mode == "CMYK" else mode)
        upright = upright.convert(mode)
    stored = upright if BACK[orientation] is None else upright.transpose(BACK[orientation])
    plain, turned = tmp_path / f"plain.{form[:3]}", tmp_path / f"turned.{form[:3]}"
    more = {"compression": "tiff_lzw"} if form == "tif-lzw" else {}
    upright.save(plain, **more)
    if form == "png":
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(turned, exif=exif)
    else:
        stored.save(turned, tiffinfo={274: orientation}, **more)
    for channels in (1, 3):
        found = read_image(turned, channels)
        assert found.size == (6, 9)
        assert np.array_equal(np.asarray(found), np.asarray(read_image(plain, channels)))


@given(st.lists(st.tuples(st.integers(6, 90), st.integers(0, 255)), max_size=3), st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_damaged_metadata_lose_no_turn_that_pillow_reads(changes, orientation):
    """`ImageOps.exif_transpose` gives the same pixels, unless it fails on other parts of the metadata."""
    import tempfile

    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = orientation, "hello", 3.0
    raw = bytearray(exif.tobytes())
    for place, value in changes:
        raw[place % (len(raw) - 6) + 6] = value
    image = Image.fromarray(noise(4, 7))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "a.png"
        image.save(path, exif=bytes(raw))
        found = read_image(path, 1)
        try:
            expected = ImageOps.exif_transpose(Image.open(path))
        except Exception:
            return
        assert np.array_equal(np.asarray(found), np.asarray(expected))


# --- modes and transparency --------------------------------------------------------------------------------------------------


def on_white(image: Image.Image, mode: str) -> np.ndarray:
    """Pillow's own conversion to RGBA, put on white by exact arithmetic."""
    rgba = np.asarray(image.convert("RGBA")).astype(int)
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    exact = (colour * alpha + 255 * (255 - alpha)) / 255
    out = Image.fromarray(np.floor(exact + 0.5).astype(np.uint8), "RGB")
    return np.asarray(out.convert(mode)).astype(int)


def transparent(kind: str) -> tuple[Image.Image, dict]:
    grey, colour = Image.fromarray(noise(7, 9)), Image.fromarray(noise(7, 9, 3))
    palette = colour.quantize(16)
    return {
        "L tRNS": (grey, {"transparency": int(grey.getpixel((3, 3)))}),
        "RGB tRNS": (colour, {"transparency": colour.getpixel((3, 3))}),
        "P one colour": (palette, {"transparency": int(palette.getpixel((3, 3)))}),
        "P every colour": (palette, {"transparency": bytes(range(0, 160, 10))}),
        "LA": (Image.fromarray(noise(7, 9, 2), "LA"), {}),
        "RGBA": (Image.fromarray(noise(7, 9, 4), "RGBA"), {}),
        "PA": (palette.convert("PA"), {}),
        "1": (grey.convert("1"), {}),
        "L": (grey, {}),
        "P": (palette, {}),
        "CMYK": (Image.fromarray(noise(7, 9, 4), "CMYK"), {}),
        "LAB": (Image.fromarray(noise(7, 9, 3), "LAB"), {}),
        "YCbCr": (colour.convert("YCbCr"), {}),
    }[kind]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *((kind, "png") for kind in ("L tRNS", "RGB tRNS", "P one colour", "P every colour", "LA", "RGBA", "1", "L", "P")),
        *((kind, "tif") for kind in ("LA", "RGBA", "PA", "CMYK", "LAB", "YCbCr", "P")),
        *(("P one colour", "gif"), ("RGBA", "webp"), ("RGBA", "ico"), ("RGBA", "tga"), ("CMYK", "jpg")),
    ],
    ids=lambda value: str(value),
)
def test_every_mode_is_read_as_pillow_s_rgba_on_white(kind, form, channels, tmp_path):
    image, more = transparent(kind)
    path = tmp_path / f"a.{form}"
    image.save(path, **more, **({"lossless": True, "exact": True} if form == "webp" else {}))
    with Image.open(io.BytesIO(path.read_bytes())) as opened:
        opened.load()
        plain = "A" not in opened.mode and "transparency" not in opened.info
        mode = "L" if channels == 1 else "RGB"
        own = plain and kind != "LAB"  # Pillow takes LAB no further than to RGB
        expected = np.asarray(opened.convert(mode)).astype(int) if own else on_white(opened, mode)
    assert np.abs(np.asarray(read_image(path, channels)).astype(int) - expected).max() <= (0 if plain else 1)


def png(colour_type: int, depth: int, rows: np.ndarray, trns: bytes) -> bytes:
    """A PNG file (ISO/IEC 15948) written by hand: `rows` (height, width[, 3]), big-endian samples of `depth` bits."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    if depth == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        bits = (rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        lines = [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits]
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + line for line in lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", trns) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("part", [0, 0.4, 1])
def test_the_transparent_grey_of_a_png_of_any_depth_is_white(depth, part, tmp_path):
    """PNG, section 11.3.2: the samples that equal the transparent one, in the depth of the file."""
    rows = noise(5, 8, below=2**depth, kind=np.uint16)
    grey = rows.flat[3] = int(part * (2**depth - 1))
    (tmp_path / "a.png").write_bytes(png(0, depth, rows, struct.pack(">H", grey)))
    expected = np.where(rows == grey, 255, np.floor(rows * 255.0 / (2**depth - 1) + 0.5)).astype(np.uint8)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png", 1)), expected)


@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_colour_of_a_png_of_any_depth_is_white(depth, tmp_path):
    rows = noise(5, 8, 3, below=2**depth, kind=np.uint16)
    (tmp_path / "a.png").write_bytes(png(2, depth, rows, struct.pack(">3H", *rows[2, 3].tolist())))
    expected = (rows >> (depth - 8)).astype(np.uint8)
    expected[2, 3] = 255
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png", 3)), expected)


@pytest.mark.parametrize("form", ["png", "tif", "pgm", "jp2"])
def test_greys_of_sixteen_bits_are_scaled(form, tmp_path):
    values = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    Image.fromarray(values).save(tmp_path / f"a.{form}", **({"irreversible": False} if form == "jp2" else {}))
    assert np.array_equal(np.asarray(read_image(tmp_path / f"a.{form}", 1)), np.rint(values / 257).astype(np.uint8))


@pytest.mark.parametrize("highest", [1, 255, 65535, 2**31 - 1])
@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_32_bits_have_no_known_range(highest, kind, tmp_path):
    """Greys of 0 to 255 in 32 bits were once read as almost black."""
    Image.fromarray(np.linspace(0, highest, 48).astype(kind).reshape(6, 8)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"32 bits.*no known range; save them with 8 or 16 bits"):
        read_image(tmp_path / "a.tif", 1)


def test_of_frames_the_first_and_of_an_icon_the_largest(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for form in ("gif", "tif", "webp", "png"):
        frames[0].save(tmp_path / f"a.{form}", save_all=True, append_images=frames[1:])
        red, _, blue = np.asarray(read_image(tmp_path / f"a.{form}", 3))[0, 0]
        assert (red > 200, blue < 50) == (True, True)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.ico", sizes=[(16, 16), (64, 64), (32, 32)])
    assert read_image(tmp_path / "a.ico", 3).size == (64, 64)


# --- what must not be opened, or said ----------------------------------------------------------------------------------------


def test_a_named_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(InputError, match="is a pipe"):
        read_image(tmp_path / "x.png", 3)


def test_a_decompression_bomb_is_a_clear_message(tmp_path, monkeypatch):
    Image.fromarray(noise(30, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="more than 200 pixels, as a decompression bomb"):
        read_image(tmp_path / "a.png", 3)


@pytest.mark.parametrize("cause", ["large", "exif", "palette"])
def test_pillow_s_warnings_are_not_shown(cause, tmp_path, monkeypatch, recwarn):
    path = tmp_path / "a.png"
    if cause == "palette":
        Image.fromarray(noise(8, 8, 3)).quantize(8).save(path, transparency=bytes(8))
    elif cause == "exif":
        path = tmp_path / "a.tif"
        Image.fromarray(noise(8, 8)).save(path)
        path.write_bytes(path.read_bytes().replace(struct.pack("<HHI", 262, 3, 1), struct.pack("<HHI", 262, 3, 9)))
    else:
        Image.fromarray(noise(12, 12)).save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    read_image(path, 1)
    assert not recwarn.list
