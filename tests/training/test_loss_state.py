"""What a loss keeps: written once, again when it changed, and read back to the bit or refused in words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rscli import registry
from rscli.api import Loss, TrainContext, TrainStep
from rscli.config.layers import resolve
from rscli.errors import InputError, RscliError
from rscli.registry import Entry, installed
from rscli.runtime.progress import Silent
from rscli.training import loss_state
from rscli.training.checkpoint import digest
from rscli.training.run_folder import RunFolder
from rscli.training.train import TrainOptions, train

LABELS = 40_000


def a_state(loss: Mapping[str, Tensor], epoch: int = 1) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "batch": 0,
        "model": {"w": torch.ones(2)},
        "optimizer": {"state": {}, "param_groups": []},
        "meter": {"sums": {"loss": 1.0}, "images": 3},
        "loss": dict(loss),
    }


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("loss-*"))


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes were written to the file, at each time."""
    found: list[int] = []
    whole = loss_state.save

    def counted(tensors: Mapping[str, Tensor]) -> bytes:
        content = whole(dict(tensors))
        found.append(len(content))
        return content

    monkeypatch.setattr(loss_state, "save", counted)
    return found


# --- written once ------------------------------------------------------------------------------------------------------------


def test_it_is_written_once_and_again_when_a_tensor_changed(tmp_path, writes):
    folder, soft = RunFolder(tmp_path), torch.rand(LABELS)
    for epoch in range(5):
        folder.save(a_state({"soft": soft}, epoch))
    assert len(writes) == 1
    assert writes[0] > 4 * LABELS
    assert folder.checkpoint.stat().st_size < 10_000
    (first,) = files(tmp_path)
    soft[7] = 2.0
    folder.save(a_state({"soft": soft}))
    assert len(writes) == 2
    (second,) = files(tmp_path)
    assert first != second
    assert RunFolder(tmp_path).load()["loss"]["soft"][7] == 2.0
    folder.save(a_state({"soft": soft.clone()}))  # another tensor of the same content is the same file
    assert len(writes) == 2
    folder.save(a_state({"soft": soft, "more": soft}))
    assert len(writes) == 3
    assert torch.equal(RunFolder(tmp_path).load()["loss"]["more"], soft)


def test_a_run_that_goes_on_does_not_write_it_again(tmp_path, writes):
    RunFolder(tmp_path).save(a_state({"soft": torch.rand(LABELS)}))
    later = RunFolder(tmp_path)
    state = later.load()
    later.save(state)
    assert len(writes) == 1
    state["loss"]["soft"].mul_(2)  # the file must not change under the checkpoint that names it
    assert digest(RunFolder(tmp_path).load()) != digest(state)
    later.save(state)
    assert len(writes) == 2
    assert torch.equal(RunFolder(tmp_path).load()["loss"]["soft"], state["loss"]["soft"])


def test_a_loss_that_keeps_nothing_has_no_file(tmp_path):
    folder = RunFolder(tmp_path)
    folder.save(a_state({}))
    assert files(tmp_path) == []
    assert folder.load().get("loss", {}) == {}


def test_tensors_of_every_kind_come_back_as_they_were(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    kept = {
        "half": torch.rand(5).to(torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "count": torch.tensor(3),
        "none": torch.zeros(0, 4),
        "across": base.t(),
        "row": base[1],
        "again": base,
    }
    with torch.inference_mode():
        kept["inference"] = torch.rand(3)
    folder = RunFolder(tmp_path)
    for _ in range(2):
        folder.save(a_state(kept))
    found = RunFolder(tmp_path).load()["loss"]
    assert found.keys() == kept.keys()
    for name, tensor in kept.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


def test_a_tensor_that_counts_no_changes_is_looked_at(tmp_path):
    with torch.inference_mode():
        seen = torch.zeros(3)
    folder = RunFolder(tmp_path)
    folder.save(a_state({"seen": seen}))
    with torch.inference_mode():
        seen[0] = 1
    folder.save(a_state({"seen": seen}))
    assert RunFolder(tmp_path).load()["loss"]["seen"].tolist() == [1, 0, 0]


# --- cut off -----------------------------------------------------------------------------------------------------------------


def test_a_run_cut_off_between_the_two_files_goes_on_from_the_checkpoint_before(tmp_path, monkeypatch):
    folder, soft = RunFolder(tmp_path), torch.zeros(10)
    folder.save(a_state({"soft": soft}))
    soft += 1
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *_: os.kill(os.getpid(), 0) or (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            folder.save(a_state({"soft": soft}, 2))
    assert len(files(tmp_path)) == 2
    later = RunFolder(tmp_path)
    state = later.load()
    assert (state["epoch"], state["loss"]["soft"].tolist()) == (1, [0.0] * 10)
    later.save({**state, "epoch": 2})
    assert len(files(tmp_path)) == 1


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    folder, soft = RunFolder(tmp_path), torch.zeros(10)
    folder.save(a_state({"soft": soft}))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        soft += 1
        with pytest.raises(RscliError, match="No space left"):
            folder.save(a_state({"soft": soft}))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    folder.save(a_state({"soft": soft}))
    assert RunFolder(tmp_path).load()["loss"]["soft"].sum() == 10


# --- refused -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["gone", "cut", "bit", "empty", "folder", "another"])
def test_a_file_that_is_not_what_was_written_is_refused_in_one_line(tmp_path, what):
    folder = RunFolder(tmp_path)
    folder.save(a_state({"soft": torch.rand(100)}))
    (path,) = tmp_path.glob("loss-*")
    content = bytearray(path.read_bytes())
    path.unlink()
    if what == "cut":
        path.write_bytes(content[:-40])
    elif what == "bit":
        content[-3] ^= 1
        path.write_bytes(content)
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "folder":
        path.mkdir()
    elif what == "another":
        RunFolder(tmp_path / "b").save(a_state({"soft": torch.rand(100)}))
        next((tmp_path / "b").glob("loss-*")).rename(path)
    with pytest.raises(InputError) as caught:
        RunFolder(tmp_path).load()
    assert "\n" not in caught.value.message
    assert str(path) in caught.value.message
    if what != "folder":
        assert "--resume" in (caught.value.hint or "")


def test_a_checkpoint_that_holds_it_inside_is_still_read(tmp_path):
    """As format 2 did."""
    folder, kept = RunFolder(tmp_path), {"soft": torch.rand(10), "seen": torch.tensor([1, 2])}
    older = {"format": 2, **a_state(kept)}
    torch.save({**older, "digest": digest(older)}, folder.checkpoint)
    state = folder.load()
    assert all(torch.equal(state["loss"][name], tensor) for name, tensor in kept.items())
    folder.save({key: value for key, value in state.items() if key != "format"})
    assert len(files(tmp_path)) == 1
    assert all(torch.equal(RunFolder(tmp_path).load()["loss"][name], tensor) for name, tensor in kept.items())


# --- whole runs --------------------------------------------------------------------------------------------------------------


class Soft(Loss):
    """Keeps what it never changes."""

    def setup(self, context: TrainContext) -> Mapping[str, Tensor]:
        return {"soft": torch.rand(context.images, 300, generator=context.generator)}

    def step(self, step: TrainStep) -> dict[str, Tensor]:
        return {"ce": torch.nn.functional.cross_entropy(step.noisy_logits[0], step.labels) + 0 * step.state["soft"][0, 0]}


@pytest.fixture
def _soft() -> Iterator[None]:
    entry = Entry("losses", "soft", "tests", "1.0", "tests:Soft")
    registry.announce(entry, Soft)
    yield
    registry._announced.pop(entry)
    registry.load_entry.cache_clear()
    installed.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("_soft")
def test_a_run_writes_it_once_and_another_process_goes_on(tmp_path, writes):
    sets = ["data.name=digits", "arch.name=lenet", "noise.sigma=0.25", "loss.name=soft", "optimizer.lr=0.05", "batch=720"]
    resolved = resolve(sets=[*sets, "epochs=3", "callbacks.checkpoint.every=1"])

    def go(folder: Path, resume: bool = False) -> Path:
        return train(resolved, TrainOptions(folder, folder, device="cpu", workers=0, resume=resume), Silent())

    whole = go(tmp_path / "a")
    assert len(writes) == 1
    assert (tmp_path / "a/checkpoint.pt").stat().st_size < writes[0] + 4_000_000  # the weights, and their momentum
    state = RunFolder(tmp_path / "a").load()
    (name,) = files(tmp_path / "a")

    class Killed(BaseException):
        pass

    def cut(self: RunFolder, state: dict[str, Any]) -> None:
        saved(self, state)
        raise Killed

    saved = RunFolder.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save", cut)
        with pytest.raises(Killed):
            go(tmp_path / "b")
    assert RunFolder(tmp_path / "b").load()["epoch"] < 3
    assert go(tmp_path / "b", resume=True).read_bytes() == whole.read_bytes()
    assert (len(writes), files(tmp_path / "b")) == (2, [name])
    assert torch.equal(RunFolder(tmp_path / "b").load()["loss"]["soft"], state["loss"]["soft"])

    next((tmp_path / "b").glob("loss-*")).unlink()
    with pytest.raises(InputError, match="is gone, and the checkpoint"):
        go(tmp_path / "b", resume=True)
