"""Image files, augmentation, and the batches of a split."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rscli.api import Augmentation, Dataset, DataSpec, FileImages, MemoryImages, Transform
from rscli.data.pieces import PieceReader, Wanted
from rscli.data.sources import PathFiles
from rscli.data.splits import Batch, FileSplit, MemorySplit, Split, open_split
from rscli.data.transforms import (
    apply_moves,
    augment,
    draw_moves,
    load_image,
    load_resized_crop,
    random_resized_crop,
    to_tensor,
)
from rscli.errors import InputError, PluginError
from rscli.runtime.seeds import generator
from rscli_core.datasets.imagefolder import ImageFolder

RNG = np.random.default_rng(0)
GREY = Transform(channels=1, crop=(6, 8))
RGB = Transform(channels=3, crop=(6, 8))


def noise_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,)}[mode]
    return Image.fromarray(RNG.integers(0, 256, (height, width, *channels), dtype=np.uint8))


# --- files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "transform"), [("L", GREY), ("RGB", RGB)])
@pytest.mark.parametrize("resize", [None, 6])
def test_an_image_of_the_right_size_keeps_its_pixels(mode, transform, resize, tmp_path):
    image = noise_image(8, 6, mode)
    image.save(tmp_path / "a.png")
    pixels = load_image(tmp_path / "a.png", transform.model_copy(update={"resize": resize}))
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.from_numpy(np.atleast_3d(np.array(image)).transpose(2, 0, 1).copy()))


@pytest.mark.parametrize("size", [(41, 30), (30, 41), (33, 33), (5, 7), (3, 50), (16, 100)], ids=str)
@pytest.mark.parametrize("resize", [None, 16, 11], ids=lambda r: f"resize {r}")
def test_resize_and_crop_are_torchvisions(size, resize, tmp_path):
    from torchvision.transforms import v2

    image = noise_image(*size)
    image.save(tmp_path / "a.png")
    steps = [v2.Resize(resize)] if resize else []
    expected = v2.functional.pil_to_tensor(v2.Compose([*steps, v2.CenterCrop((11, 14))])(image))
    assert torch.equal(load_image(tmp_path / "a.png", Transform(channels=3, resize=resize, crop=(11, 14))), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured(orientation, tmp_path):
    from PIL import ImageOps

    image = noise_image(8, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    loaded = load_image(tmp_path / "a.png", Transform(channels=3, crop=(upright.height, upright.width)))
    assert torch.equal(loaded, to_tensor(upright))
    assert (upright.size == (6, 8)) == (orientation >= 5)


def test_garbage_for_metadata_does_not_matter(tmp_path):
    image = noise_image(8, 6)
    image.save(tmp_path / "a.png", exif=b"Exif\0\0garbage")
    assert torch.equal(load_image(tmp_path / "a.png", RGB), to_tensor(image))


def test_transparency_is_shown_on_white(tmp_path):
    pixels = np.array(noise_image(8, 6, "RGBA"))
    pixels[:3, :, 3], pixels[3:, :, 3] = 255, 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", RGB)
    assert (loaded[:, 3:] == 255).all()
    assert (loaded[:, :3].numpy() == pixels[:3, :, :3].transpose(2, 0, 1)).all()


def test_half_transparent_grey(tmp_path):
    Image.fromarray(np.full((6, 8, 2), (100, 51), np.uint8), "LA").save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", GREY).unique().tolist() == [224]  # (100 * 51 + 255 * 204) / 255


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (8, 6), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=0)
    loaded = load_image(tmp_path / "a.png", RGB)
    assert loaded[:, 0, 0].tolist() == [255, 255, 255]
    assert loaded[:, 1, 1].tolist() == [40, 50, 60]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(load_image(tmp_path / "a.png", GREY)[0].numpy(), np.rint(values / 257).astype(np.uint8))


def test_grey_becomes_three_equal_channels_and_colour_becomes_grey(tmp_path):
    noise_image(8, 6, "L").save(tmp_path / "grey.png")
    red, green, blue = load_image(tmp_path / "grey.png", RGB)
    assert torch.equal(red, green)
    assert torch.equal(red, blue)
    Image.new("RGB", (8, 6), (200, 100, 50)).save(tmp_path / "colour.png")
    assert load_image(tmp_path / "colour.png", GREY).unique().tolist() == [124]  # 0.299 R + 0.587 G + 0.114 B


def broken(path: Path) -> None:
    path.write_bytes(b"this is no image")


def truncated(path: Path) -> None:
    noise_image(40, 40).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def floats(path: Path) -> None:
    Image.fromarray(np.ones((6, 8), np.float32)).save(path, format="TIFF")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (broken, "not an image in a format"),
        (truncated, "truncated"),
        (floats, "no known range"),
        (lambda path: None, "No such file"),
    ],
    ids=["no image", "truncated", "float pixels", "missing"],
)
def test_a_file_that_cannot_be_read_is_named(spoil, text, tmp_path):
    spoil(tmp_path / "bad.png")
    with pytest.raises(InputError, match=text) as caught:
        load_image(tmp_path / "bad.png", RGB)
    assert str(tmp_path / "bad.png") in caught.value.message


# --- augmentation ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize(("padding", "flip"), [(4, True), (4, False), (0, True)])
def test_augment_equals_a_loop_over_images(padding, flip, dtype):
    images = torch.randint(0, 256, (50, 3, 7, 9)).to(dtype)
    change = Augmentation(padding=padding, flip=flip)
    moves = draw_moves(50, change, generator("cpu", 1, "x"))
    out = augment(images, change, generator("cpu", 1, "x"))
    assert out.dtype == dtype
    for image, result, top, left, flipped in zip(images, out, *(each.tolist() for each in moves[:3]), strict=True):
        large = torch.zeros(3, 7 + 2 * padding, 9 + 2 * padding, dtype=dtype)
        large[:, padding : padding + 7, padding : padding + 9] = image
        crop = large[:, top : top + 7, left : left + 9]
        assert torch.equal(result, crop.flip(-1) if flipped else crop)


def test_every_offset_and_both_flips_are_drawn_alike():
    moves = draw_moves(90_000, Augmentation(padding=1, flip=True), generator("cpu", 0))
    cells = torch.bincount(moves.top * 6 + moves.left * 2 + moves.flip, minlength=18).double()
    expected = 90_000 / 18
    assert len(cells) == 18
    assert ((cells - expected) ** 2 / expected).sum() < 45.8  # chi-square, 17 degrees of freedom: exceeded 2 times in 10,000


def test_nothing_to_do_changes_nothing():
    images = torch.rand(3, 1, 4, 4)
    assert torch.equal(augment(images, Augmentation(), generator("cpu", 0)), images)
    still = draw_moves(3, Augmentation(padding=2), generator("cpu", 0))._replace(
        top=torch.full((3,), 2), left=torch.full((3,), 2)
    )
    assert torch.equal(apply_moves(images, 2, still), images)


def test_random_resized_crop_draws_areas_and_aspects_in_range(monkeypatch):
    boxes = []
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: boxes.append(box) or self)
    image, rng = Image.new("L", (400, 300)), np.random.default_rng(0)
    for _ in range(300):
        random_resized_crop(image, (4, 4), rng)
    left, top, right, bottom = np.array(boxes).T
    area, aspect = (right - left) * (bottom - top) / 120_000, (right - left) / (bottom - top)
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= 400).all()
    assert (bottom <= 300).all()
    assert 0.078 < area.min() < 0.12
    assert 0.85 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.78
    assert 1.29 < aspect.max() < 1.35
    assert abs(np.log(aspect).mean()) < 0.04  # symmetric on the log scale


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 2)], ids=str)
def test_random_resized_crop_of_odd_images(size):
    assert random_resized_crop(noise_image(*size), (6, 8), np.random.default_rng(0)).size == (8, 6)


def test_load_resized_crop_is_keyed_by_its_generator(tmp_path):
    noise_image(40, 30).save(tmp_path / "a.png")
    first, again, other = (load_resized_crop(tmp_path / "a.png", RGB, np.random.default_rng(key)) for key in (1, 1, 2))
    assert first.shape == (3, 6, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- splits ------------------------------------------------------------------------------------------------------------------

COUNT = 23


def spec_of(augmentation: Augmentation, channels: int = 3) -> DataSpec:
    transform = Transform(channels=channels, resize=6, crop=(6, 6))
    names = ("a", "b", "c")
    return DataSpec(class_names=names, shape=(channels, 6, 6), test_transform=transform, augmentation=augmentation)


def memory_split(augmentation: Augmentation = Augmentation(padding=2, flip=True)) -> MemorySplit:  # noqa: B008
    images = np.random.default_rng(1).integers(0, 256, (COUNT, 3, 6, 6), dtype=np.uint8)
    return MemorySplit(images, np.arange(COUNT) % 3, spec_of(augmentation))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(2)
    paths = [folder / "abc"[i % 3] / f"{i:02}.png" for i in range(COUNT)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 6 + rng.integers(4), 3), dtype=np.uint8)).save(path)
    return paths


def file_split(files: Sequence[Path], augmentation: Augmentation, workers: int = 0) -> FileSplit:
    return FileSplit(files, np.arange(COUNT) % 3, spec_of(augmentation), workers=workers)


SPLITS = {
    "memory": lambda files: memory_split(),
    "files": lambda files: file_split(files, Augmentation(padding=2, flip=True)),
    "files, resized crop": lambda files: file_split(files, Augmentation(flip=True, resized_crop=True)),
}


@pytest.fixture(params=SPLITS.values(), ids=SPLITS.keys())
def split(request, files) -> Split:
    return request.param(files)


def epoch(split: Split, **how) -> list[Batch]:
    return list(split.batches(**{"seed": 0, "epoch": 1, "batch": 5, "device": "cpu", **how}))


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one[:3], other[:3], strict=True)
    )


def test_batches_have_the_promised_types_and_sizes(split):
    batches = epoch(split)
    assert [len(item.labels) for item in batches] == [5, 5, 5, 5, 3]
    assert split.steps(5) == len(batches)
    for images, labels, indices, *_ in batches:
        assert (images.dtype, labels.dtype, images.shape[1:]) == (torch.float32, torch.int64, (3, 6, 6))
        assert (indices.dtype, indices.shape) == (torch.int64, labels.shape)
        assert images.min() >= 0
        assert images.max() <= 1


@pytest.mark.parametrize(
    "make", [lambda f: memory_split(Augmentation()), lambda f: file_split(f, Augmentation())], ids=["memory", "files"]
)
def test_an_epoch_holds_every_image_once_with_its_label(make, files):
    split = make(files)
    images, labels, indices = (torch.cat(each) for each in zip(*(item[:3] for item in epoch(split)), strict=True))
    assert [image.numpy().tobytes() for image in images] == [split.image(i).numpy().tobytes() for i in indices]
    known = {split.image(i).numpy().tobytes(): int(split.labels[i]) for i in range(COUNT)}
    assert len(known) == COUNT
    assert [known.pop(image.numpy().tobytes()) for image in images] == labels.tolist()
    assert known == {}


def test_seed_and_epoch_decide_order_and_augmentation(split):
    assert same(epoch(split), epoch(split))
    assert not same(epoch(split), epoch(split, seed=1))
    assert not same(epoch(split), epoch(split, epoch=2))


@pytest.mark.parametrize("start", [0, 1, 3, 4, 5])
def test_a_later_start_gives_exactly_the_rest(split, start):
    assert same(epoch(split, start=start), epoch(split)[start:])


def test_a_later_start_reads_none_of_the_skipped_files(files, monkeypatch):
    read = []
    monkeypatch.setattr(
        "rscli.data.pieces.load_image", lambda path, transform: read.append(path) or torch.zeros(3, 6, 6).byte()
    )
    assert len(epoch(file_split(files, Augmentation()), start=3)) == 2
    assert len(read) == 8


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("world", [2, 3, 7])
def test_processes_share_every_chunk(split, world, chunks):
    """Each image of a chunk goes to one process, in order; all of a chunk that is too small to share go to all of them."""
    ranks = [epoch(split, rank=rank, world=world, chunks=chunks) for rank in range(world)]
    whole = epoch(split, chunks=chunks)
    assert [len(item.labels) for item in whole] == [
        len(each) for size in (5, 5, 5, 5, 3) for each in torch.arange(size).chunk(chunks)
    ]
    for item, *slices in zip(whole, *ranks, strict=True):
        assert {(part.number, part.chunk, part.size) for part in slices} == {(item.number, item.chunk, len(item.labels))}
        if item.size < world:
            assert all(same([part], [item]) and part.first == 0 for part in slices)
            continue
        assert same([item], [[torch.cat(each) for each in zip(*(part[:3] for part in slices), strict=True)]])
        sizes = [len(part.labels) for part in slices]
        assert [part.first for part in slices] == [sum(sizes[:rank]) for rank in range(world)]
        assert max(sizes) - min(sizes) <= 1


def test_batches_leave_the_global_generator_alone(split):
    before = torch.get_rng_state()
    epoch(split)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
@pytest.mark.parametrize(
    "augmentation", [Augmentation(padding=2, flip=True), Augmentation(flip=True, resized_crop=True)], ids=str
)
def test_the_number_of_workers_changes_nothing(files, augmentation):
    assert same(epoch(file_split(files, augmentation)), epoch(file_split(files, augmentation, workers=2)))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_broken_file_in_a_batch_is_an_input_error(files, tmp_path, workers):
    broken(tmp_path / "bad.png")
    split = file_split([*files[:-1], tmp_path / "bad.png"], Augmentation(), workers)
    with pytest.raises(InputError, match=r"bad\.png") as caught:
        epoch(split)
    assert "Traceback" not in caught.value.message
    assert caught.value.hint


def test_readers_can_be_sent_to_another_process(files):
    reader = PieceReader(PathFiles(files), RGB, Augmentation(padding=2), (0, "augment"))
    wanted = Wanted(1, np.array([3, 1]))
    sent, here = pickle.loads(pickle.dumps(reader))[wanted], reader[wanted]
    assert torch.equal(sent.pixels, here.pixels)
    assert all(np.array_equal(a, b) for a, b in zip(sent.moves, here.moves, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_the_same_on_a_gpu(split):
    assert same(epoch(split), [tuple(each.cpu() for each in batch) for batch in epoch(split, device="cuda")])


# --- fingerprints ------------------------------------------------------------------------------------------------------------


def test_memory_fingerprint_sees_shape_pixels_and_labels():
    images, labels, spec = np.zeros((4, 1, 2, 8), np.uint8), np.array([0, 1, 2, 0]), spec_of(Augmentation())
    other = images.copy()
    other[3, 0, 1, 7] = 1
    prints = {
        MemorySplit(images, labels, spec).fingerprint(),
        MemorySplit(other, labels, spec).fingerprint(),
        MemorySplit(images.reshape(4, 1, 4, 4), labels, spec).fingerprint(),
        MemorySplit(images, labels[::-1], spec).fingerprint(),
    }
    assert len(prints) == 4
    assert MemorySplit(images.copy(), labels.copy(), spec).fingerprint() in prints
    assert all(len(each) == 64 for each in prints)


def test_file_fingerprint_follows_a_folder_that_moves_and_sees_changes(files, tmp_path):
    def fingerprint(paths, labels):
        return FileSplit(paths, labels, spec_of(Augmentation())).fingerprint()

    moved = [tmp_path / path.relative_to(files[0].parents[1]) for path in files]
    for old, new in zip(files, moved, strict=True):
        new.parent.mkdir(exist_ok=True)
        new.write_bytes(old.read_bytes())
    labels = np.arange(COUNT) % 3
    original = fingerprint(files, labels)
    assert fingerprint(moved, labels) == original
    assert fingerprint(moved, labels[::-1]) != original
    assert fingerprint([moved[1], moved[0], *moved[2:]], labels) != original
    moved[7].write_bytes(moved[7].read_bytes() + b"\0")
    assert fingerprint(moved, labels) != original


# --- what plugins return -----------------------------------------------------------------------------------------------------


class Given(Dataset):
    """Whatever the test put into `answer`."""

    def load(self, split: str, root: Path, *, download: bool = False) -> MemoryImages | FileImages:
        return ANSWER[0]


ANSWER: list = [None]


def pixels(*shape: int, dtype=np.uint8):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        pytest.param((pixels(2, 3, 6, 6), [0, 1]), "neither MemoryImages nor FileImages", id="a tuple"),
        pytest.param(MemoryImages(pixels(2, 3, 6, 6, dtype=np.float32), np.array([0, 1])), "float32, not a uint8", id="floats"),
        pytest.param(
            MemoryImages(pixels(2, 6, 6, 3), np.array([0, 1])), r"shape \(6, 6, 3\), its spec says \(3, 6, 6\)", id="HWC"
        ),
        pytest.param(MemoryImages(pixels(2, 3, 6, 6), np.array([0, 3])), "from 0 to 3, for 3 classes", id="label too large"),
        pytest.param(MemoryImages(pixels(2, 3, 6, 6), np.array([-1, 0])), "from -1 to 0", id="label negative"),
        pytest.param(MemoryImages(pixels(2, 3, 6, 6), np.array([0])), "2 images and 1 labels", id="too few labels"),
        pytest.param(MemoryImages(pixels(2, 3, 6, 6), np.array([0.0, 1.0])), "not an int64 array", id="float labels"),
        pytest.param(MemoryImages(pixels(2, 3, 6, 6), [0, 1]), "not an int64 array", id="labels in a list"),
        pytest.param(MemoryImages(pixels(0, 3, 6, 6), np.zeros(0, np.int64)), "no images", id="nothing"),
        pytest.param(FileImages([Path("a.png")], np.array([0, 1])), "1 images and 2 labels", id="files"),
    ],
)
def test_a_broken_promise_names_the_data_set(answer, text):
    ANSWER[0] = answer
    with pytest.raises(PluginError, match=text) as caught:
        open_split(Given(), spec_of(Augmentation()), "test", Path())
    assert "Given" in caught.value.message


@pytest.mark.parametrize(
    ("change", "text"),
    [
        pytest.param({"augmentation": Augmentation(resized_crop=True)}, "only images in files", id="resized crop in memory"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(change, text):
    ANSWER[0] = MemoryImages(pixels(2, 3, 6, 6), np.array([0, 1]))
    with pytest.raises(PluginError, match=text):
        open_split(Given(), spec_of(Augmentation()).model_copy(update=change), "test", Path())


def test_a_split_in_memory_gives_its_images_and_labels():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 6, 6), dtype=np.uint8)
    images.flags.writeable = False
    ANSWER[0] = MemoryImages(images, np.array([2, 1]))
    split = open_split(Given(), spec_of(Augmentation()), "test", Path())
    assert len(split) == 2
    assert split.labels.tolist() == [2, 1]
    assert np.array_equal(split.image(1).numpy(), images[1].astype(np.float32) / np.float32(255))


# --- an image folder, from the plugin to the batch ---------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    for index, (mode, suffix) in enumerate([("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("RGB", "bmp"), ("L", "TIFF")]):
        for name in ("cat", "dog"):
            path = tmp_path / "train" / name / f"{index}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise_image(20 + 7 * index, 30 - 4 * index, mode).save(path)
    return tmp_path


@pytest.mark.parametrize("channels", [1, 3])
def test_cached_and_read_anew_are_the_same_split(mixed, channels):
    made = {}
    for cache in ("memory", "files"):
        data = ImageFolder(size=16, channels=channels, cache=cache, augment="none")
        made[cache] = open_split(data, data.spec(mixed), "train", mixed)
    memory, disk = made["memory"], made["files"]
    assert (type(memory), type(disk)) == (MemorySplit, FileSplit)
    assert len(memory) == len(disk) == 10
    assert all(torch.equal(memory.image(i), disk.image(i)) for i in range(10))
    assert memory.fingerprint() == disk.fingerprint()
    assert same(epoch(memory), epoch(disk))


def test_caching_names_a_broken_image(mixed):
    broken(mixed / "train" / "dog" / "9.png")
    data = ImageFolder(size=16)
    with pytest.raises(InputError, match=r"9\.png"):
        open_split(data, data.spec(mixed), "train", mixed)
