"""RandAugment and random erasing: each operation against Pillow, what is drawn, and that it is the image's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from pydantic import ValidationError

from rscli.api import Augmentation, DataSpec, Transform
from rscli.data.rand_augment import OPERATIONS, rand_augment
from rscli.data.splits import FileSplit, MemorySplit
from rscli.data.transforms import apply_moves, draw_moves
from rscli.runtime.seeds import generator

ALL = Augmentation(padding=2, flip=True, rand_augment=2, rand_magnitude=9, erase=0.5)
NAMES = list(OPERATIONS)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def photographs(count: int, side: int = 48, mode: str = "RGB") -> torch.Tensor:
    """Different parts of a photograph: uint8 (count, channel, side, side)."""
    from sklearn.datasets import load_sample_images

    whole = Image.fromarray(load_sample_images().images[1]).convert(mode)
    parts = [whole.crop((17 * i, 9 * i, 17 * i + 3 * side, 9 * i + 3 * side)).resize((side, side)) for i in range(count)]
    return (
        torch.from_numpy(np.stack([np.asarray(part).reshape(side, side, -1) for part in parts]))
        .permute(0, 3, 1, 2)
        .contiguous()
    )


# --- operations --------------------------------------------------------------------------------------------------------------


def affine(image: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST)


PILLOW = {
    "identity": lambda image, a: image,
    "shear-x": lambda image, a: affine(image, (1, 0.3 * a, 0, 0, 1, 0)),
    "shear-y": lambda image, a: affine(image, (1, 0, 0, 0.3 * a, 1, 0)),
    "translate-x": lambda image, a: affine(image, (1, 0, -int(150 / 331 * image.width * a), 0, 1, 0)),
    "translate-y": lambda image, a: affine(image, (1, 0, 0, 0, 1, -int(150 / 331 * image.height * a))),
    "rotate": lambda image, a: image.rotate(30 * a, Image.Resampling.NEAREST),
    "brightness": lambda image, a: ImageEnhance.Brightness(image).enhance(1 + 0.9 * a),
    "saturation": lambda image, a: ImageEnhance.Color(image).enhance(1 + 0.9 * a),
    "contrast": lambda image, a: ImageEnhance.Contrast(image).enhance(1 + 0.9 * a),
    "sharpness": lambda image, a: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * a),
    "posterize": lambda image, a: ImageOps.posterize(image, 8 - round(4 * abs(a))),
    "solarize": lambda image, a: ImageOps.solarize(image, 255 * (1 - abs(a))),
    "autocontrast": lambda image, a: ImageOps.autocontrast(image),
    "equalize": lambda image, a: ImageOps.equalize(image),
}
"""The paper's operations, with the ranges of torchvision's table, by Pillow."""


@pytest.mark.parametrize("amount", [-1.0, -0.3, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", NAMES)
def test_an_operation_is_pillows(name, mode, amount):
    images = photographs(3, mode=mode)
    found = OPERATIONS[name](images, amount)
    assert (found.dtype, found.shape) == (torch.uint8, images.shape)
    for image, changed in zip(images, found, strict=True):
        pixels = image.permute(1, 2, 0).numpy()
        expected = PILLOW[name](Image.fromarray(pixels if mode == "RGB" else pixels[..., 0]), amount)
        difference = np.abs(changed.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).reshape(pixels.shape))
        if name in ("shear-x", "shear-y", "rotate"):  # the nearest pixel of a tie may be another
            assert (difference > 0).mean() < 0.03
        else:
            assert difference.max() <= 1


@pytest.mark.parametrize("name", [name for name in NAMES if name != "identity"])
def test_an_operation_does_something(name):
    images = photographs(3)
    assert not torch.equal(OPERATIONS[name](images, 1.0), images)


def test_operations_are_applied_in_order_and_to_their_own_images():
    images, random = photographs(12), torch.Generator().manual_seed(0)
    operations = torch.randint(0, len(NAMES), (12, 3), generator=random)
    amounts = (torch.randint(0, 2, (12, 3), generator=random) * 2 - 1) * 0.4
    before = images.clone()
    found = rand_augment(images, operations, amounts)
    assert torch.equal(images, before)
    for image, places, strengths, changed in zip(images, operations.tolist(), amounts.tolist(), found, strict=True):
        expected = image[None]
        for place, strength in zip(places, strengths, strict=True):
            expected = OPERATIONS[NAMES[place]](expected, strength)
        assert (changed.int() - expected[0].int()).abs().max() <= 1


# --- what is drawn -----------------------------------------------------------------------------------------------------------


def test_every_operation_and_sign_is_drawn_alike():
    moves = draw_moves(28_000, Augmentation(rand_augment=2, rand_magnitude=12), generator("cpu", 0))
    assert moves.operations.shape == moves.amounts.shape == (28_000, 2)
    assert moves.amounts.abs().unique().tolist() == pytest.approx([0.4])
    cells = torch.bincount((moves.operations * 2 + (moves.amounts > 0)).flatten(), minlength=28).double()
    assert len(cells) == 28
    assert ((cells - 2000) ** 2 / 2000).sum() < 62.0  # chi-square, 27 degrees of freedom: exceeded 2 times in 10,000


def test_what_is_drawn_without_them_is_what_was_drawn_before_they_were_there():
    plain, more = (draw_moves(50, each, generator("cpu", 4)) for each in (Augmentation(padding=2, flip=True), ALL))
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], more[:3], strict=True))
    assert [each.shape[1] for each in plain[3:]] == [0, 0, 0]
    assert plain.top[:5].tolist() == torch.randint(0, 5, (2, 50), generator=generator("cpu", 4))[0, :5].tolist()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 60)])
def test_rectangles_are_erased_with_the_probability_areas_and_aspects_of_the_paper(height, width):
    images = torch.full((3000, 3, height, width), 7, dtype=torch.uint8)
    moves = draw_moves(3000, Augmentation(erase=0.3), generator("cpu", 1))
    moves = moves._replace(erased=torch.cat([moves.erased[:, :4], torch.tensor([[0.0, 0.5, 1.0]]).expand(3000, 3)], 1))
    found = apply_moves(images, 0, moves)
    changed = (found != images).all(1)
    hit = changed.flatten(1).any(1)
    assert abs(hit.double().mean() - 0.3) < 4 * (0.3 * 0.7 / 3000) ** 0.5
    rows, columns = changed[hit].any(2).sum(1), changed[hit].any(1).sum(1)
    assert torch.equal(rows * columns, changed[hit].flatten(1).sum(1))  # a whole rectangle
    share = (rows * columns).double() / (height * width)
    assert 0.01 < share.min() < 0.04
    assert 0.30 < share.max() < 0.36
    assert abs(share.mean() - (0.02 + 1 / 3) / 2) < 0.015  # uniform
    aspect = (rows / height) / (columns / width)
    assert 0.2 < aspect.min() < 0.36
    assert 2.8 < aspect.max() < 5
    assert abs(aspect.log().mean()) < 0.1
    inside = found[hit].permute(0, 2, 3, 1)[changed[hit]]
    assert inside.unique(dim=0).tolist() == [[0, 128, 255]]
    edges = changed[hit]
    assert all(edges[:, place].any() for place in (0, -1))  # every place comes
    assert all(edges[:, :, place].any() for place in (0, -1))


def test_colours_are_uniform_and_repeat_beyond_three_channels():
    moves = draw_moves(4000, Augmentation(erase=1.0), generator("cpu", 2))
    colours = apply_moves(torch.zeros(4000, 5, 16, 16, dtype=torch.uint8), 0, moves).amax((2, 3))
    assert torch.equal(colours[:, :2], colours[:, 3:])
    assert abs(colours.double().mean(0) - 127.5).max() < 6
    assert abs(np.corrcoef(colours[:, :3].T.numpy())[0, 1]) < 0.1


# --- images, batches and processes -------------------------------------------------------------------------------------------

COUNT, SIDE = 19, 32


def spec(augmentation: Augmentation) -> DataSpec:
    transform = Transform(channels=3, resize=SIDE, crop=(SIDE, SIDE))
    return DataSpec(class_names=("a", "b"), shape=(3, SIDE, SIDE), test_transform=transform, augmentation=augmentation)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    for index, image in enumerate(photographs(COUNT)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:02}.png")
    return sorted(folder.iterdir())


AUGMENTATIONS = [ALL, ALL.model_copy(update={"padding": 0, "resized_crop": True})]


def images_of(split, **how) -> torch.Tensor:
    """What became of every image in an epoch, by its place in the split, in grey levels."""
    batches = list(split.batches(**{"seed": 3, "epoch": 2, "batch": 8, "device": "cpu", **how}))
    out = torch.zeros(COUNT, 3, SIDE, SIDE)
    for batch in batches:
        out[batch.indices] = batch.images.cpu()
    return out * 255


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=["crop", "resized crop"])
def test_an_image_of_a_file_is_augmented_alike_in_whatever_company(files, augmentation):
    split = FileSplit(files, np.arange(COUNT) % 2, spec(augmentation))
    whole = images_of(split)
    workers = FileSplit(files, np.arange(COUNT) % 2, spec(augmentation), workers=2)
    shared = sum(images_of(split, rank=rank, world=3) for rank in range(3))
    for other in (images_of(split, batch=1), images_of(split, batch=5), images_of(workers), shared):
        assert (other - whole).abs().max() <= 1.01  # a sum of an image may be rounded in another order
        assert (other != whole).double().mean() < 0.001
    workers.close()
    assert (images_of(split, epoch=3) != whole).double().mean() > 0.5


@pytest.mark.parametrize("world", [2, 3])
def test_an_image_in_memory_is_augmented_alike_however_many_processes_share_the_batch(world):
    split = MemorySplit(photographs(COUNT, SIDE).numpy(), np.arange(COUNT) % 2, spec(ALL))
    whole = images_of(split)
    shared = sum(images_of(split, rank=rank, world=world) for rank in range(world))
    assert (shared - whole).abs().max() <= 1.01
    assert (shared != whole).double().mean() < 0.001
    assert (whole != split._images.float()).double().mean() > 0.5


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=["crop", "resized crop"])
def test_certification_never_sees_it(files, augmentation):
    plain, changed = (FileSplit(files, np.arange(COUNT) % 2, spec(each)) for each in (Augmentation(), augmentation))
    for index in range(COUNT):
        assert torch.equal(plain.image(index), changed.image(index))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(plain.in_order(5), changed.in_order(5), strict=True))
    memory = MemorySplit(photographs(COUNT, SIDE).numpy(), np.arange(COUNT) % 2, spec(ALL))
    assert torch.equal(memory.image(3), memory._images[3].float() / torch.tensor(255.0))


@pytest.mark.parametrize(
    "fields",
    [
        {"rand_augment": -1},
        {"rand_augment": 17},
        {"rand_magnitude": 31},
        {"erase": 1.5},
        {"erase": -0.1},
        {"erase": float("nan")},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(ValidationError):
        Augmentation(**fields)


def test_rand_augment_needs_one_or_three_channels():
    transform = Transform(channels=1, crop=(4, 4))
    with pytest.raises(ValidationError, match="RandAugment is for images of 1 or 3 channels, and there are 2"):
        DataSpec(class_names=("a",), shape=(2, 4, 4), test_transform=transform, augmentation=ALL)


@pytest.mark.gpu
def test_a_gpu_augments_alike():
    split = MemorySplit(photographs(COUNT, SIDE).numpy(), np.arange(COUNT) % 2, spec(ALL))
    here, there = images_of(split), images_of(split, device="cuda")
    assert ((here - there).abs() > 1.01).double().mean() < 0.01  # the nearest pixel of a tie may be another
