"""The average of the weights: timm's and torch's own, what the two model files hold, and a run that is resumed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rscli.config.layers import resolve
from rscli.errors import InputError, Stopped
from rscli.models.modelfile import load_model
from rscli.runtime.progress import Silent
from rscli.training.train import TrainOptions, train
from rscli_core.callbacks.ema import Ema

SETS = ["data.name=digits", "arch.name=lenet", "noise.sigma=0.25", "loss.name=gaussian", "optimizer.lr=0.02"]
SETS += ["epochs=2", "batch=480"]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))


def walk(model: nn.Module, k: int) -> None:
    """Moves every weight and statistic, as step k of training does."""
    random = torch.Generator().manual_seed(k)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=random))
            else:
                value.add_(1)


def averaged(ema: Ema, steps: int, *, resumed_at: int | None = None) -> dict[str, Tensor]:
    model, state = small(), {}
    run = SimpleNamespace(model=model)
    ema.begin(run, state)
    for k in range(steps):
        walk(model, k)
        ema.after_step(run, state)
        if k == resumed_at:
            state = {"steps": state["steps"], "average": {name: value.clone() for name, value in state["average"].items()}}
            ema.begin(run, state)
    return state["average"]


@pytest.mark.parametrize("decay", [0.5, 0.99])
@pytest.mark.parametrize("warmup", [True, False])
def test_it_is_timm_s_average(decay, warmup):
    model = small()
    theirs = ModelEmaV3(model, decay=decay, use_warmup=warmup)
    for k in range(12):
        walk(model, k)
        theirs.update(model, step=k + 1)
    ours = averaged(Ema(decay=decay, warmup=warmup), 12)
    for name, value in theirs.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


def test_without_the_warm_up_it_is_torch_s_average():
    model = small()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for k in range(12):
        walk(model, k)
        theirs.update_parameters(model)
    ours = averaged(Ema(decay=0.9, warmup=False), 12)
    for name, value in theirs.module.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(ours[name], value)
    assert ours["1.num_batches_tracked"] == 12  # a counter is that of the last step


def test_power_1_is_the_plain_mean():
    model, seen = small(), []
    for k in range(9):
        walk(model, k)
        seen.append(model[0].weight.detach().double().clone())
    ours = averaged(Ema(decay=1 - 1e-9, power=1), 9)["0.weight"]
    torch.testing.assert_close(ours.double(), torch.stack(seen).mean(0), rtol=1e-5, atol=1e-6)


def test_the_decay_grows_until_it_is_reached():
    ema = Ema(decay=0.9, power=2 / 3)
    assert [ema.decay_at(k) for k in (1, 8, 27, 32, 1000)] == pytest.approx([0, 0.75, 1 - 1 / 9, 0.9, 0.9])
    assert Ema(decay=0.9, warmup=False).decay_at(2) == 0.9


@pytest.mark.parametrize("at", [0, 5])
def test_it_goes_on_as_if_nothing_had_happened(at):
    whole, resumed = averaged(Ema(decay=0.95), 9), averaged(Ema(decay=0.95), 9, resumed_at=at)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_model_is_left_as_it_was_until_the_end():
    model, twin, state = small(), small(), {}
    run = SimpleNamespace(model=model)
    ema = Ema(decay=0.5)
    ema.begin(run, state)
    for k in range(3):
        walk(model, k)
        walk(twin, k)
        ema.after_step(run, state)
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))


# --- runs ---------------------------------------------------------------------------------------------------------------------


class Interrupting(Silent):
    """Asks the run to stop after so many batches."""

    def __init__(self, after: int) -> None:
        self.left = after

    def update(self, done: int, figures: dict[str, str]) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def run(folder: Path, *sets: str, progress: Silent | None = None, resume: bool = False) -> Path:
    options = TrainOptions(out=folder, data_dir=folder.parent, device="cpu", workers=0, resume=resume)
    return train(resolve(sets=[*SETS, *sets]), options, progress or Silent())


def weights(path: Path) -> dict[str, Tensor]:
    return load_model(path).network.state_dict()


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """The same run without an average, with it, with the last weights chosen, and stopped in mid-epoch and resumed."""
    folder = tmp_path_factory.mktemp("ema")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run(folder / "plain")
    run(folder / "average", "callbacks.ema.decay=0.9")
    run(folder / "last", "callbacks.ema.decay=0.9", "callbacks.ema.use=last")
    with pytest.raises(Stopped):
        run(folder / "resumed", "callbacks.ema.decay=0.9", progress=Interrupting(4))
    run(folder / "resumed", "callbacks.ema.decay=0.9", resume=True)
    torch.set_num_threads(before)
    return folder


def test_the_model_file_holds_the_average_and_the_last_weights_are_beside_it(folders):
    kept = torch.load(folders / "average/checkpoint.pt", weights_only=True)
    average = kept["callbacks"]["ema"]["average"]
    assert equal(weights(folders / "average/model.safetensors"), average)
    assert equal(weights(folders / "average/model-last.safetensors"), weights(folders / "plain/model.safetensors"))
    assert not equal(weights(folders / "average/model.safetensors"), weights(folders / "plain/model.safetensors"))


def test_which_of_them_the_model_file_holds_is_chosen(folders):
    assert equal(weights(folders / "last/model.safetensors"), weights(folders / "plain/model.safetensors"))
    assert equal(weights(folders / "last/model-average.safetensors"), weights(folders / "average/model.safetensors"))
    assert not (folders / "last/model-last.safetensors").exists()


def test_a_resumed_run_gives_the_same_two_files(folders):
    for name in ("model.safetensors", "model-last.safetensors"):
        assert (folders / "resumed" / name).read_bytes() == (folders / "average" / name).read_bytes()


def test_both_are_model_files_that_differ_in_their_weights_alone(folders):
    cards = [load_model(folders / "average" / name).source.card for name in ("model.safetensors", "model-last.safetensors")]
    assert cards[0].model_copy(update={"sha256": ""}) == cards[1].model_copy(update={"sha256": ""})
    assert cards[0].sha256 != cards[1].sha256
    assert cards[0].config["callbacks"]["ema"]["decay"] == 0.9


def test_another_average_is_another_run(folders):
    with pytest.raises(InputError, match=r"callbacks\.ema"):
        run(folders / "average", "callbacks.ema.decay=0.8", resume=True)
    with pytest.raises(InputError, match=r"callbacks\.ema"):
        run(folders / "plain", "callbacks.ema={}", resume=True)
