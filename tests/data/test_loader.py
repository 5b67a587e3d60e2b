"""Reading for training: workers that go on from epoch to epoch, pieces of batches, and JPEG files decoded quickly."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rscli.api import Augmentation, Dataset, DataSpec, EncodedImages, Transform
from rscli.data import transforms
from rscli.data.pieces import PIECE_PIXELS, Order, one_ahead, piece_size, pieces_ahead
from rscli.data.sources import EncodedFiles
from rscli.data.splits import Batch, FileSplit, open_split
from rscli.data.transforms import EncodedFile, load_image, load_resized_crop
from rscli.errors import InputError, PluginError, RscliError

COUNT = 23
CROPS = Augmentation(flip=True, resized_crop=True)
HOW = {"seed": 0, "batch": 5, "device": "cpu"}


def spec_of(augmentation: Augmentation = CROPS, side: int = 6) -> DataSpec:
    transform = Transform(channels=3, resize=side, crop=(side, side))
    return DataSpec(class_names=("a", "b", "c"), shape=(3, side, side), test_transform=transform, augmentation=augmentation)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(2)
    paths = [folder / f"{i:02}.png" for i in range(COUNT)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (12, 9 + rng.integers(4), 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def split(files):
    with closing(FileSplit(files, np.arange(COUNT) % 3, spec_of(), workers=2)) as made:
        yield made


def readers() -> set[int]:
    return {child.pid or 0 for child in multiprocessing.active_children() if child.daemon}


def gone(pids: set[int]) -> bool:
    until = time.monotonic() + 10
    while readers() & pids and time.monotonic() < until:
        time.sleep(0.05)
    return not readers() & pids


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one[:3], other[:3], strict=True)
    )


# --- workers that go on ------------------------------------------------------------------------------------------------------


def test_the_same_workers_read_every_epoch_and_what_they_read_is_what_one_process_reads(split, files):
    alone = FileSplit(files, split.labels, split.spec)
    seen = []
    for epoch in (3, 4, 5):
        assert same(list(split.batches(epoch=epoch, **HOW)), list(alone.batches(epoch=epoch, **HOW)))
        seen.append(readers())
    assert len(seen[0]) == 2
    assert seen[0] == seen[1] == seen[2]
    split.close()
    assert gone(seen[0])
    assert same(list(split.batches(epoch=5, **HOW)), list(alone.batches(epoch=5, **HOW)))  # closed is not the end
    assert readers()


@pytest.mark.parametrize(
    "other",
    [{"epoch": 0}, {"epoch": 2}, {"epoch": 1, "start": 2}, {"epoch": 1, "seed": 1}, {"epoch": 1, "batch": 4},
     {"epoch": 1, "rank": 1, "world": 2}],
    ids=str,
)  # fmt: skip
def test_what_does_not_follow_is_read_anew(split, files, other):
    list(split.batches(epoch=0, **HOW))
    before = readers()
    alone = FileSplit(files, split.labels, split.spec)
    assert same(list(split.batches(**{**HOW, **other})), list(alone.batches(**{**HOW, **other})))
    assert gone(before)


def test_an_epoch_that_is_left_ends_the_workers(split):
    list(split.batches(epoch=0, **HOW))
    batches = split.batches(epoch=1, **HOW)
    next(batches)
    there = readers()
    assert len(there) == 2
    batches.close()
    assert gone(there)


def test_an_exception_of_the_caller_ends_the_workers(split):
    there: set[int] = set()

    def train() -> None:
        with closing(split.batches(epoch=0, **HOW)) as batches:
            for _ in batches:
                there.update(readers())
                raise KeyError

    with pytest.raises(KeyError):
        train()
    assert len(there) == 2
    assert gone(there)


def test_a_split_that_is_forgotten_ends_its_workers(files):
    split = FileSplit(files, np.arange(COUNT) % 3, spec_of(), workers=2)
    list(split.batches(epoch=0, **HOW))
    there = readers()
    gc.disable()  # at once, not when circles are looked for
    try:
        del split
        assert there
        assert gone(there)
    finally:
        gc.enable()


def test_two_epochs_side_by_side(split, files):
    alone = FileSplit(files, split.labels, split.spec)
    one, other = split.batches(epoch=0, **HOW), split.batches(epoch=1, **HOW)
    pairs = list(zip(one, other, strict=True))
    assert same([pair[0] for pair in pairs], list(alone.batches(epoch=0, **HOW)))
    assert same([pair[1] for pair in pairs], list(alone.batches(epoch=1, **HOW)))
    assert list(one) == list(other) == []
    split.close()
    assert gone(readers())


@pytest.mark.skipif(sys.platform != "linux", reason="kills a process")
def test_a_worker_that_dies_between_epochs_is_said_and_the_next_epoch_begins_anew(split, files):
    first = split.batches(epoch=0, **HOW)
    list(first)
    there = readers()
    for pid in there:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(RscliError, match=r"was killed \(signal 9\)"):  # what was read ahead is still given
        [list(split.batches(epoch=epoch, **HOW)) for epoch in range(1, 50)]
    alone = FileSplit(files, split.labels, split.spec)
    assert same(list(split.batches(epoch=7, **HOW)), list(alone.batches(epoch=7, **HOW)))


def test_a_broken_file_is_said_and_ends_the_workers(files, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    split = FileSplit([*files[:-1], tmp_path / "bad.png"], np.arange(COUNT) % 3, spec_of(), workers=2)
    before = readers()
    with pytest.raises(InputError, match=r"bad\.png"):
        list(split.batches(epoch=0, **HOW))
    assert gone(readers() - before)


TRAINING = """
import os, signal, sys, time, multiprocessing
from contextlib import closing
from pathlib import Path
import numpy as np
from rscli.api import Augmentation, DataSpec, Transform
from rscli.cli import interrupts
from rscli.data.splits import FileSplit
from rscli.runtime.signals import stop_requests

def main(how, paths):
    transform = Transform(channels=3, resize=6, crop=(6, 6))
    spec = DataSpec(class_names=("a", "b"), shape=(3, 6, 6), test_transform=transform, augmentation=Augmentation(flip=True))
    split = FileSplit([Path(p) for p in paths], np.arange(len(paths)) % 2, spec, workers=2)
    with stop_requests() as stop, closing(split):
        for epoch in range(10**9):
            for _ in split.batches(seed=0, epoch=epoch, batch=5, device="cpu"):
                pass
            if epoch == 2:
                print(*(child.pid for child in multiprocessing.active_children()), flush=True)
                if how == "between":
                    time.sleep(3600)
                if how == "KeyError":
                    raise KeyError("a defect")
                if how == "exit":
                    sys.exit(3)
            if stop.requested:
                return stop.exit_code

with interrupts.heard():
    sys.exit(main(sys.argv[1], sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
@pytest.mark.parametrize(
    ("how", "number", "code"),
    [
        ("between", signal.SIGKILL, -9),
        ("on", signal.SIGKILL, -9),
        ("on", signal.SIGTERM, 75),
        ("on", signal.SIGINT, 130),
        ("KeyError", None, 1),
        ("exit", None, 3),
    ],
    ids=str,
)
def test_workers_that_wait_between_epochs_end_with_their_parent(how, number, code, files, tmp_path):
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    process = subprocess.Popen(
        [sys.executable, str(script), how, *map(str, files)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 2
        if number is not None:
            process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, err
    until = time.monotonic() + 10
    while any(running(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(running(pid) for pid in workers)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- pieces ------------------------------------------------------------------------------------------------------------------


class Part:
    def __init__(self, *indices: int) -> None:
        self.indices = torch.tensor(indices, dtype=torch.int64)


def test_pieces_go_on_from_the_place_through_all_epochs():
    asked = []

    def parts(epoch: int, start: int) -> list[Part]:
        asked.append((epoch, start))
        return [Part(0, 1, 2, 3, 4), Part(5, 6)][start:]

    found = [(epoch, list(indices)) for epoch, indices in islice(Order(parts, 7, 1, 3), 7)]
    assert found == [(7, [5, 6]), *[(e, i) for e in (8, 9) for i in ([0, 1, 2], [3, 4], [5, 6])]]
    assert asked == [(7, 1), (8, 0), (9, 0)]


def test_a_process_with_nothing_to_read_reads_nothing():
    assert list(Order(lambda epoch, start: [Part()], 0, 0, 3)) == []


@pytest.mark.parametrize("side", [8, 32, 224, 5000])
@pytest.mark.parametrize("workers", [0, 1, 4, 32])
@pytest.mark.parametrize("batch", [1, 64, 4096])
def test_pieces_are_small_and_two_batches_are_read_ahead(side, workers, batch):
    size = piece_size(batch, side, side)
    assert 1 <= size <= batch
    assert size == 1 or size * side * side <= PIECE_PIXELS
    ahead = size * pieces_ahead(batch, size, workers) * max(workers, 1)
    assert ahead >= 2 * batch
    assert ahead <= max(2 * batch + size * (2 * workers + 1), 2 * size * max(workers, 1)) + 2 * size


def test_a_batch_of_many_pieces_is_the_same_batch(files, monkeypatch):
    whole = list(FileSplit(files, np.arange(COUNT) % 3, spec_of()).batches(epoch=1, **HOW))
    monkeypatch.setattr("rscli.data.pieces.PIECE_PIXELS", 2 * 36)
    pieces = FileSplit(files, np.arange(COUNT) % 3, spec_of())
    assert same(whole, list(pieces.batches(epoch=1, **HOW)))
    assert same(whole[2:], list(pieces.batches(epoch=1, start=2, **HOW)))


# --- files inside files ------------------------------------------------------------------------------------------------------


class Contents(list):
    """Files, by their content; one that is None cannot be read."""

    def __getitem__(self, index):
        if (found := super().__getitem__(index)) is None:
            raise OSError(5, "Input/output error", "shard.tar")
        return found


def encoded(files, **change) -> EncodedImages:
    contents = Contents(file.read_bytes() for file in files)
    names = [f"shard.tar: {file.name}" for file in files]
    return EncodedImages(contents, names, np.arange(len(files), dtype=np.int64) % 3, **change)


class Given(Dataset):
    def load(self, split, root, *, download=False):
        return GIVEN[0]


GIVEN: list = [None]


def opened(found, augmentation=CROPS, workers=0):
    GIVEN[0] = found
    return open_split(Given(), spec_of(augmentation), "train", Path(), workers=workers)


def test_encoded_images_are_the_images_of_the_files(files):
    paths, inside = FileSplit(files, np.arange(COUNT) % 3, spec_of()), opened(encoded(files), workers=2)
    assert all(torch.equal(paths.image(i), inside.image(i)) for i in range(COUNT))
    assert same(list(paths.batches(epoch=1, **HOW)), list(inside.batches(epoch=1, **HOW)))
    assert paths.content() == inside.content()
    held = opened(encoded(files, cache=True, note="hello"), Augmentation())
    assert held.note == "hello"
    assert type(held).__name__ == "MemorySplit"
    assert all(torch.equal(paths.image(i), held.image(i)) for i in range(COUNT))


def test_the_fingerprint_of_encoded_images_sees_names_labels_content_and_order(files):
    def fingerprint(found):
        return opened(found).fingerprint()

    original, other = encoded(files), encoded(files)
    assert fingerprint(original) == fingerprint(encoded(files))
    other.names[3] = "shard.tar: other.png"
    third = encoded(files)
    third.encoded[5] += b"\0"
    relabelled = EncodedImages(original.encoded, original.names, original.labels[::-1].copy())
    turned = EncodedImages(Contents(reversed(original.encoded)), original.names, original.labels)
    prints = {fingerprint(each) for each in (original, other, third, relabelled, turned)}
    assert len(prints) == 5


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("bad", "text"), [(None, "Input/output error"), (b"no image", "not an image in a format"), ("x", "str")]
)
def test_an_encoded_image_that_cannot_be_read_is_named(files, bad, text, workers):
    found = encoded(files)
    found.encoded[4] = bad
    with pytest.raises(InputError, match=text) as caught:
        list(opened(found, workers=workers).batches(epoch=0, **HOW))
    assert "shard.tar: 04.png" in caught.value.message


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"names": ["a"]}, "23 images and 1 names"),
        ({"encoded": 3}, "no sequence"),
        ({"labels": np.zeros(2, np.int64)}, "23 images and 2 labels"),
        ({"labels": np.full(COUNT, 3)}, "from 3 to 3"),
    ],
    ids=str,
)
def test_a_broken_promise_of_encoded_images_names_the_data_set(files, change, text):
    from dataclasses import replace

    with pytest.raises(PluginError, match=text):
        opened(replace(encoded(files), **change))


def test_sources_can_be_sent_to_workers(files):
    source = EncodedFiles(encoded(files))
    assert pickle.loads(pickle.dumps(source))[3] == EncodedFile(files[3].read_bytes(), "shard.tar: 03.png")


# --- JPEG files, decoded for training ----------------------------------------------------------------------------------------


def photograph(width: int, height: int) -> Image.Image:
    from sklearn.datasets import load_sample_images

    return Image.fromarray(load_sample_images().images[0]).resize((width, height), Image.Resampling.BICUBIC)


def reference(path: Path, transform: Transform, key: int) -> torch.Tensor:
    """The crop by Pillow alone."""
    whole = transforms.read_image(path, transform.channels)
    return transforms.to_tensor(transforms.random_resized_crop(whole, transform.crop, np.random.default_rng(key)))


def crop(path: Path, transform: Transform, key: int) -> torch.Tensor:
    return load_resized_crop(path, transform, np.random.default_rng(key))


SQUARE = Transform(channels=3, resize=64, crop=(64, 64))
needs_decoder = pytest.mark.skipif(transforms.jpeg_decoder() is None, reason="this torchvision decodes no JPEG files")


@needs_decoder
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_crop_of_a_jpeg_file_is_pillows_but_for_a_grey_level(mode, tmp_path, monkeypatch):
    photograph(160, 120).convert(mode).save(tmp_path / "a.jpg", quality=90)
    decoded = []
    monkeypatch.setattr(transforms, "_quickly", lambda *found, f=transforms._quickly: decoded.append(f(*found)) or decoded[-1])
    differences = [
        (crop(tmp_path / "a.jpg", SQUARE, key).int() - reference(tmp_path / "a.jpg", SQUARE, key).int()).abs()
        for key in range(30)
    ]
    assert len(decoded) == 30
    assert all(pixels is not None for pixels in decoded)
    assert max(int(each.max()) for each in differences) <= 1
    assert float(torch.stack(differences).float().mean()) < 0.02


@needs_decoder
def test_a_jpeg_file_without_torchvisions_decoder_is_read_by_pillow(tmp_path, monkeypatch):
    photograph(160, 120).save(tmp_path / "a.jpg")
    monkeypatch.setattr(transforms, "jpeg_decoder", lambda: None)
    assert torch.equal(crop(tmp_path / "a.jpg", SQUARE, 1), reference(tmp_path / "a.jpg", SQUARE, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_of_a_large_jpeg_file_leaves_out_the_finest_detail(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph(1200, 800).save(tmp_path / "a.jpg", quality=90, exif=exif)
    small = Transform(channels=3, resize=32, crop=(32, 48))
    for key in range(8):
        found, expected = crop(tmp_path / "a.jpg", small, key).float(), reference(tmp_path / "a.jpg", small, key).float()
        assert found.shape == (3, 32, 48)
        assert float((found - expected).abs().mean()) < 1.5
        assert float((found - expected).abs().max()) < 64  # at an edge; another part, or one turned, differs everywhere
        assert float((found - expected.flip(-1)).abs().mean()) > 3


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_small_jpeg_file_that_is_turned_is_read_by_pillow(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph(160, 120).save(tmp_path / "a.jpg", exif=exif)
    assert torch.equal(crop(tmp_path / "a.jpg", SQUARE, 3), reference(tmp_path / "a.jpg", SQUARE, 3))


@pytest.mark.parametrize("kind", ["CMYK", "PNG", "grey wanted"])
def test_other_files_are_read_by_pillow(kind, tmp_path):
    path, transform = tmp_path / "a.jpg", SQUARE
    if kind == "CMYK":
        photograph(160, 120).convert("CMYK").save(path)
    elif kind == "PNG":
        photograph(160, 120).save(path, format="PNG")
    else:
        photograph(160, 120).save(path)
        transform = Transform(channels=1, resize=64, crop=(64, 64))
    assert torch.equal(crop(path, transform, 2), reference(path, transform, 2))


@pytest.mark.parametrize("length", [0, 10, 300, 2000, -2])
def test_half_a_jpeg_file_is_what_it_is_to_pillow(length, tmp_path):
    photograph(160, 120).save(tmp_path / "a.jpg", quality=90)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:length])
    if length == -2:  # without the end marker
        assert crop(tmp_path / "a.jpg", SQUARE, 0).shape == (3, 64, 64)
        return
    with pytest.raises(InputError, match=r"a\.jpg"):
        crop(tmp_path / "a.jpg", SQUARE, 0)


def test_certification_reads_jpeg_files_by_pillow_alone(tmp_path, monkeypatch):
    photograph(160, 120).save(tmp_path / "a.jpg")
    monkeypatch.setattr(transforms, "jpeg_decoder", lambda: pytest.fail("decoded by torchvision"))
    expected = transforms.centre_crop(transforms.resize_shorter(Image.open(tmp_path / "a.jpg"), 64), (64, 64))
    assert torch.equal(load_image(tmp_path / "a.jpg", SQUARE), transforms.to_tensor(expected))
    split = FileSplit([tmp_path / "a.jpg"], np.zeros(1, np.int64), spec_of(CROPS, 64))
    assert torch.equal(split.image(0), next(split.in_order(1))[1][0])


def test_the_content_of_a_file_is_read_like_the_file(tmp_path):
    photograph(160, 120).save(tmp_path / "a.jpg")
    inside = EncodedFile((tmp_path / "a.jpg").read_bytes(), "x")
    assert torch.equal(crop(inside, SQUARE, 1), crop(tmp_path / "a.jpg", SQUARE, 1))
    assert torch.equal(load_image(inside, SQUARE), load_image(tmp_path / "a.jpg", SQUARE))


# --- on a GPU ----------------------------------------------------------------------------------------------------------------


class PretendedStream:
    """A CUDA stream that there is not."""

    def __init__(self, *_: object) -> None:
        self.waited: list[object] = []

    def record_event(self) -> object:
        return object()

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


def test_a_batch_with_its_numbers_is_read_ahead_on_cuda(monkeypatch):
    """Without a GPU: only what the host does. A batch holds whole numbers besides its tensors."""
    main = PretendedStream()
    monkeypatch.setattr(torch.cuda, "Stream", PretendedStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    batches = [Batch(torch.zeros(2, 1, 1, 1), torch.zeros(2), torch.arange(2), number, 0, 0, 2) for number in range(3)]
    begun = []

    def reading():
        for batch in batches:
            begun.append(batch.number)
            yield batch

    ahead = [(batch.number, len(begun)) for batch in one_ahead(reading(), torch.device("cuda", 0))]
    assert ahead == [(0, 2), (1, 3), (2, 3)]
    assert len(main.waited) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augmentation", [CROPS, Augmentation(padding=2, flip=True, erase=0.5)], ids=str)
def test_batches_are_the_same_on_a_gpu_epoch_after_epoch(files, workers, augmentation):
    here, there = (FileSplit(files, np.arange(COUNT) % 3, spec_of(augmentation), workers=workers) for _ in range(2))
    for epoch in (0, 1):
        on_gpu = []
        for batch in there.batches(epoch=epoch, **{**HOW, "device": "cuda"}):
            torch.cuda._sleep(10_000_000)  # the device is behind while the next batch is copied
            on_gpu.append([each.cpu() for each in batch])
        assert same(list(here.batches(epoch=epoch, **HOW)), on_gpu)
    there.close()
