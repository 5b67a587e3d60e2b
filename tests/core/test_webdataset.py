"""Tar shards: any image by itself, labels wherever they are, broken shards; and shards of the library itself."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rscli.data.splits import open_split
from rscli.errors import InputError
from rscli_core.datasets.webdataset import WebDataset

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (23, 12, 10, 3), dtype=np.uint8)
PLAIN = {"size": 8, "augment": "none", "cache": "files"}


def png(index: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS[index]).save(out, "PNG")
    return out.getvalue()


def write(file: Path, members: list[tuple[str, bytes]], **how) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **how) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def sample(index: int, suffix: str = "png") -> list[tuple[str, bytes]]:
    return [(f"{index:04}.{suffix}", png(index)), (f"{index:04}.cls", str(index % 3).encode())]


def shard(file: Path, indices) -> Path:
    return write(file, [member for index in indices for member in sample(index)])


@pytest.fixture
def shards(tmp_path):
    """Three shards for training and one for testing."""
    for number, indices in enumerate([range(7), range(7, 14), range(14, 19)]):
        shard(tmp_path / "w" / f"pets-train-{number:06}.tar", indices)
    shard(tmp_path / "w" / "pets-val-000000.tar", range(19, 23))
    return tmp_path


def opened(data, root, split="train", workers=0):
    return open_split(data, data.spec(root), split, root, workers=workers)


def check(split, indices):
    """That the split has the images of PIXELS with these indices, resized, and their labels."""
    from rscli.data.transforms import centre_crop, resize_shorter, to_tensor

    assert split.labels.tolist() == [index % 3 for index in indices]
    for place, index in enumerate(indices):
        expected = to_tensor(centre_crop(resize_shorter(Image.fromarray(PIXELS[index]), 8), (8, 8)))
        assert torch.equal((split.image(place) * 255).round().to(torch.uint8), expected)


def test_every_image_is_read_by_itself(shards):
    data = WebDataset(path="w", **PLAIN)
    spec = data.spec(shards)
    assert spec.sizes == {"train": 19, "test": 4}
    assert spec.class_names == ("0", "1", "2")
    check(opened(data, shards), range(19))
    check(opened(data, shards, "test"), range(19, 23))
    check(opened(WebDataset(path="w", size=8), shards), range(19))  # in memory
    assert [found.text.split(" in ")[0] for found in data.check(shards)] == [
        "webdataset: 3 shards of train", "webdataset: 1 shard of test",
    ]  # fmt: skip


def test_workers_read_shuffled_epochs_across_shards(shards):
    data = WebDataset(path="w", size=8, augment="resized-crop")
    alone, workers = opened(data, shards), opened(data, shards, workers=2)
    for epoch in (0, 1):
        how = {"seed": 1, "epoch": epoch, "batch": 5, "device": "cpu"}
        ours, theirs = list(alone.batches(**how)), list(workers.batches(**how))
        assert all(
            torch.equal(a, b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one[:3], other[:3], strict=True)
        )
        assert sorted(torch.cat([batch.indices for batch in ours]).tolist()) == list(range(19))
    workers.close()
    assert pickle.loads(pickle.dumps(data.load("train", shards).encoded))[8] == png(8)


def test_folders_of_splits_and_names_of_classes(tmp_path):
    shard(tmp_path / "train" / "a.tar", range(4))
    shard(tmp_path / "test" / "train-of-thought.tar", range(4, 6))
    (tmp_path / "classes.txt").write_text("cat\ndog\n\neel\n", encoding="utf-8")
    data = WebDataset(**PLAIN)
    assert data.spec(tmp_path).class_names == ("cat", "dog", "eel")
    check(opened(data, tmp_path, "test"), range(4, 6))
    (tmp_path / "classes.txt").write_text("cat\ndog\n", encoding="utf-8")
    with pytest.raises(InputError, match="2 classes in its list, and an image with label 2"):
        data.load("train", tmp_path)


def test_members_of_other_kinds_are_left_out_and_counted(tmp_path):
    members = [
        ("a/b/0000.JPG", png(0)), ("a/b/0000.cls", b"2\n"), ("a/b/0000.json", b"{}"), ("a/b/0000.seg.png", png(1)),
        ("0001.png", png(1)), ("0002.cls", b"1"), ("v1.2/0003.png", png(3)), ("v1.2/0003.cls", b"0"),
    ]  # fmt: skip
    file = write(tmp_path / "train.tar", members)
    with tarfile.open(file, "a") as archive:
        link = tarfile.TarInfo("0004.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    found = WebDataset(**PLAIN).load("train", tmp_path)
    assert found.labels.tolist() == [2, 0]
    assert [found.encoded[i] for i in range(2)] == [png(0), png(3)]
    assert [found.names[i] for i in range(2)] == ["train.tar: a/b/0000", "train.tar: v1.2/0003"]
    assert "1 images without a label" in found.note


def test_a_label_in_json(tmp_path):
    write(
        tmp_path / "train.tar",
        [m for i in range(5) for m in ((f"{i}.png", png(i)), (f"{i}.json", json.dumps({"y": i % 3, "x": "text"}).encode()))],
    )
    check(opened(WebDataset(label="json.y", **PLAIN), tmp_path), range(5))
    for wrong in ("json.x", "json.z"):
        with pytest.raises(InputError, match=f"the value '{wrong[-1]}' of 0.json"):
            WebDataset(label=wrong).load("train", tmp_path)
    with pytest.raises(InputError, match="no image with a label 'cls': 5 files skipped"):
        WebDataset().load("train", tmp_path)


@pytest.mark.parametrize("label", [b"cat", b"", b"-1", b"1.5", b"[1]", b"9" * 30, b"\x80\x04K\x01.", b"true"], ids=str)
def test_a_label_that_is_none_is_shown(label, tmp_path):
    write(tmp_path / "train.tar", [("0.png", png(0)), ("0.cls", label)])
    with pytest.raises(InputError, match=r"0\.cls in .*train\.tar is no label") as caught:
        WebDataset().load("train", tmp_path)
    assert "data.label" in caught.value.hint


def test_long_names_and_large_archives_of_every_tar_format(tmp_path):
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        name = "ä" * 40 + "/" + "x" * 60 if kind == tarfile.USTAR_FORMAT else "é" * 150
        file = write(tmp_path / str(kind) / "train.tar", [(f"{name}.png", png(4)), (f"{name}.cls", b"1")], format=kind)
        check(opened(WebDataset(**PLAIN), file.parent), [4])


def compressed(folder):
    write(folder / "train.tar", sample(0))
    import gzip

    (folder / "train.tar").write_bytes(gzip.compress((folder / "train.tar").read_bytes()))


def cut(length):
    def spoil(folder):
        shard(folder / "train.tar", range(6))
        (folder / "train.tar").write_bytes((folder / "train.tar").read_bytes()[:length])

    return spoil


def damaged(folder):
    """In the header of the third member."""
    content = bytearray(shard(folder / "train.tar", range(6)).read_bytes())
    with tarfile.open(folder / "train.tar") as archive:
        at = archive.getmembers()[2].offset
    content[at + 124 : at + 130] = b"xxxxxx"
    (folder / "train.tar").write_bytes(content)


def text(folder):
    (folder / "train.tar").write_text("no archive" * 100)


CUTS = [cut(length) for length in (0, 100, 512, 700, 1024, 1536, 1700, 2048, 2300, 2560, 4096)]


@pytest.mark.parametrize("spoil", [compressed, text, damaged, *CUTS], ids=lambda f: f.__name__)
def test_a_shard_that_cannot_be_read_is_named(spoil, tmp_path):
    spoil(tmp_path)
    with pytest.raises(InputError, match=r"the shard .*train\.tar cannot be read") as caught:
        WebDataset().load("train", tmp_path)
    assert "not compressed" in caught.value.hint


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_cut_while_it_is_in_use_is_said(shards, workers):
    split = opened(WebDataset(path="w", size=8, augment="resized-crop"), shards, workers=workers)
    (shards / "w" / "pets-train-000001.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"pets-train-000001\.tar became shorter"):
        list(split.batches(seed=0, epoch=0, batch=5, device="cpu"))


def test_an_image_that_is_broken_is_named_by_shard_and_key(tmp_path):
    write(tmp_path / "train.tar", [("cat/7.png", b"no image"), ("cat/7.cls", b"1")])
    split = opened(WebDataset(**PLAIN), tmp_path)
    with pytest.raises(InputError, match=r"train\.tar: cat/7"):
        split.image(0)


def test_what_is_missing_is_said_with_what_is_there(tmp_path):
    shard(tmp_path / "pets-train.tar", range(3))
    with pytest.raises(InputError, match="no shards of the split 'test'") as caught:
        WebDataset().load("test", tmp_path)
    assert "There are: pets-train.tar" in caught.value.hint
    with pytest.raises(InputError, match="there are no shards in"):
        WebDataset(path="nowhere").spec(tmp_path)
    assert WebDataset().check(tmp_path / "nowhere") == []


def test_a_shard_that_changes_is_read_anew(tmp_path):
    shard(tmp_path / "train.tar", range(3))
    assert len(WebDataset().load("train", tmp_path).labels) == 3
    shard(tmp_path / "train.tar", range(5))
    assert len(WebDataset().load("train", tmp_path).labels) == 5


def test_shards_of_the_library_itself(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "pets-train-%06d.tar"), maxcount=4, verbose=0) as writer:
        for index in range(10):
            writer.write({"__key__": f"sample{index:05}", "png": PIXELS[index], "cls": index % 3, "json": {"label": index % 3}})
    assert len(list(tmp_path.glob("*.tar"))) == 3
    check(opened(WebDataset(**PLAIN), tmp_path), range(10))
    check(opened(WebDataset(label="json.label", **PLAIN), tmp_path), range(10))
