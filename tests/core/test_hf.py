"""Data sets in the Hugging Face format, written by the library itself; and what is said without it."""

from __future__ import annotations

import builtins
import io
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rscli.data.splits import open_split
from rscli.errors import InputError
from rscli_core.datasets.hf import HuggingFace

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (11, 12, 10, 3), dtype=np.uint8)
NAMES = ["cat", "dog", "eel"]
PLAIN = {"size": 8, "augment": "none", "cache": "files"}


def png(index: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS[index]).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The library, with a cache of its own, and no network."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return library


def table(datasets, indices, images="image", labels="label", kind=None, **more):
    features = datasets.Features({images: datasets.Image(), labels: kind or datasets.ClassLabel(names=NAMES)} | {
        name: datasets.Value("string") for name in more
    })  # fmt: skip
    values = {images: [{"bytes": png(i), "path": None} for i in indices], labels: [i % 3 for i in indices], **more}
    return datasets.Dataset.from_dict(values, features=features)


def opened(data, root, split="train", workers=0):
    return open_split(data, data.spec(root), split, root, workers=workers)


def check(split, indices):
    from rscli.data.transforms import centre_crop, resize_shorter, to_tensor

    assert split.labels.tolist() == [index % 3 for index in indices]
    for place, index in enumerate(indices):
        expected = to_tensor(centre_crop(resize_shorter(Image.fromarray(PIXELS[index]), 8), (8, 8)))
        assert torch.equal((split.image(place) * 255).round().to(torch.uint8), expected)


def parquet(made, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    made.to_parquet(str(file))


@pytest.fixture(params=["parquet", "parquet in folders", "save_to_disk"])
def home(request, tmp_path, datasets):
    train, test = table(datasets, range(7)), table(datasets, range(7, 11))
    if request.param == "save_to_disk":
        datasets.DatasetDict(train=train, test=test).save_to_disk(str(tmp_path / "d"))
    elif request.param == "parquet":
        parquet(train.select(range(4)), tmp_path / "d" / "data" / "train-00000-of-00002.parquet")
        parquet(train.select(range(4, 7)), tmp_path / "d" / "data" / "train-00001-of-00002.parquet")
        parquet(test, tmp_path / "d" / "data" / "validation-00000-of-00001.parquet")
    else:
        parquet(train, tmp_path / "d" / "train" / "0000.parquet")
        parquet(test, tmp_path / "d" / "test" / "0000.parquet")
    return tmp_path


def test_tables_give_their_images_labels_and_class_names(home):
    data = HuggingFace(path="d", **PLAIN)
    spec = data.spec(home)
    assert spec.class_names == tuple(NAMES)
    assert spec.sizes == {"train": 7, "test": 4}
    check(opened(data, home), range(7))
    check(opened(data, home, "test"), range(7, 11))
    check(opened(HuggingFace(path=str(home / "d"), size=8), Path("nowhere")), range(7))  # in memory


def test_workers_read_tables(home):
    data = HuggingFace(path="d", size=8, augment="resized-crop", rand_augment=1)
    alone, workers = opened(data, home), opened(data, home, workers=2)
    for epoch in (0, 1):
        how = {"seed": 1, "epoch": epoch, "batch": 3, "device": "cpu"}
        pairs = zip(alone.batches(**how), workers.batches(**how), strict=True)
        assert all(torch.equal(a, b) for one, other in pairs for a, b in zip(one[:3], other[:3], strict=True))
    workers.close()
    encoded = data.load("train", home).encoded
    assert pickle.loads(pickle.dumps(encoded))[3] == png(3)


def test_columns_are_found_or_named(tmp_path, datasets):
    fine = datasets.ClassLabel(names=NAMES)
    made = table(datasets, range(6), "img", "fine_label", fine, text=["x"] * 6).add_column("coarse_label", [0] * 6)
    made = made.cast_column("coarse_label", datasets.ClassLabel(names=["all", "none"]))
    parquet(made, tmp_path / "d" / "train.parquet")
    check(opened(HuggingFace(path="d", **PLAIN), tmp_path), range(6))
    coarse = HuggingFace(path="d", label_column="coarse_label", **PLAIN)
    assert coarse.spec(tmp_path).class_names == ("all", "none")
    assert coarse.load("train", tmp_path).labels.tolist() == [0] * 6
    for wrong, text in (
        ({"label_column": "nothing"}, "no column 'nothing'; it has img, fine_label"),
        ({"image_column": "y"}, "'y'"),
    ):
        with pytest.raises(InputError, match=text):
            HuggingFace(path="d", **wrong).load("train", tmp_path)


def test_labels_may_be_numbers_or_texts(tmp_path, datasets):
    parquet(table(datasets, range(6), kind=datasets.Value("int64")), tmp_path / "n" / "train.parquet")
    assert HuggingFace(path="n").spec(tmp_path).class_names == ("0", "1", "2")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    for split, names in (("train", ["dog", "cat", "dog"]), ("test", ["cat", "cat", "eel"])):
        rows = {"image": [{"bytes": png(i), "path": None} for i in range(3)], "label": names}
        parquet(datasets.Dataset.from_dict(rows, features=features), tmp_path / "t" / f"{split}.parquet")
    data = HuggingFace(path="t")
    assert data.spec(tmp_path).class_names == ("cat", "dog")
    assert data.load("train", tmp_path).labels.tolist() == [1, 0, 1]
    with pytest.raises(InputError, match=r"test\[2\] of t has label = 'eel', which is none of its classes"):
        data.load("test", tmp_path)


def test_a_table_that_says_nothing_of_images(tmp_path, datasets):
    import pyarrow
    import pyarrow.parquet

    rows = {"image": [{"bytes": png(i), "path": "a.png"} for i in range(6)], "label": [i % 3 for i in range(6)]}
    (tmp_path / "struct").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "struct" / "train.parquet")
    check(opened(HuggingFace(path="struct", **PLAIN), tmp_path), range(6))
    (tmp_path / "bare").mkdir()
    bare = pyarrow.table({"picture": [png(i) for i in range(6)], "label": rows["label"]})
    pyarrow.parquet.write_table(bare, tmp_path / "bare" / "train.parquet")
    check(opened(HuggingFace(path="bare", **PLAIN), tmp_path), range(6))


def test_a_test_split_without_labels_is_refused(tmp_path, datasets):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    for split, label in (("train", 1), ("test", -1)):
        rows = {"image": [{"bytes": png(0), "path": None}], "label": [label]}
        parquet(datasets.Dataset.from_dict(rows, features=features), tmp_path / "d" / f"{split}.parquet")
    with pytest.raises(InputError, match=r"test\[0\] of d has label = -1") as caught:
        HuggingFace(path="d").load("test", tmp_path)
    assert "validation is taken" in caught.value.hint


def test_configurations_are_chosen_by_their_folder(tmp_path, datasets):
    for name, indices in (("small", range(3)), ("large", range(6))):
        parquet(table(datasets, indices), tmp_path / "d" / name / "train-00000-of-00001.parquet")
    with pytest.raises(InputError, match="in several folders: large, small") as caught:
        HuggingFace(path="d").spec(tmp_path)
    assert "data.config" in caught.value.hint
    assert HuggingFace(path="d", config="large").spec(tmp_path).sizes == {"train": 6}
    with pytest.raises(InputError, match="there is no folder"):
        HuggingFace(path="d", config="huge").spec(tmp_path)


def test_a_row_that_names_a_file_is_not_followed(tmp_path, datasets):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = {"image": [{"bytes": None, "path": "/etc/passwd"}], "label": [1]}
    datasets.DatasetDict(
        train=datasets.Dataset.from_dict(rows, features=features).cast_column("image", datasets.Image(decode=False))
    )
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "d").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "d" / "train.parquet")
    split = opened(HuggingFace(path="d", **PLAIN), tmp_path)
    with pytest.raises(InputError, match="names a file"):
        split.image(0)


@pytest.mark.parametrize("content", [b"PAR1 no table", b""], ids=["broken", "empty"])
def test_a_broken_table_is_named(content, tmp_path, datasets):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"train\.parquet cannot be read"):
        HuggingFace(path="d").spec(tmp_path)


def test_what_is_missing_is_said(tmp_path, datasets):
    (tmp_path / "d").mkdir()
    with pytest.raises(InputError, match="no splits train or test") as caught:
        HuggingFace(path="d").spec(tmp_path)
    assert "save_to_disk" in caught.value.hint
    for name in ("user/nowhere", "../nowhere", "a b"):
        with pytest.raises(InputError, match="there is no folder") as caught:
            HuggingFace(path=name).spec(tmp_path)
        assert "hf download" in caught.value.hint
    parquet(table(datasets, range(3)), tmp_path / "d" / "train.parquet")
    with pytest.raises(InputError, match="no split 'test'"):
        HuggingFace(path="d").load("test", tmp_path)


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **more):
        if name.split(".")[0] == "datasets":
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    (tmp_path / "d").mkdir()
    with pytest.raises(InputError, match="need the library datasets") as caught:
        HuggingFace(path="d").spec(tmp_path)
    assert caught.value.hint == "pip install 'rscli[hf]'"
