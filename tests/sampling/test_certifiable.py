"""The trial before a certificate: networks that are random, or look at the rest of the batch, get none; others do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rscli
from rscli import registry
from rscli.api import Architecture
from rscli.config.layers import resolve
from rscli.errors import InputError
from rscli.plugin_files import load_plugin_file
from rscli.registry import installed
from rscli.runtime.progress import Silent
from rscli.sampling.certifiable import check_certifiable, why_not_certifiable
from rscli.training.train import TrainOptions, outlook, train

CPU, SHAPE = torch.device("cpu"), (3, 8, 8)


class Body(nn.Module):
    """A small convolution and a linear layer, with something between."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.between, self.fc = nn.Conv2d(3, 4, 3), between, nn.Linear(4 * 6 * 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.between(self.conv(x)).flatten(1))


class Careless(nn.Module):
    """Dropout that forgets to ask for the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.1)


class Counting(nn.Module):
    """Answers by how often it was asked."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Centred(nn.Module):
    """Takes away the mean of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Quantised(nn.Module):
    """Rounds to 255 levels of the largest value in the batch, as dynamic quantisation does."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().max() / 127
        return (x / scale).round() * scale


class OnlyPairs(nn.Module):
    """Refuses a single image, as a network exported for one batch size does."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 2:
            raise ValueError("two, please")
        return x


@pytest.fixture
def _forget():
    yield
    registry._announced.clear()
    installed.cache_clear()


RANDOM, BATCH = "from one time to the next", "depends on the other images in the batch"


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (Careless(), RANDOM),
        (Counting(), RANDOM),
        (nn.BatchNorm2d(4, track_running_stats=False), BATCH),
        (Centred(), BATCH),
        (Quantised(), BATCH),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_refused(between, why):
    with pytest.raises(InputError, match=f"cannot be certified: .*{why}") as error:
        check_certifiable(Body(between), SHAPE, CPU)
    assert "dropout that ignores eval mode" in error.value.hint


@pytest.mark.parametrize(
    "between",
    [nn.Identity(), nn.BatchNorm2d(4), nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.Dropout(0.9), nn.LayerNorm(6), OnlyPairs()],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not(between):
    network = Body(between).train()
    assert why_not_certifiable(network, SHAPE, CPU) is None
    assert all(module.training for module in network.modules())  # as it was


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("relative", [3e-6, 3e-2])
def test_rounding_is_not_held_against_a_network(relative, scale):
    """Some epsilons of float32 (1.2e-7), the size of rounding errors, pass at any scale; a real difference does not."""

    class Off(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return scale * x.mean((2, 3)) * (1 + relative * (len(x) == 1))

    assert (why_not_certifiable(Off(), SHAPE, CPU) is None) == (relative < 1e-4)


def test_a_network_that_fails_is_not_judged():
    """It will be met again by whoever uses it, with its own error."""
    assert why_not_certifiable(nn.Linear(3, 3), SHAPE, CPU) is None

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) * torch.nan

    assert why_not_certifiable(Broken(), SHAPE, CPU) is None


@pytest.mark.parametrize("method", ["certify", "predict"])
def test_networks_in_memory_get_no_certificate(method):
    images = torch.rand(1, *SHAPE)
    model = rscli.SmoothedClassifier(Body(Careless()), sigma=0.25, class_names=5)
    with pytest.raises(InputError, match=f"cannot be certified: .*{RANDOM}"):
        getattr(model, method)(images, n=100)
    assert len(getattr(rscli.SmoothedClassifier(Body(nn.Dropout()), sigma=0.25, class_names=5), method)(images, n=100)) == 1


PLUGIN = """
from torch import nn
from rscli.api import Architecture

class Batchy(Architecture):
    def build(self, spec, *, weights=True):
        return nn.Sequential(
            nn.Flatten(), nn.Linear(28 * 28, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 10)
        )
"""


@pytest.mark.usefixtures("_forget")
def test_training_does_not_begin(tmp_path):
    """Nor does the dry run pretend that it could; nothing is written."""
    (tmp_path / "batchy.py").write_text(PLUGIN)
    load_plugin_file(tmp_path / "batchy.py")
    sets = ["data.name=digits", "arch.name=batchy", "noise.sigma=0.25", "loss.name=gaussian", "optimizer.lr=0.1", "epochs=1"]
    resolved = resolve(sets=sets)
    assert isinstance(resolved.architecture, Architecture)
    options = TrainOptions(out=tmp_path / "run", data_dir=tmp_path, device="cpu", workers=0)
    for begin in (lambda: outlook(resolved, options), lambda: train(resolved, options, Silent())):
        with pytest.raises(InputError, match=BATCH):
            begin()
    assert not (tmp_path / "run").exists()


LATE = (
    PLUGIN.replace("return nn.Sequential(", "net = nn.Sequential(").replace("class Batchy", "class Late")
    + """
        nn.init.zeros_(net[3].weight)
        nn.init.zeros_(net[3].bias)
        return net
"""
)


@pytest.mark.usefixtures("_forget")
def test_what_shows_only_after_training_is_said_at_its_end(tmp_path):
    """A head of zeros hides at first that the layers below look at the batch; the model is kept, and gets no certificate."""
    (tmp_path / "late.py").write_text(LATE)
    load_plugin_file(tmp_path / "late.py")
    sets = ["data.name=digits", "arch.name=late", "noise.sigma=0.25", "loss.name=gaussian", "optimizer.lr=0.1", "epochs=1"]
    warned: list[str] = []
    listener = Silent()
    listener.warn = warned.append
    model = train(resolve(sets=sets), TrainOptions(out=tmp_path / "run", data_dir=tmp_path, device="cpu", workers=0), listener)
    assert any(f"{model} cannot be certified" in text and BATCH in text for text in warned)
    with pytest.raises(InputError, match=BATCH):
        rscli.load(model).certify(torch.rand(1, 1, 28, 28), n=100)
