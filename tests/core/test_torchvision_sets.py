"""Data sets of torchvision: made files in its formats, and what is said when they are missing or not the published ones."""

from __future__ import annotations

import bz2
import hashlib
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from pydantic import ValidationError

from rscli.config.layers import resolve
from rscli.data.splits import open_split
from rscli.errors import ConfigError, InputError
from rscli_core.datasets.torchvision_sets import SETS, TorchvisionSet

RNG = np.random.default_rng(0)
COUNT = 5


def idx(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    file.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def write_mnist_like(name, root, images, labels, monkeypatch):
    for split in ("train", "t10k"):
        idx(root / name / "raw" / f"{split}-images-idx3-ubyte", images[:, 0])
        idx(root / name / "raw" / f"{split}-labels-idx1-ubyte", labels.astype(np.uint8))


def write_svhn(name, root, images, labels, monkeypatch):
    from scipy.io import savemat

    sums = {}
    for split in ("train", "test"):
        file = root / f"{split}_32x32.mat"
        savemat(file, {"X": images.transpose(2, 3, 1, 0), "y": np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)})
        sums[split] = ["http://nowhere", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", sums)


def write_cifar100(name, root, images, labels, monkeypatch):
    folder = root / "cifar-100-python"
    folder.mkdir()
    kind, flat = torchvision.datasets.CIFAR100, images.reshape(COUNT, -1)
    for split, listed in (("train", "train_list"), ("test", "test_list")):
        (folder / split).write_bytes(pickle.dumps({"data": flat, "fine_labels": labels.tolist()}))
        monkeypatch.setattr(kind, listed, [[split, hashlib.md5((folder / split).read_bytes()).hexdigest()]])
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": list(SETS["CIFAR100"].classes)}))
    digest = hashlib.md5((folder / "meta").read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "meta", {"filename": "meta", "key": "fine_label_names", "md5": digest})


def write_stl10(name, root, images, labels, monkeypatch):
    folder = root / "stl10_binary"
    folder.mkdir()
    kind, sums = torchvision.datasets.STL10, {}
    for file, array in (("X", images.transpose(0, 1, 3, 2)), ("y", labels + 1)):
        for split in ("train", "test"):
            content = np.ascontiguousarray(array).astype(np.uint8).tobytes()
            (folder / f"{split}_{file}.bin").write_bytes(content)
            sums[split, file] = [f"{split}_{file}.bin", hashlib.md5(content).hexdigest()]
    monkeypatch.setattr(kind, "train_list", [sums["train", "X"], sums["train", "y"]])
    monkeypatch.setattr(kind, "test_list", [sums["test", "X"], sums["test", "y"]])


def write_usps(name, root, images, labels, monkeypatch):
    lines = [
        f"{label + 1} " + " ".join(f"{i + 1}:{(value + 0.5) / 255 * 2 - 1:.6f}" for i, value in enumerate(image.flatten()))
        for image, label in zip(images.astype(int), labels, strict=True)
    ]
    for file in ("usps.bz2", "usps.t.bz2"):
        (root / file).write_bytes(bz2.compress("\n".join(lines).encode()))


WRITE = {
    "FashionMNIST": write_mnist_like, "KMNIST": write_mnist_like, "USPS": write_usps, "SVHN": write_svhn,
    "CIFAR100": write_cifar100, "STL10": write_stl10,
}  # fmt: skip


@pytest.fixture(params=SETS)
def made(request, tmp_path, monkeypatch):
    """A set of five images with known pixels and labels, in the files of the real one."""
    shape, classes = SETS[request.param].shape, len(SETS[request.param].classes)
    images = RNG.integers(0, 254, (COUNT, *shape), dtype=np.uint8)
    labels = np.array([0, classes - 1, 3, 0, 1])
    WRITE[request.param](request.param, tmp_path, images, labels, monkeypatch)
    return request.param, images, labels, tmp_path


def test_images_and_labels_are_those_of_the_files(made):
    name, images, labels, root = made
    data = TorchvisionSet(dataset=name)
    spec = data.spec(Path("no-such-folder"))
    for split in ("train", "test"):
        found = open_split(data, spec, split, root)
        assert found.labels.tolist() == labels.tolist()
        assert np.array_equal(np.stack([found.image(i).numpy() for i in range(COUNT)]), images / np.float32(255))
    with pytest.raises(InputError, match=f"torchvision/{name} has no split 'extra'"):
        data.load("extra", root)


@pytest.mark.parametrize("name", SETS)
def test_what_is_missing_is_said(name, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=f"{name} is not complete in") as caught:
        TorchvisionSet(dataset=name).load("train", tmp_path)
    assert "--download" in caught.value.hint

    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(InputError, match="no route to host"):
        TorchvisionSet(dataset=name).load("train", tmp_path, download=True)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("file", ["train", "meta"])
def test_cifar100_is_checked_before_it_is_unpickled(file, tmp_path, monkeypatch):
    images, labels = RNG.integers(0, 254, (COUNT, 3, 32, 32), dtype=np.uint8), np.arange(COUNT)
    write_cifar100("CIFAR100", tmp_path, images, labels, monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar-100-python" / file).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match="not complete"):
        TorchvisionSet(dataset="CIFAR100").load("train", tmp_path)
    assert not Path("exploded").exists()


def test_published_sizes_and_what_is_usual():
    sizes = {name: tuple(TorchvisionSet(dataset=name).spec(Path()).sizes.values()) for name in SETS}
    assert sizes == {
        "FashionMNIST": (60_000, 10_000), "KMNIST": (60_000, 10_000), "USPS": (7291, 2007), "SVHN": (73_257, 26_032),
        "CIFAR100": (50_000, 10_000), "STL10": (5000, 8000),
    }  # fmt: skip
    flips = {name: TorchvisionSet(dataset=name).spec(Path()).augmentation.flip for name in SETS}
    assert [name for name, flip in flips.items() if flip] == ["CIFAR100", "STL10"]  # digits and letters are not mirrored
    change = TorchvisionSet(dataset="CIFAR100", augment="none", rand_augment=2, erase=0.1).spec(Path()).augmentation
    assert (change.padding, change.flip, change.rand_augment, change.erase) == (0, False, 2, 0.1)
    assert len(set(SETS["CIFAR100"].classes)) == 100
    assert list(SETS["CIFAR100"].classes) == sorted(SETS["CIFAR100"].classes)
    assert SETS["FashionMNIST"].classes == tuple(torchvision.datasets.FashionMNIST.classes)
    assert SETS["KMNIST"].classes == tuple(torchvision.datasets.KMNIST.classes)


def test_the_name_is_behind_the_slash_and_near_misses_are_told():
    resolved = resolve(preset="mnist-gaussian-0.5", sets=["data.name=torchvision/FashionMNIST"])
    assert resolved.dataset == TorchvisionSet(dataset="FashionMNIST")
    with pytest.raises(ConfigError, match="Did you mean 'torchvision/FashionMNIST'"):
        resolve(preset="mnist-gaussian-0.5", sets=["data.name=FashionMNIST"])
    with pytest.raises(ValidationError, match="mnist and cifar10"):
        TorchvisionSet(dataset="MNIST")
