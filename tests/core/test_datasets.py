"""The core data sets: what they say without files, what they read, and what they say when files are missing or wrong."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from rscli.api import FileImages, MemoryImages
from rscli.errors import InputError
from rscli_core.datasets.cifar10 import CLASSES, Cifar10
from rscli_core.datasets.digits import Digits
from rscli_core.datasets.imagefolder import ImageFolder
from rscli_core.datasets.imagenet import ImageNet
from rscli_core.datasets.mnist import Mnist
from support import SHARED

NOWHERE = Path("no-such-folder")


def write_image(path: Path, size: tuple[int, int] = (40, 30), colour: int = 100, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, colour).convert(mode).save(path)


# --- without files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "shape", "sizes", "first", "last"),
    [
        pytest.param(Digits(), (1, 28, 28), {"train": 1437, "test": 360}, "0", "9", id="digits"),
        pytest.param(Mnist(), (1, 28, 28), {"train": 60_000, "test": 10_000}, "0", "9", id="mnist"),
        pytest.param(Cifar10(), (3, 32, 32), {"train": 50_000, "test": 10_000}, "airplane", "truck", id="cifar10"),
        pytest.param(ImageNet(), (3, 224, 224), {"train": 1_281_167, "test": 50_000}, "0", "999", id="imagenet"),
    ],
)
def test_spec_needs_no_files(dataset, shape, sizes, first, last):
    spec = dataset.spec(NOWHERE)
    assert (spec.shape, spec.sizes) == (shape, sizes)
    assert (spec.class_names[0], spec.class_names[-1]) == (first, last)
    assert (spec.test_transform.channels, *spec.test_transform.crop) == shape


def test_normalisation_and_augmentation_are_the_fields():
    cifar, imagenet = Cifar10().spec(NOWHERE), ImageNet().spec(NOWHERE)
    assert (cifar.mean, cifar.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert (cifar.augmentation.padding, cifar.augmentation.flip, cifar.augmentation.resized_crop) == (4, True, False)
    assert (imagenet.mean, imagenet.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (imagenet.test_transform.resize, imagenet.augmentation.resized_crop) == (256, True)
    for plain in (Digits(), Mnist()):
        assert plain.spec(NOWHERE).mean is None
        assert not plain.spec(NOWHERE).augmentation.flip


@pytest.mark.parametrize("dataset", [Digits(), Mnist(), Cifar10(), ImageNet()], ids=lambda d: type(d).__name__)
def test_unknown_split_names_the_known_ones(dataset):
    with pytest.raises(InputError, match="has no split 'validation'") as caught:
        dataset.load("validation", NOWHERE)
    assert "train, test" in caught.value.hint


@pytest.mark.parametrize("dataset", [Mnist(), Cifar10(), ImageNet(), ImageFolder()], ids=lambda d: type(d).__name__)
def test_missing_files_say_where_they_are_expected(dataset, tmp_path):
    with pytest.raises(InputError) as caught:
        dataset.load("test", tmp_path)
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint
    finding = dataset.check(tmp_path)[0]
    assert not finding.ok
    assert finding.hint


def test_listing_imports_no_heavy_library():
    modules = ", ".join(f"rscli_core.datasets.{name}" for name in ("digits", "mnist", "cifar10", "imagenet", "imagefolder"))
    code = f"import sys, {modules}; print({{'torch', 'torchvision', 'sklearn', 'PIL', 'numpy'}} & set(sys.modules) or '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# --- digits ------------------------------------------------------------------------------------------------------------------


def test_digits_split_by_fifths_and_keep_their_labels():
    from sklearn.datasets import load_digits

    target = load_digits().target
    train, test = Digits().load("train", NOWHERE), Digits().load("test", NOWHERE)
    assert (train.images.shape, test.images.shape) == ((1437, 1, 28, 28), (360, 1, 28, 28))
    assert train.images.dtype == np.uint8
    assert test.labels.tolist() == [int(target[i]) for i in range(0, 1797, 5)]
    assert train.labels.tolist() == [int(target[i]) for i in range(1797) if i % 5]
    assert train.images.max() <= 255
    assert train.images.max() > 240


def test_digits_are_enlarged_bilinearly():
    from sklearn.datasets import load_digits

    small = load_digits().images[10] * (255 / 16)
    at = np.clip((np.arange(28) + 0.5) * 8 / 28 - 0.5, 0, 7)  # where each large pixel's centre lies among the small ones
    low = np.minimum(at.astype(int), 6)
    part = at - low
    rows = small[low] * (1 - part)[:, None] + small[low + 1] * part[:, None]
    expected = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    assert np.abs(Digits().load("test", NOWHERE).images[2, 0] - expected).max() <= 1.5  # rounded three times


# --- MNIST -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zipped_mnist(tmp_path_factory):
    """A data folder with the four published .gz files, not unpacked."""
    if not (SHARED / "data" / "mnist").is_dir():
        pytest.skip("the real MNIST is not here (RSCLI_SHARED)")
    root = tmp_path_factory.mktemp("mnist")
    (root / "MNIST" / "raw").mkdir(parents=True)
    for file in (SHARED / "data" / "mnist").glob("*.gz"):
        shutil.copyfile(file, root / "MNIST" / "raw" / file.name)
    return root


def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def test_mnist_unpacks_what_it_finds_without_a_network(zipped_mnist, monkeypatch, capsys):
    no_network(monkeypatch)
    with pytest.raises(InputError, match="MNIST is not complete"):
        Mnist().load("test", zipped_mnist)
    test = Mnist().load("test", zipped_mnist, download=True)
    train = Mnist().load("train", zipped_mnist)
    assert isinstance(test, MemoryImages)
    assert (test.images.shape, train.images.shape) == ((10_000, 1, 28, 28), (60_000, 1, 28, 28))
    assert (test.images.dtype, test.labels.dtype) == (np.uint8, np.int64)
    assert test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert np.bincount(train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert Mnist().check(zipped_mnist)[0].ok
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dataset", [Mnist(), Cifar10()], ids=["mnist", "cifar10"])
def test_failed_download_tells_its_cause(dataset, tmp_path, monkeypatch):
    no_network(monkeypatch)
    with pytest.raises(InputError, match="no route to host") as caught:
        dataset.load("train", tmp_path, download=True)
    assert "gz" in caught.value.hint


def test_mnist_with_half_an_archive_says_so(zipped_mnist, tmp_path, monkeypatch):
    no_network(monkeypatch)
    name = "t10k-labels-idx1-ubyte.gz"
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / name).write_bytes((zipped_mnist / "MNIST" / "raw" / name).read_bytes()[:-100])
    with pytest.raises(InputError, match="no route to host") as caught:
        Mnist().load("test", tmp_path, download=True)
    assert "no whole .gz of" in caught.value.hint
    assert [file.name for file in (tmp_path / "MNIST" / "raw").iterdir()] == [name]


def test_broken_mnist_file_is_named_as_such(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (raw / name).write_bytes(b"\0\0\x08\x03" + bytes(7))
    with pytest.raises(InputError, match="is broken"):
        Mnist().load("test", tmp_path)


# --- CIFAR-10 ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_cifar(tmp_path, monkeypatch):
    """Six batches of four random images, with torchvision's list of MD5 sums changed to theirs."""
    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    sums, data = {}, {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        data[name] = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": rng.integers(0, 10, 4).tolist()}
    for name, content in {**data, "batches.meta": {"label_names": list(CLASSES)}}.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in data if name != "test_batch"])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]})
    return tmp_path, data


def test_cifar_keeps_pixels_labels_and_order(fake_cifar):
    root, data = fake_cifar
    train, test = Cifar10().load("train", root), Cifar10().load("test", root)
    assert train.images.shape == (20, 3, 32, 32)
    assert train.images.flags.c_contiguous
    assert (train.images[5] == data["data_batch_2"]["data"][1].reshape(3, 32, 32)).all()
    assert test.labels.tolist() == data["test_batch"]["labels"]
    assert Cifar10().check(root)[0].ok


class Bomb:
    """What a malicious pickle does when it is loaded."""

    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_cifar_checks_files_before_it_unpickles_them(name, fake_cifar, monkeypatch):
    root, _ = fake_cifar
    monkeypatch.chdir(root)
    bomb = pickle.dumps(Bomb())
    (root / "cifar-10-batches-py" / name).write_bytes(bomb)
    with pytest.raises(InputError, match="MD5"):
        Cifar10().load("train", root)
    assert not (root / "exploded").exists()
    pickle.loads(bomb)
    assert (root / "exploded").exists()  # it would have


def test_cifar_names_what_is_missing(fake_cifar):
    root, _ = fake_cifar
    (root / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(InputError, match=r"lacks data_batch_4\n"):
        Cifar10().load("test", root)


# --- ImageNet ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_imagenet(tmp_path):
    """Three classes, in train/ and val/."""
    for split in ("train", "val"):
        for name in ("n03", "n01", "n02"):
            for number in (2, 10, 1):
                write_image(tmp_path / "imagenet" / split / name / f"ILSVRC_{number:02}.JPEG")
    return tmp_path


def test_imagenet_order_is_torchvisions(tiny_imagenet):
    from torchvision.datasets import ImageFolder as Reference

    (tiny_imagenet / "imagenet" / "val" / "n01" / "._ILSVRC_01.JPEG").write_bytes(b"left by macOS")
    found = ImageNet(classes=3).load("test", tiny_imagenet)
    (tiny_imagenet / "imagenet" / "val" / "n01" / "._ILSVRC_01.JPEG").unlink()
    expected = Reference(str(tiny_imagenet / "imagenet" / "val")).samples
    assert isinstance(found, FileImages)
    assert [(str(p), int(y)) for p, y in zip(found.paths, found.labels, strict=True)] == expected
    assert list(ImageNet(classes=3).load("val", tiny_imagenet).paths) == list(found.paths)
    assert ImageNet(classes=3).spec(tiny_imagenet).class_names == ("n01", "n02", "n03")
    assert ImageNet(classes=3).check(tiny_imagenet)[0].ok


def test_imagenet_may_be_the_data_folder_itself_and_val_alone(tiny_imagenet):
    shutil.rmtree(tiny_imagenet / "imagenet" / "train")
    assert len(ImageNet(classes=3).load("test", tiny_imagenet / "imagenet").paths) == 9
    assert ImageNet(classes=3).spec(tiny_imagenet / "imagenet").class_names == ("n01", "n02", "n03")
    with pytest.raises(InputError, match="there is no folder"):
        ImageNet(classes=3).load("train", tiny_imagenet)


def flat_val(home):
    for name in ("n01", "n02", "n03"):
        shutil.rmtree(home / "val" / name)
    write_image(home / "val" / "ILSVRC2012_val_00000001.JPEG")


PROBLEMS = {
    "flat val": (flat_val, "val/ has 1 image outside any class folder"),
    "class missing in val": (lambda home: shutil.rmtree(home / "val" / "n02"), "val/ lacks 1 class of train/: n02"),
    "class missing in train": (lambda home: shutil.rmtree(home / "train" / "n02"), "train/ lacks 1 class of val/: n02"),
    "extra class": (lambda home: write_image(home / "val" / "n09" / "a.JPEG"), "val/ has 4 class folders, and 3 are expected"),
    "empty class": (lambda home: (home / "train" / "n03" / "a").mkdir(), None),
    "no classes": (lambda home: [shutil.rmtree(f) for f in (home / "train").iterdir()], "train/ has no class folders"),
}


@pytest.mark.parametrize(("spoil", "text"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_imagenet_preflight_names_each_problem(spoil, text, tiny_imagenet):
    home = tiny_imagenet / "imagenet"
    spoil(home)
    if text is None:
        for file in (home / "train" / "n03").glob("*.JPEG"):
            file.unlink()
        text = "1 class folder of train/ without images: n03"
    with pytest.raises(InputError) as caught:
        ImageNet(classes=3).load("test", tiny_imagenet)
    assert text in caught.value.message
    findings = ImageNet(classes=3).check(tiny_imagenet)
    assert any(text in each.text and each.hint and not each.ok for each in findings)


def test_imagenet_preflight_names_every_problem_at_once(tiny_imagenet):
    home = tiny_imagenet / "imagenet"
    shutil.rmtree(home / "val" / "n02")
    write_image(home / "val" / "loose.JPEG")
    for file in (home / "train" / "n01").glob("*.JPEG"):
        file.unlink()
    with pytest.raises(InputError) as caught:
        ImageNet(classes=3).load("train", tiny_imagenet)
    for text in (
        "outside any class folder",
        "2 class folders, and 3",
        "train/ without images: n01",
        "lacks 1 class of train/: n02",
    ):
        assert text in caught.value.message


def test_imagenet_with_another_number_of_classes_names_the_field(tiny_imagenet):
    with pytest.raises(InputError, match=r"--set data\.classes=3"):
        ImageNet().load("test", tiny_imagenet)
    assert len(ImageNet().spec(tiny_imagenet).class_names) == 1000
    assert ImageNet(classes=3).spec(tiny_imagenet).sizes == {}


# --- any folder of images ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two classes; every format once in train/, and a val/ instead of a test/."""
    for suffix in ("png", "jpg", "JPEG", "bmp", "gif", "webp", "tif", "TIFF", "ppm"):
        write_image(tmp_path / "pets" / "train" / "cat" / f"{suffix}.{suffix}")
        write_image(tmp_path / "pets" / "val" / "dog" / f"{suffix}.{suffix}", mode="L")
    write_image(tmp_path / "pets" / "train" / "dog" / "a.PNG")
    (tmp_path / "pets" / "train" / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "pets" / "train" / ".cache").mkdir()
    return tmp_path


def test_imagefolder_reads_every_format_and_takes_classes_from_train(folder):
    data = ImageFolder(path="pets", size=16, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    spec = data.spec(folder)
    assert spec.class_names == ("cat", "dog")
    assert spec.shape == (3, 16, 16)
    assert spec.sizes == {"train": 10, "test": 9}
    assert (spec.mean, spec.test_transform.resize) == ((0.5, 0.5, 0.5), 16)
    train, test = data.load("train", folder), data.load("test", folder)
    assert train.labels.tolist() == [0] * 9 + [1]
    assert test.labels.tolist() == [1] * 9  # from val/, although it has no cat
    assert all(found.ok for found in data.check(folder))


def test_imagefolder_path_may_be_absolute_or_the_data_folder(folder):
    expected = list(ImageFolder(path="pets").load("train", folder).paths)
    assert list(ImageFolder(path=str(folder / "pets")).load("train", NOWHERE).paths) == expected
    assert list(ImageFolder().load("train", folder / "pets").paths) == expected


@pytest.mark.parametrize(
    ("fields", "cached"),
    [
        pytest.param({}, True, id="auto"),
        pytest.param({"size": 8192}, False, id="auto, too large"),
        pytest.param({"augment": "resized-crop"}, False, id="auto, resized crop"),
        pytest.param({"cache": "memory", "size": 8192}, True, id="memory"),
        pytest.param({"cache": "files"}, False, id="files"),
    ],
)
def test_imagefolder_cache(fields, cached, folder):
    assert ImageFolder(path="pets", **fields).load("train", folder).cache is cached


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        pytest.param({"cache": "memory", "augment": "resized-crop"}, "cannot serve", id="memory and resized crop"),
        pytest.param({"mean": (0.5, 0.5, 0.5)}, "go together", id="mean without std"),
        pytest.param({"mean": (0.5,), "std": (0.5,)}, "mean has 1 values, and there are 3 channels", id="too few means"),
        pytest.param({"mean": (0.5,) * 3, "std": (0.5, 0.0, 0.5)}, "above 0", id="std of zero"),
        pytest.param({"size": 0}, "greater than or equal to 1", id="size of zero"),
        pytest.param({"channels": 4}, "1 or 3", id="four channels"),
    ],
)
def test_imagefolder_refuses_fields_that_do_not_fit(fields, text):
    with pytest.raises(ValidationError, match=text):
        ImageFolder(**fields)


def empty_class(home):
    (home / "train" / "eel").mkdir()


def one_class(home):
    shutil.rmtree(home / "train" / "dog")


def loose(home):
    write_image(home / "val" / "loose.png")


def unknown_class(home):
    write_image(home / "val" / "eel" / "a.png")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (empty_class, "without images: eel"),
        (one_class, "needs two"),
        (loose, "outside any"),
        (unknown_class, "does not have: eel"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_imagefolder_names_what_is_wrong(spoil, text, folder):
    spoil(folder / "pets")
    data = ImageFolder(path="pets")
    with pytest.raises(InputError, match=text):
        data.load("test", folder)
    assert [found.ok for found in data.check(folder)] == [False]


def test_imagefolder_with_a_test_split_alone(folder):
    write_image(folder / "pets" / "val" / "cat" / "a.png")
    shutil.rmtree(folder / "pets" / "train")
    assert ImageFolder(path="pets").spec(folder).class_names == ("cat", "dog")
    with pytest.raises(InputError, match=r"no folder .* for the split 'train'"):
        ImageFolder(path="pets").load("train", folder)
