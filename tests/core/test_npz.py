"""Numpy archives: every layout and name, what is refused, and that nothing in them is unpickled."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from rscli.data.splits import open_split, spec_of
from rscli.errors import InputError
from rscli_core.datasets.npz import Npz

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (7, 6, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2, 3])


def save(file: Path, **arrays) -> Path:
    np.savez(file, **arrays)
    return file


def both(file: Path, images=GREY, labels=LABELS, **more) -> Path:
    return save(
        file, train_images=images, train_labels=labels, test_images=images[:3], test_labels=np.asarray(labels)[:3], **more
    )


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (GREY, GREY[:, None]),
        (GREY[..., None], GREY[:, None]),
        (GREY[:, None], GREY[:, None]),
        (COLOUR, COLOUR.transpose(0, 3, 1, 2)),
        (np.ascontiguousarray(COLOUR.transpose(0, 3, 1, 2)), COLOUR.transpose(0, 3, 1, 2)),
        (np.asfortranarray(COLOUR), COLOUR.transpose(0, 3, 1, 2)),
    ],
    ids=["HW", "HW1", "1HW", "HW3", "3HW", "in Fortran's order"],
)
def test_images_come_in_our_order_of_axes(images, expected, tmp_path):
    both(tmp_path / "a.npz", images)
    data = Npz(path="a.npz")
    spec = data.spec(tmp_path)
    train, test = (open_split(data, spec, split, tmp_path) for split in ("train", "test"))
    assert spec.shape == expected.shape[1:]
    assert spec.sizes == {"train": 7, "test": 3}
    assert spec.class_names == ("0", "1", "2", "3")
    assert np.array_equal(train.image(4).numpy(), expected[4] / np.float32(255))
    assert test.labels.tolist() == [0, 1, 2]


NAMES = [("train_images", "train_labels"), ("x_train", "y_train"), ("images_train", "labels_train"), ("X_train", "Y_train")]


@pytest.mark.parametrize(("image", "label"), NAMES, ids=str)
def test_arrays_have_the_usual_names(image, label, tmp_path):
    save(tmp_path / "a.npz", **{image: GREY, label: LABELS})
    assert np.array_equal(Npz(path="a.npz").load("train", tmp_path).images[:, 0], GREY)
    assert Npz(path="a.npz").spec(tmp_path).sizes == {"train": 7}
    with pytest.raises(InputError, match=f"no images and labels of the split 'test'; it holds {image}, {label}"):
        Npz(path="a.npz").load("test", tmp_path)


def test_medmnist_has_labels_in_a_column_and_its_test_split_is_the_one(tmp_path):
    save(
        tmp_path / "m.npz", train_images=GREY, train_labels=LABELS[:, None].astype(np.uint8),
        val_images=GREY[:2], val_labels=LABELS[:2, None], test_images=GREY[:4], test_labels=LABELS[:4, None],
    )  # fmt: skip
    data = Npz(path="m.npz")
    assert data.load("train", tmp_path).labels.dtype == np.int64
    assert len(data.load("test", tmp_path).labels) == 4
    assert len(data.load("val", tmp_path).labels) == 2
    np.savez_compressed(tmp_path / "v.npz", train_images=GREY, train_labels=LABELS, val_images=GREY[:2], val_labels=LABELS[:2])
    assert len(Npz(path="v.npz").load("test", tmp_path).labels) == 2
    assert Npz(path="v.npz").spec(tmp_path).sizes == {"train": 7, "test": 2}


def test_a_folder_of_one_archive_a_split(tmp_path):
    (tmp_path / "d").mkdir()
    save(tmp_path / "d" / "train.npz", images=GREY, labels=LABELS)
    save(tmp_path / "d" / "val.npz", x=GREY[:2], y=LABELS[:2])
    data = Npz(path=str(tmp_path / "d"))
    assert data.spec(Path("nowhere")).sizes == {"train": 7, "test": 2}
    assert len(data.load("test", Path("nowhere")).labels) == 2
    (tmp_path / "d" / "val.npz").unlink()
    with pytest.raises(InputError, match=r"there is no .*test\.npz"):
        data.load("test", tmp_path)


def test_class_names_normalisation_and_augmentation(tmp_path):
    both(tmp_path / "a.npz", class_names=np.array(["w", "x", "y", "z"]))
    data = Npz(path="a.npz", mean=(0.5,), std=(0.2,), augment="crop-flip", rand_augment=2, erase=0.25)
    spec = spec_of(data, tmp_path)
    assert spec.class_names == ("w", "x", "y", "z")
    assert (spec.mean, spec.std) == ((0.5,), (0.2,))
    change = spec.augmentation
    assert (change.padding, change.flip, change.rand_augment, change.erase) == (4, True, 2, 0.25)


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"train_images": GREY / 255, "train_labels": LABELS}, "float64, and must be uint8"),
        ({"train_images": GREY[0], "train_labels": LABELS}, r"shape \(6, 5\)"),
        ({"train_images": COLOUR[..., :2], "train_labels": LABELS}, r"shape \(7, 6, 5, 2\)"),
        ({"train_images": GREY, "train_labels": LABELS / 1}, "whole numbers from 0"),
        ({"train_images": GREY, "train_labels": LABELS - 1}, "from -1"),
        ({"train_images": GREY, "train_labels": np.eye(7, dtype=int)}, r"\(7, 7\)"),
        ({"train_images": GREY, "train_labels": LABELS[:3]}, "7 images and 3 labels"),
        ({"images": GREY, "labels": LABELS}, "no images and labels"),
        ({"train_images": GREY, "train_labels": np.array(["a"] * 7)}, "whole numbers"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_named(arrays, text, tmp_path):
    save(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=text) as caught:
        Npz(path="a.npz").load("train", tmp_path)
    assert "a.npz" in caught.value.message
    assert caught.value.hint


def test_normalisation_must_fit_the_channels(tmp_path):
    both(tmp_path / "a.npz")
    with pytest.raises(InputError, match="mean has 3 values, and there are 1 channels"):
        Npz(path="a.npz", mean=(0.5,) * 3, std=(0.5,) * 3).spec(tmp_path)
    with pytest.raises(InputError, match="go together"):
        Npz(path="a.npz", mean=(0.5,)).spec(tmp_path)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("kind", ["array of objects", "a pickle", "text", "half", "one array", "nothing"])
def test_nothing_is_unpickled_and_broken_archives_are_said(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.npz"
    if kind == "array of objects":
        np.savez(file, train_images=np.array([Bomb()], dtype=object), train_labels=np.array([Bomb()], dtype=object))
    elif kind == "a pickle":
        file.write_bytes(pickle.dumps(Bomb()))
    elif kind == "text":
        file.write_text("hello")
    elif kind == "half":
        both(file)
        file.write_bytes(file.read_bytes()[:-200])
    elif kind == "one array":
        np.save(tmp_path / "a.npy", GREY)
        (tmp_path / "a.npy").rename(file)
    for use in (Npz(path="a.npz").spec, lambda root: Npz(path="a.npz").load("train", root)):
        with pytest.raises(InputError, match=r"a\.npz") as caught:
            use(tmp_path)
        assert caught.value.hint
    assert not Path("exploded").exists()


def test_the_array_of_a_damaged_file_is_named(tmp_path):
    file = both(tmp_path / "a.npz")
    content = bytearray(file.read_bytes())
    at = content.index(GREY.tobytes()[:40])
    content[at : at + 40] = bytes(40)  # the checksum of the archive does not fit any more
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"'train_images' of .* cannot be read"):
        Npz(path="a.npz").load("train", tmp_path)


def test_it_has_a_path():
    with pytest.raises(ValidationError, match="path"):
        Npz()
