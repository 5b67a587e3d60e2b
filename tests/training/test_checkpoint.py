"""Checkpoints that are damaged or edited, and data that is not what a run was trained on: nothing of it trains on."""

from __future__ import annotations

import copy
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rscli.config.layers import resolve
from rscli.errors import InputError, Stopped
from rscli.runtime.progress import Silent
from rscli.training.checkpoint import check_optimizer, digest, settings_of
from rscli.training.run_folder import RunFolder
from rscli.training.train import TrainOptions, train
from runs import Interrupting, Listening

State = dict[str, Any]
DATA = {"images": 4, "class_names": ["cat", "dog"], "fingerprint": "f" * 64, "content": "c" * 64}


def a_state() -> State:
    """As a run saves it, of a small network after two steps."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(2):
        network(torch.rand(3, 1, 4, 4)).square().sum().backward()
        optimizer.step()
    meter = {"sums": {"loss": 1.5, "accuracy": 0.25}, "images": 3}
    return {
        "epoch": 1, "batch": 2, "data": DATA,
        "model": network.state_dict(), "optimizer": optimizer.state_dict(), "meter": meter,
    }  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in nested dictionaries and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def at(state: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        state = state[key]
    return state


def changed(state: State, path: tuple[Any, ...], value: Any) -> State:
    new = copy.deepcopy(state)
    at(new, path[:-1])[path[-1]] = value
    return new


def without(state: State, path: tuple[Any, ...]) -> State:
    new = copy.deepcopy(state)
    del at(new, path[:-1])[path[-1]]
    return new


def flipped(tensor: torch.Tensor, source: random.Random) -> torch.Tensor:
    """`tensor` with one bit of one value turned."""
    content = np.frombuffer(tensor.contiguous().numpy().tobytes(), np.uint8).copy()
    bit = source.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    return torch.frombuffer(content, dtype=tensor.dtype).reshape(tensor.shape)


def others(value: Any) -> list[Any]:
    """Values that are nearly `value`."""
    if isinstance(value, torch.Tensor):
        shapes = [value.reshape(-1), value[None]]
        return [value.double(), *(new for new in shapes if new.shape != value.shape), value.tolist()]
    if isinstance(value, bool):
        return [not value, int(value)]
    if isinstance(value, int):
        return [value + 1, -value - 1, float(value), str(value)]
    if isinstance(value, float):
        return [math.nextafter(value, 9), -value if value else 1e-300, math.nan, str(value)]
    if isinstance(value, str):
        return [f"{value}x", value[1:], ""]
    return [0] if value is None else []


def mutations() -> list[tuple[str, State]]:
    """Everything that can be edited in a checkpoint, once or several times; and 60 bits in its tensors."""
    from rscli.training.checkpoint import seal

    state, source = seal(a_state()), random.Random(0)
    found = []
    tensors = [path for path in places(state) if isinstance(at(state, path), torch.Tensor)]
    for number in range(60):
        path = source.choice(tensors)
        found.append((f"bit {number} of {path}", changed(state, path, flipped(at(state, path), source))))
    for path in places(state):
        found.append((f"no {path}", without(state, path)))
        found += [(f"{path} = {new!r:.40}", changed(state, path, new)) for new in others(at(state, path))]
        if isinstance(at(state, path), dict):
            found.append((f"more in {path}", changed(state, (*path, "more"), 1)))
    found += [("more", {**state, "more": 1}), ("format 1", {**state, "format": 1}), ("reversed", dict(reversed(state.items())))]
    a, b = tensors[2:4]  # running mean and variance: of one shape
    found.append(("two tensors exchanged", changed(changed(state, a, at(state, b)), b, at(state, a))))
    return found


def refusal(folder: RunFolder) -> InputError | None:
    """What is said of the checkpoint, if it is refused."""
    try:
        folder.load()
    except InputError as error:
        return error
    return None


def test_whatever_is_edited_in_a_checkpoint_it_is_refused_in_one_line(tmp_path):
    cases = mutations()
    assert len(cases) >= 200
    folder = RunFolder(tmp_path)
    for name, state in cases:
        torch.save(state, folder.checkpoint)
        before = folder.checkpoint.read_bytes()
        error = refusal(folder)
        assert error is not None, f"{name} went through"
        assert "\n" not in error.message, name
        assert str(folder.checkpoint) in error.message
        assert "--resume" in (error.hint or "")
        assert folder.checkpoint.read_bytes() == before


def test_a_file_that_was_damaged_or_cut_off_is_refused_or_says_the_same(tmp_path):
    """Of the bits of a file some say nothing (padding between tensors): with those, all that is read is as it was."""
    folder, source = RunFolder(tmp_path), random.Random(1)
    folder.save(a_state())
    whole, wanted, refused = folder.checkpoint.read_bytes(), digest(folder.load()), 0
    cuts = [whole[: source.randrange(len(whole))] for _ in range(60)]
    flips = []
    for _ in range(240):
        content, bit = bytearray(whole), source.randrange(8 * len(whole))
        content[bit // 8] ^= 1 << bit % 8
        flips.append(bytes(content))
    for content in cuts + flips:
        folder.checkpoint.write_bytes(content)
        error = refusal(folder)
        if error is None:
            assert digest(folder.load()) == wanted
        else:
            refused += 1
            assert "\n" not in error.message
    assert refused >= 60 + 20


def test_a_checkpoint_comes_back_as_it_was_saved_and_its_digest_sees_types_and_order(tmp_path):
    folder = RunFolder(tmp_path)
    folder.save(a_state())
    loaded = folder.load()
    assert digest({key: loaded[key] for key in a_state()}) == digest(a_state())
    alike = [
        1,
        1.0,
        True,
        "1",
        None,
        [1],
        (1,),
        {1: 1},
        {"1": 1},
        torch.ones(()),
        torch.ones(1),
        torch.ones((), dtype=torch.int64),
    ]
    assert len({digest(value) for value in alike}) == len(alike)
    assert digest({"a": 1, "b": 2}) != digest({"b": 2, "a": 1})
    assert digest(torch.zeros(2)) != digest(-torch.zeros(2))
    assert digest(torch.arange(12.0).reshape(1, 3, 2, 2)) == digest(
        torch.arange(12.0).reshape(1, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    )
    for dtype in (torch.bfloat16, torch.float16, torch.bool, torch.uint8):
        assert digest(torch.ones(3, dtype=dtype)) != digest(torch.zeros(3, dtype=dtype))
    with pytest.raises(TypeError, match="holds a set"):
        digest({1})


def test_the_state_of_an_optimizer_that_counts_in_a_scalar_fits():
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    wanted = settings_of(optimizer)
    check_optimizer(optimizer, wanted)
    optimizer.state[layer.weight]["exp_avg"] = torch.ones(())
    with pytest.raises(ValueError, match="exp_avg"):
        check_optimizer(optimizer, wanted)


# --- other data --------------------------------------------------------------------------------------------------------------


def pets(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), images: int = 6) -> None:
    """Folders of images, all files of one size: their names and sizes tell nothing."""
    source = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for number in range(images):
                pixels = source.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.bmp")


def run(folder: Path, cache: str, progress: Silent, **changes: Any) -> Path:
    sets = ["data.name=imagefolder", f"data.path={folder / 'pets'}", "data.size=16", f"data.cache={cache}", "arch.name=lenet"]
    resolved = resolve(sets=[*sets, "noise.sigma=0.25", "loss.name=gaussian", "optimizer.lr=0.01", "epochs=2", "batch=5"])
    return train(resolved, TrainOptions(folder / "run", folder, device="cpu", workers=0, **changes), progress)


def rename(folder: Path, old: str, new: str) -> None:
    for split in ("train", "test"):
        (folder / split / old).rename(folder / split / new)


def swap(folder: Path) -> None:
    for old, new in (("cat", "x"), ("dog", "cat"), ("x", "dog")):
        rename(folder, old, new)


def repaint(folder: Path) -> None:
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "train/dog/3.bmp")


def move_one(folder: Path) -> None:
    (folder / "train/cat/5.bmp").rename(folder / "train/dog/6.bmp")


def add_class(folder: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(folder / split / "cat", folder / split / "emu")


CHANGES = {
    "images added": (lambda f: shutil.copy(f / "train/cat/0.bmp", f / "train/cat/9.bmp"), "it was 12 images, now it is 13"),
    "an image removed": (lambda f: (f / "train/dog/0.bmp").unlink(), "it was 12 images, now it is 11"),
    "classes swapped": (swap, "the images or their labels are no longer the same"),
    "a class renamed": (lambda f: rename(f, "cat", "ape"), "'cat' is now 'ape'"),
    "a class renamed behind": (lambda f: rename(f, "cat", "zebra"), "'cat' is now 'dog'; 'dog' is now 'zebra'"),
    "a class added": (add_class, "it was 12 images, now it is 18; it was 2 classes, now it is 3"),
    "pixels replaced": (repaint, "the images or their labels are no longer the same"),
    "an image in another class": (move_one, "the images or their labels are no longer the same"),
    "a file renamed": (
        lambda f: (f / "train/dog/0.bmp").rename(f / "train/dog/00.bmp"),
        "the images or their labels are no longer the same",
    ),
}


@pytest.fixture(scope="module", params=["memory", "files"])
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp(request.param)
    pets(folder / "pets")
    with pytest.raises(Stopped):
        run(folder, request.param, Interrupting(1))
    return folder, request.param


@pytest.mark.parametrize("case", CHANGES)
def test_a_run_does_not_go_on_with_other_data(stopped, tmp_path, case):
    source, cache = stopped
    change, said = CHANGES[case]
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    set_path(tmp_path, source)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    change(tmp_path / "pets")
    with pytest.raises(InputError) as caught:
        run(tmp_path, cache, Silent(), resume=True)
    assert said in caught.value.message
    assert "the training data differs from what" in caught.value.message
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_run_goes_on_where_its_data_has_moved(stopped, tmp_path):
    source, cache = stopped
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    set_path(tmp_path, source)
    assert run(tmp_path, cache, Silent(), resume=True).exists()


def set_path(folder: Path, source: Path) -> None:
    """The configuration of the copied run names the copied data."""
    config = folder / "run/config.json"
    config.write_text(config.read_text().replace(str(source / "pets"), str(folder / "pets")))


# --- what older versions wrote -----------------------------------------------------------------------------------------------


def test_a_checkpoint_of_format_1_is_read_with_a_note(stopped, tmp_path):
    source, cache = stopped
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    set_path(tmp_path, source)
    path = tmp_path / "run/checkpoint.pt"
    state = torch.load(path, weights_only=True)
    older = ("epoch", "batch", "model", "optimizer", "meter")
    torch.save({"format": 1, **{key: state[key] for key in older}}, path)
    heard = Listening()
    model = run(tmp_path, cache, heard, resume=True)
    assert model.exists()
    assert any("of an older version" in text for text in heard.notes)
