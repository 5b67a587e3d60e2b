"""The Python API: a network in memory and a model file give the same certificates as the commands; and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import rscli
from rscli.api import ABSTAIN, Certificate, Transform
from rscli.cli.app import app
from rscli.data.splits import MemorySplit, open_split
from rscli.errors import ConfigError, InputError, PluginError
from rscli.registry import installed
from rscli.results.rows import Row, parse_row
from rscli.smoothing.task import row_of
from runs import SIGMA
from support import ROOT

EXAMPLES = ROOT / "examples" / "digits"
IMAGES = 8


@pytest.fixture(scope="module")
def run(model: Path) -> Path:
    """The run folder of the small model."""
    return model.parent


@pytest.fixture(scope="module")
def split() -> MemorySplit:
    dataset = installed().build("datasets", {"name": "digits"})
    return open_split(dataset, dataset.spec(Path()), "test", Path())


@pytest.fixture(scope="module")
def images(split: MemorySplit) -> Tensor:
    """The first test images, float32 (IMAGES, 1, 28, 28)."""
    return torch.stack([split.image(index) for index in range(IMAGES)])


@pytest.fixture(scope="module")
def memory(run: Path) -> rscli.SmoothedClassifier:
    """The same network, of which nothing but its weights is known."""
    return rscli.SmoothedClassifier(nn.Sequential(rscli.load(run).network), sigma=SIGMA, class_names=10)


def tiny(classes: int = 3) -> rscli.SmoothedClassifier:
    torch.manual_seed(0)
    return rscli.SmoothedClassifier(nn.Sequential(nn.Flatten(), nn.Linear(16, classes)), sigma=0.5, class_names=classes)


def facts(certificates: Sequence[Certificate]) -> list[tuple[Any, ...]]:
    """All that certificates say, the counts as a list."""
    return [(*astuple(c)[:7], c.counts.tolist(), *astuple(c)[8:]) for c in certificates]


def rows(out: Path) -> list[Row]:
    return [parse_row(line) for line in out.read_text().splitlines()[1:]]


# --- the same as the commands ------------------------------------------------------------------------------------------------

MANNERS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "cohen": (["--n", "400", "--n0", "40"], {"n": 400, "n0": 40}),
    "other-seed": (["--n", "300", "--seed", "7"], {"n": 300, "seed": 7}),
    "labels": (["--n", "400", "--labels"], {"n": 400, "labels": True}),
    "two-sided": (["--n", "400", "--certifier", "two-sided"], {"n": 400, "certifier": "two-sided"}),
    "two-stage": (["--n", "2000", "--certifier", "two-stage"], {"n": 2000, "certifier": "two-stage"}),
    "sequential": (
        ["--n", "2000", "--certifier", "sequential", "--radii", "0,0.25,0.5"],
        {"n": 2000, "certifier": "sequential", "radii": (0.0, 0.25, 0.5)},
    ),
    "sequential-labels": (
        ["--n", "1000", "--certifier", "sequential", "--labels", "--alpha", "0.05"],
        {"n": 1000, "certifier": "sequential", "labels": True, "alpha": 0.05},
    ),
}


@pytest.mark.parametrize("manner", MANNERS)
def test_rows_are_those_of_the_command(manner, run, memory, images, split, tmp_path):
    words, given = MANNERS[manner]
    out = tmp_path / "r.tsv"
    command = ["certify", run, "--max", IMAGES, "--out", out, "--device", "cpu", "--data-dir", tmp_path, "-q", *words]
    found = CliRunner().invoke(app, list(map(str, command)))
    assert found.exit_code == 0, found.output
    labels = [int(label) for label in split.labels[:IMAGES]]
    if given.get("labels"):
        given = {**given, "labels": labels}
    wanted = [astuple(row)[:5] + astuple(row)[6:] for row in rows(out)]
    assert len(wanted) == IMAGES
    assert len({row[2] for row in wanted}) > 1
    for model in (memory, rscli.load(run), rscli.load(run / "model.safetensors")):
        certificates = model.certify(images, **given)
        ours = [astuple(row_of(c, label, 0.0)) for c, label in zip(certificates, labels, strict=True)]
        for row, other in zip(ours, wanted, strict=True):
            assert (*row[:3], row[4], *row[6:]) == (*other[:3], other[4], *other[5:])
            assert row[3] == pytest.approx(other[3], rel=1e-12, abs=1e-12)  # as far as a result file writes it


def test_predictions_are_those_of_the_command(run, images):
    paths = sorted(EXAMPLES.glob("*.png"))
    found = CliRunner().invoke(app, ["predict", str(run), str(EXAMPLES), "--n", "300", "--device", "cpu", "--json", "-q"])
    assert found.exit_code == 0, found.output
    lines = {Path(line["path"]): line for line in map(json.loads, found.stdout.splitlines())}
    answers = rscli.load(run).predict(paths, n=300)
    assert len(paths) == len(answers) == 4
    for path, answer in zip(paths, answers, strict=True):
        assert (answer.name, answer.share, answer.n) == (lines[path]["class"], lines[path]["share"], 300)
    assert [astuple(answer) for answer in rscli.load(run).predict(images, n=200)] == [
        astuple(answer) for answer in rscli.load(run).predict((images * 255).round().to(torch.uint8), n=200)
    ]


def test_bytes_and_floats_numpy_and_torch_are_the_same_images(memory, images):
    pixels = (images[:3] * 255).round().to(torch.uint8)
    wanted = facts(memory.certify(images[:3], n=100))
    for same in (pixels, pixels.numpy(), images[:3].numpy(), list(images[:3]), list(pixels.numpy()), images[:3].double()):
        assert facts(memory.certify(same, n=100)) == wanted


def test_batch_and_order_of_images_do_not_matter(memory, images):
    wanted = {c.index: c for c in memory.certify(images, n=300)}
    order = [5, 0, 7, 2, 1, 6, 3, 4]
    for batch in (1, 37, 1000):
        found = memory.certify(images[order], n=300, indices=order, batch=batch)
        assert [c.index for c in found] == order
        assert facts(found) == facts([wanted[index] for index in order])
    answers = memory.predict(images, n=200)
    assert memory.predict(images[order], n=200, batch=33) == [answers[place] for place in order]


def test_indices_key_the_noise(memory, images):
    torn = min(memory.certify(images, n=300), key=lambda c: c.counts.max()).index
    twice = images[torn : torn + 1].repeat(2, 1, 1, 1)
    first, second = memory.certify(twice, n=300, indices=[4, 9])
    assert first.counts.tolist() != second.counts.tolist()
    assert facts(memory.certify(twice[:1], n=300, indices=[9])) == facts([second])
    assert facts(memory.certify(twice[:1], n=300, indices=[9], seed=1)) != facts([second])
    same = memory.predict(twice, n=300)  # keyed by the pixels
    assert same[0] == same[1]


def test_a_certificate_is_consistent(memory, images):
    for c in memory.certify(images, n=500, n0=50, alpha=0.01):
        assert c.counts.shape == (10,)
        assert c.counts.dtype == np.int64
        assert (c.counts.sum(), c.n, c.n0) == (500, 500, 50)
        assert (c.radius > 0) <= (c.predict == c.candidate)
        assert c.predict in (c.candidate, ABSTAIN)
        assert c.radius == (0.0 if c.predict == ABSTAIN else memory.noise.radius(c.p_a, c.p_b))


def test_no_images_give_no_certificates(memory):
    assert memory.certify([]) == memory.predict([]) == []
    assert memory.certify(torch.empty(0, 1, 28, 28)) == []


# --- any network -------------------------------------------------------------------------------------------------------------


class Ensemble(nn.Module):
    """The mean of the softmax of its members."""

    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images).softmax(-1) for member in self.members]).mean(0)


class Denoised(nn.Module):
    """A denoiser in front of somebody's classifier."""

    def __init__(self, denoiser: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.denoiser, self.classifier = denoiser, classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.denoiser(images))


@pytest.mark.parametrize("kind", ["ensemble", "denoiser"])
def test_networks_of_networks_certify(kind, run, memory, images):
    inner = rscli.load(run).network
    blur = nn.AvgPool2d(3, stride=1, padding=1)
    network = Ensemble(inner, inner) if kind == "ensemble" else Denoised(blur, inner)
    model = rscli.SmoothedClassifier(network, sigma=SIGMA, class_names=[f"digit {d}" for d in range(10)])
    found, plain = model.certify(images, n=200), memory.certify(images, n=200)
    assert (facts(found) == facts(plain)) is (kind == "ensemble")  # twice one member is that member
    assert {answer.name for answer in model.predict(images, n=100)} <= {*model.class_names, "ABSTAIN"}


def test_the_network_is_left_in_its_modes():
    model = tiny()
    network = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(1), model.network).train()
    network[1].eval()
    modes = [module.training for module in network.modules()]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    needs = [p.requires_grad for p in network.parameters()]
    model = rscli.SmoothedClassifier(network, sigma=0.5, class_names=3)
    first, again = (facts(model.certify(torch.rand(2, 1, 4, 4).mul(0).add(0.5), n=100)) for _ in range(2))
    assert first == again  # dropout was off
    model.predict(torch.rand(2, 1, 4, 4), n=100)
    assert [module.training for module in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == needs
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_the_network_is_left_in_its_modes_when_it_fails():
    class Fails(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("no")

    network = nn.Sequential(Fails(), nn.Dropout()).train()
    with pytest.raises(RuntimeError, match="no"):
        rscli.SmoothedClassifier(network, sigma=0.5, class_names=3).certify(torch.rand(2, 1, 4, 4), n=100)
    assert all(module.training for module in network.modules())


# --- files -------------------------------------------------------------------------------------------------------------------


def test_save_and_load_round_trip(run, images, tmp_path):
    model, path = rscli.load(run), tmp_path / "again.safetensors"
    rscli.save(model, path)
    assert path.read_bytes() == (run / "model.safetensors").read_bytes()
    again = rscli.load(path)
    assert (again.class_names, again.shape, again.sigma) == (model.class_names, (1, 28, 28), SIGMA)
    assert facts(again.certify(images, n=100)) == facts(model.certify(images, n=100))


def test_a_network_in_memory_cannot_be_saved(memory, tmp_path):
    with pytest.raises(InputError, match="not built from an architecture plugin") as error:
        rscli.save(memory, tmp_path / "m.safetensors")
    assert "rscli import" in error.value.hint
    assert list(tmp_path.iterdir()) == []


def test_results_are_those_that_the_commands_print(run, tmp_path):
    out = tmp_path / "r.tsv"
    command = ["certify", run, "--max", 6, "--n", 200, "--out", out, "--device", "cpu", "--data-dir", tmp_path, "-q"]
    assert CliRunner().invoke(app, list(map(str, command))).exit_code == 0
    results = rscli.read_results(out)
    assert results.idx.tolist() == [row.idx for row in rows(out)]
    assert results.radius.tolist() == [row.radius for row in rows(out)]
    assert rscli.compare([results]).summaries == rscli.compare([out]).summaries == rscli.compare([str(out)]).summaries


def test_importing_rscli_imports_no_torch():
    code = "import sys, rscli; rscli.__version__; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="certifi"):
        _ = rscli.certifi
    assert {"SmoothedClassifier", "load", "save", "read_results", "compare"} <= set(dir(rscli))


# --- what is refused ---------------------------------------------------------------------------------------------------------

GOOD = torch.full((2, 1, 4, 4), 0.5)
REFUSED: dict[str, tuple[Callable[[rscli.SmoothedClassifier], object], str]] = {
    "one-image": (lambda m: m.certify(GOOD[0]), "has 2 dimensions, not 3"),
    "five-dimensions": (lambda m: m.certify(GOOD[None]), "has 4 dimensions, not 3"),
    "two-shapes": (lambda m: m.certify([GOOD[0], torch.rand(1, 4, 5)]), r"image 1 has the shape \(1, 4, 5\)"),
    "above": (lambda m: m.certify(GOOD * 3), "image 0 has pixels from 1.5 to 1.5"),
    "below": (lambda m: m.certify([GOOD[0], -GOOD[1]]), "image 1 has pixels from -0.5 to -0.5"),
    "nan": (lambda m: m.certify(GOOD * torch.nan), "image 0 has pixels from nan to nan"),
    "one-nan": (lambda m: m.certify(torch.cat([GOOD.flatten()[:-1], torch.tensor([torch.nan])]).view_as(GOOD)), "nan"),
    "infinite": (lambda m: m.certify(GOOD / 0), "pixels from inf to inf"),
    "integers": (lambda m: m.certify((GOOD * 255).long()), "has numbers of type torch.int64"),
    "truths": (lambda m: m.certify(GOOD > 0), "has numbers of type torch.bool"),
    "complex": (lambda m: m.certify(GOOD.to(torch.complex64)), "has numbers of type torch.complex64"),
    "no-pixels": (lambda m: m.certify(torch.empty(2, 1, 0, 4)), "image 0"),
    "texts": (lambda m: m.certify(np.array([["a", "b"], ["c", "d"]])), "image"),
    "path": (lambda m: m.certify("x.png"), r"one path.*Write \[path\]"),
    "paths": (lambda m: m.certify([Path("x.png")]), "has no transform"),
    "duplicate-indices": (lambda m: m.certify(GOOD, indices=[3, 3]), "Give each image an index of its own"),
    "too-few-indices": (lambda m: m.certify(GOOD, indices=[3]), "1 indices for 2 images"),
    "negative-index": (lambda m: m.certify(GOOD, indices=[-1, 0]), "0 or more"),
    "label-above": (lambda m: m.certify(GOOD, labels=[0, 3]), "Labels are from 0 to 2"),
    "label-below": (lambda m: m.certify(GOOD, labels=[0, -1]), "Labels are from 0 to 2"),
    "too-few-labels": (lambda m: m.certify(GOOD, labels=[0]), "1 labels for 2 images"),
    "n": (lambda m: m.certify(GOOD, n=0), "n = 0"),
    "alpha": (lambda m: m.certify(GOOD, alpha=2.0), "alpha = 2"),
    "certifier": (lambda m: m.certify(GOOD, certifier="cohan"), "cohan"),
    "setting": (lambda m: m.certify(GOOD, speed=3), "speed"),
    "radii": (lambda m: m.certify(GOOD, radii=[0.5]), "the largest radius that it can"),
    "device": (lambda m: m.certify(GOOD, n=100, device="gpux"), "gpux"),
    "precision": (lambda m: m.certify(GOOD, n=100, precision="int3"), "int3"),
    "vote": (lambda m: m.predict(GOOD, n=2), "unanimous vote"),
    "predict-range": (lambda m: m.predict(GOOD * 3), "image 0 has pixels from 1.5"),
    "no-noise": (lambda m: rscli.SmoothedClassifier(m.network, class_names=3), "needs its noise"),
    "two-noises": (lambda m: rscli.SmoothedClassifier(m.network, class_names=3, sigma=1, noise=m.noise), "needs its noise"),
    "sigma": (lambda m: rscli.SmoothedClassifier(m.network, class_names=3, sigma=-1), "sigma"),
    "no-classes": (lambda m: rscli.SmoothedClassifier(m.network, class_names=0, sigma=1), "class"),
    "other-classes": (lambda m: rscli.SmoothedClassifier(m.network, class_names=5, sigma=1).certify(GOOD, n=100), "5"),
    "no-file": (lambda m: rscli.load("no/such/file"), "there is no model file"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_one_clear_message(what):
    call, said = REFUSED[what]
    with pytest.raises((InputError, ConfigError, PluginError)) as caught:
        call(tiny())
    text = f"{caught.value.message} {caught.value.hint or ''}"
    assert re.search(said, text), text


def test_a_known_shape_refuses_other_images(run):
    with pytest.raises(InputError, match=r"image 0 has the shape \(1, 4, 4\), but must have \(1, 28, 28\)"):
        rscli.load(run).certify(GOOD)


def test_files_become_images_by_the_transform(run, memory):
    paths = sorted(EXAMPLES.glob("*.png"))
    transform = Transform(channels=1, crop=(28, 28))
    model = rscli.SmoothedClassifier(memory.network, sigma=SIGMA, class_names=10, transform=transform)
    assert facts(model.certify(paths, n=100)) == facts(rscli.load(run).certify(list(map(str, paths)), n=100))
    with pytest.raises(InputError, match="README"):
        model.certify([paths[0], EXAMPLES.parent.parent / "README.md"], n=100)
