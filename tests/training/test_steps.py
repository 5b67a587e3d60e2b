"""Optimiser steps through the whole engine: micro-batches, clipping, what is logged, and the same on several processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

import together
from rscli.config.layers import Resolved, resolve
from rscli.data.splits import Batch
from rscli.runtime.progress import Silent
from rscli.training.objective import Objective
from rscli.training.processes import Processes
from rscli.training.train import train
from rscli.training.trainer import _micro_batches, initial_classifier
from runs import train_options as options

PGD = ["attack.name=pgd", "attack.epsilon=0.5", "attack.steps=2", "attack.warmup=0"]


@pytest.fixture(autouse=True)
def _plugins() -> Iterator[None]:
    together.announce()
    yield
    together.forget()


def settings(*sets: str) -> Resolved:
    return resolve(sets=[*together.BASE, *sets])


def weights(folder: Path, *sets: str, **how: bool) -> dict[str, Tensor]:
    train(settings(*sets), options(folder, **how), Silent())
    return load_file(folder / "model.safetensors")


def lines(folder: Path) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "images_per_s")} for line in read]


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 2e-6) -> bool:
    return one.keys() == other.keys() and all(one[k].double().allclose(other[k].double(), atol=tolerance) for k in one)


# --- micro-batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [[], PGD, ["clip_norm=0.1"], ["loss.name=consistency", "loss.lbd=5"]], ids=lambda m: str(m[:1])
)
def test_micro_batches_give_the_same_weights(tmp_path, more):
    sets = ["limit=50", "batch=21", "epochs=2", "loss.m=4", "chunk=false", *more]
    whole = weights(tmp_path / "whole", *sets)
    for most in (1, 9, 40, 1000):  # below m, which it rounds up to; not a multiple; a multiple; all
        assert close(weights(tmp_path / f"{most}", *sets, f"micro_batch={most}"), whole), most
        ours, theirs = lines(tmp_path / f"{most}"), lines(tmp_path / "whole")
        assert [line.keys() for line in ours] == [line.keys() for line in theirs]
        assert all(
            line[key] == pytest.approx(other[key], rel=1e-4) for line, other in zip(ours, theirs, strict=True) for key in line
        )


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("most", [1, 4, 5, 12, 1000, None])
def test_micro_batches_are_as_many_in_every_process(world, most):
    """None is empty or larger than allowed; but two images where only some processes have one more than others."""
    for size in range(world, 25):
        counts = []
        for rank in range(world):
            first, end = rank * size // world, (rank + 1) * size // world
            place = torch.arange(first, end)
            parts = _micro_batches(Batch(place, place, place, 0, 0, first, size), most, 4, world)
            assert torch.cat([part.indices for part in parts]).equal(place)
            assert all(part.first == part.indices[0] for part in parts)
            allowed = size if most is None else max(1, most // 4)
            assert max(len(part.indices) for part in parts) <= max(allowed, 2 if size % world and world > 1 else 1)
            counts.append(len(parts))
        assert len(set(counts)) == 1


# --- clipping ----------------------------------------------------------------------------------------------------------------


def test_clipping_is_that_of_torch(tmp_path):
    """One step of plain descent from the initial weights: its length tells the gradient, and torch's function clips that."""
    sets = ["limit=20", "batch=20", "optimizer.momentum=0", "optimizer.weight_decay=0"]
    start = {name: each.detach() for name, each in _start(sets, tmp_path).items()}
    free = weights(tmp_path / "free", *sets)
    gradients = {name: (start[name] - free[name]) / 0.1 for name in free}
    norm = torch.cat([each.flatten() for each in gradients.values()]).double().norm().item()
    assert "grad_norm" not in lines(tmp_path / "free")[0]
    for most in (norm / 3, norm * 3):
        clipped = weights(tmp_path / f"{most}", *sets, f"clip_norm={most}")
        parameters = [torch.nn.Parameter(each.clone()) for each in start.values()]
        for parameter, name in zip(parameters, start, strict=True):
            parameter.grad = gradients[name].clone()
        torch.nn.utils.clip_grad_norm_(parameters, most)
        for parameter, name in zip(parameters, start, strict=True):
            assert torch.allclose(clipped[name], start[name] - 0.1 * parameter.grad, atol=1e-6)
        assert lines(tmp_path / f"{most}")[0]["grad_norm"] == pytest.approx(norm, rel=1e-3)


def _start(sets: list[str], folder: Path) -> dict[str, Tensor]:
    resolved = settings(*sets)
    return dict(initial_classifier(resolved, resolved.dataset.spec(folder)).network.named_parameters())


# --- what is logged ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["micro_batch=6"], PGD], ids=["whole", "micro", "attack"])
def test_the_log_has_the_means_over_images(tmp_path, monkeypatch, more):
    """With a short last batch, chunks of unequal size and micro-batches: every image counts the same."""
    seen: list[tuple[Tensor, Tensor]] = []
    forward = Objective.forward

    def listening(self, loss, step):
        terms = forward(self, loss, step)
        logits, labels = step.noisy_logits.detach(), step.labels
        each = torch.stack([functional.cross_entropy(copy, labels, reduction="none") for copy in logits]).mean(0)
        seen.append((each, (logits.argmax(-1) == labels).double().mean(0)))
        return terms

    monkeypatch.setattr(Objective, "forward", listening)
    weights(tmp_path / "run", "limit=65", "batch=31", "loss.m=2", *more)
    losses, hits = (torch.cat(each).double() for each in zip(*seen, strict=True))
    assert len(losses) == 65
    assert len({len(each) for each, _ in seen}) > 1
    (line,) = lines(tmp_path / "run")
    assert line["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert line["ce"] == line["loss"]
    assert line["accuracy"] == pytest.approx(hits.mean().item(), rel=1e-5)


# --- several processes -------------------------------------------------------------------------------------------------------

UNEVEN = ["limit=61", "batch=20", "loss.m=2", "epochs=2"]
"""Chunks of ten images, and one of a single image, which is fewer than there are processes."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["clip_norm=0.1", "micro_batch=7"],
        [*PGD, "arch.norm=true"],
        ["loss.name=counting", "loss.m=1"],
        ['freeze=["0"]', "arch.norm=true", "loss.name=consistency", "loss.lbd=5"],
    ],
    ids=["plain", "clip", "attack", "state", "frozen"],
)
def test_two_processes_log_and_learn_what_one_does(tmp_path, more):
    sets = [*UNEVEN, *more]
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    assert together.run(sets, tmp_path / "one/run") == [0]
    assert together.run(sets, tmp_path / "two/run", 2) == [0, 0]
    ours = torch.load(tmp_path / "one/state-0.pt", weights_only=True)
    theirs = [torch.load(tmp_path / f"two/state-{rank}.pt", weights_only=True) for rank in range(2)]
    assert close(theirs[0], ours, 2e-5)
    assert all(torch.equal(theirs[0][name], theirs[1][name]) for name in ours)
    for line, other in zip(lines(tmp_path / "one/run"), lines(tmp_path / "two/run"), strict=True):
        assert line == pytest.approx(other, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_shared_statistics_with_micro_batches_and_dropout(tmp_path, world):
    """Processes with more images than others have as many forwards, or they would wait for ever; all end with the same."""
    sets = [*UNEVEN, "chunk=false", "limit=58", "batch=19", "arch.norm=true", "arch.dropout=0.5", "micro_batch=7"]
    assert together.run(sets, tmp_path / "run", world) == [0] * world
    states = [torch.load(tmp_path / f"state-{rank}.pt", weights_only=True) for rank in range(world)]
    assert all(torch.equal(states[0][name], each[name]) for each in states for name in states[0])


@pytest.mark.slow
def test_statistics_of_its_own_follow_the_first_process(tmp_path):
    """Without sharing, what is saved is what the first process saw: other statistics than those of all images."""
    sets = ["limit=40", "batch=40", "arch.norm=true", "epochs=1"]
    for name, more in (("shared", []), ("own", ["sync_batch_norm=false"])):
        (tmp_path / name).mkdir()
        assert together.run([*sets, *more], tmp_path / name / "run", 2) == [0, 0]
    states = {
        (name, rank): torch.load(tmp_path / f"{name}/state-{rank}.pt", weights_only=True)
        for name in ("shared", "own")
        for rank in (0, 1)
    }
    (mean,) = (name for name in states["own", 0] if name.endswith("running_mean"))
    assert torch.equal(states["shared", 0][mean], states["shared", 1][mean])
    assert not torch.equal(states["own", 0][mean], states["own", 1][mean])
    both = (states["own", 0][mean] + states["own", 1][mean]) / 2  # one step, halves of the same size
    assert torch.allclose(both, states["shared", 0][mean], atol=1e-6)
    saved = load_file(tmp_path / "own/run/model.safetensors")
    assert torch.equal(saved[mean.removeprefix("network.")], states["own", 0][mean])


@pytest.mark.slow
def test_a_loss_whose_state_differs_between_processes_is_refused(tmp_path):
    codes = together.run([*UNEVEN, "loss.name=counting", "loss.honest=false", "loss.m=1"], tmp_path / "run", 2)
    assert codes == [2, 2]
    said = "".join(path.read_text() for path in tmp_path.glob("said-*.txt"))
    assert "the loss counting of tests 1.0 breaks its contract: step changed its state otherwise in one process" in said


@pytest.mark.slow
def test_a_parameter_that_takes_no_part(tmp_path):
    """Alone it is left as it is; two processes say what to do, and then do the same."""
    alone = weights(tmp_path / "alone", *UNEVEN, "arch.idle=true")
    codes = together.run([*UNEVEN, "arch.idle=true"], tmp_path / "two", 2)
    assert codes == [2, 2]
    (said,) = (path.read_text() for path in tmp_path.glob("said-*.txt"))
    assert said.startswith("2 processes cannot train network.0.idle.weight, network.0.idle.bias: no gradient reaches")
    freeze = 'freeze=["network.0.idle.weight", "network.0.idle.bias"]'
    assert f"--set '{freeze}'" in said
    assert together.run([*UNEVEN, "arch.idle=true", freeze], tmp_path / "frozen", 2) == [0, 0]
    assert close(load_file(tmp_path / "frozen/model.safetensors"), alone, 2e-5)


def test_a_process_alone_gathers_its_own():
    rows = torch.rand(3, 2)
    assert Processes().rows(rows, first=0, size=3) is rows


# --- compiled ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_compiled_network_learns_nearly_the_same(tmp_path, world):
    """Also with statistics that two processes share: torch.compile heeds the mode that shares them."""
    pytest.importorskip("torch._inductor")
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:
        pytest.skip("no compiler")
    sets = ["limit=41", "batch=20", "arch.norm=true", "chunk=false"]
    plain = weights(tmp_path / "plain", *sets)
    assert together.run(sets, tmp_path / "compiled", world, 590, compile=True) == [0] * world
    assert close(load_file(tmp_path / "compiled/model.safetensors"), plain, 1e-4)
