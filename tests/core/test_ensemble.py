"""Ensembles, and a denoiser in front of a classifier: what they compute, and from files to the same rows as in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp
from torch import nn
from typer.testing import CliRunner

import rscli
from rscli.api import DataSpec, Transform
from rscli.cli.app import app
from rscli.config.layers import resolve
from rscli.data.splits import open_split
from rscli.errors import ConfigError, InputError
from rscli.models.modelfile import save_model
from rscli.registry import installed
from rscli.training.model_card import model_card
from rscli.training.trainer import initial_classifier

BASE = ("data.name=digits", "arch.name=lenet", "noise.sigma=0.25", "loss.name=gaussian", "optimizer.lr=0.1")
TINY = {"name": "dncnn", "depth": 3, "width": 4}


def write(path: Path, *sets: str, spec: dict[str, Any] | None = None) -> Path:
    """A model with its initial weights."""
    resolved = resolve(sets=[*BASE, *sets])
    found = resolved.dataset.spec(Path())
    found = DataSpec.model_validate({**found.model_dump(), **(spec or {})})
    save_model(path, initial_classifier(resolved, found), model_card(resolved, found, {}))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("members")
    return [write(folder / f"{seed}.safetensors", f"seed={seed}") for seed in range(3)]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    resolved = resolve(sets=BASE)
    split = open_split(resolved.dataset, resolved.dataset.spec(Path()), "test", Path())
    return torch.stack([split.image(index) for index in range(4)])


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def logits(model: rscli.SmoothedClassifier, images: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return model.network(images).double().numpy()


# --- what is computed --------------------------------------------------------------------------------------------------------


def test_the_mean_of_the_members(files, images):
    members = np.stack([logits(rscli.load(path), images) for path in files])
    assert np.allclose(logits(rscli.ensemble(files), images), members.mean(0), atol=1e-6)
    found = logits(rscli.ensemble(files, average="probabilities"), images)
    wanted = logsumexp(log_softmax(members, axis=-1), axis=0) - np.log(3)
    assert np.allclose(found, wanted, atol=1e-6)
    assert np.allclose(np.exp(found).sum(-1), 1, atol=1e-6)


def test_probabilities_of_extreme_logits_are_finite():
    from rscli_core.architectures._composite import Mean

    class Fixed(nn.Module):
        def __init__(self, *values: float) -> None:
            super().__init__()
            self.values = torch.tensor([values])

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.values

    found = Mean([Fixed(1e4, 0.0), Fixed(0.0, 1e4)], probabilities=True)(torch.zeros(1))
    assert torch.allclose(found, torch.full((1, 2), -np.log(2)), atol=1e-6)


def test_dncnn_takes_its_residual_off():
    spec = DataSpec(class_names=("a",), shape=(3, 8, 8), test_transform=Transform(channels=3, crop=(8, 8)))
    published = installed().build("architectures", {"name": "dncnn"}).build(spec)
    # 3 -> 64, fifteen times 64 -> 64 with batch normalisation, 64 -> 3: 3x3 kernels, one bias
    assert sum(p.numel() for p in published.parameters()) == 3 * 64 * 9 + 64 + 15 * (64 * 64 * 9 + 128) + 64 * 3 * 9
    network = installed().build("architectures", TINY).build(spec).eval().double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    first, _, middle, _, _, last = network.dncnn
    conv = nn.functional.conv2d
    hidden = conv(x, first.weight, first.bias, padding=1).clamp(min=0)
    hidden = (conv(hidden, middle.weight, padding=1) / np.sqrt(1 + 1e-5)).clamp(min=0)  # running statistics 0 and 1
    assert torch.allclose(network(x), x - conv(hidden, last.weight, padding=1))


# --- the same rows from a file as in memory ----------------------------------------------------------------------------------


def test_the_command_and_the_python_api_give_the_same_certificates(files, images, tmp_path):
    out, rows = tmp_path / "ensemble.safetensors", tmp_path / "rows.tsv"
    done = run("ensemble", *files, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["parameters"] == 3 * 431_080
    assert [member["name"] for member in said["arch"]["members"]] == ["rscli:lenet"] * 3
    assert all(path.name in said["origin"] for path in files)
    words = ("--n", 200, "--n0", 20, "--max", 4, "--seed", 7, "--out", rows, "-q")
    done = run("certify", out, *words)
    assert done.exit_code == 0, done.output
    by_command = rscli.read_results(rows)
    for model in (rscli.ensemble(files), rscli.load(out)):
        found = model.certify(images, n=200, n0=20, seed=7)
        assert [one.predict for one in found] == by_command.predict.tolist()
        assert [one.radius for one in found] == by_command.radius.tolist()
        counts = [one.counts[one.candidate] for one in found]
        column = rows.read_text().splitlines()[0].split("\t").index("count")
        assert counts == [int(line.split("\t")[column]) for line in rows.read_text().splitlines()[1:]]
    rscli.ensemble([rscli.load(path) for path in files]).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()
    assert run("predict", out, "--help").exit_code == 0


def test_a_denoiser_in_front_gives_the_rows_of_the_two_in_memory(files, images, tmp_path):
    classifier = rscli.load(files[0])
    torch.manual_seed(1)
    denoiser = installed().build("architectures", TINY).build(classifier.card.spec).eval()
    for module in denoiser.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    together = nn.Sequential(denoiser, classifier.network)
    memory = rscli.SmoothedClassifier(together, sigma=0.125, class_names=classifier.class_names)
    composed = rscli.compose("denoised", denoiser=(denoiser, TINY), classifier=classifier, sigma=0.125)
    rscli.save(composed, tmp_path / "m.safetensors")
    wanted = memory.certify(images, n=300, n0=20, seed=3)
    for model in (composed, rscli.load(tmp_path / "m.safetensors")):
        found = model.certify(images, n=300, n0=20, seed=3)
        assert [one.counts.tolist() for one in found] == [one.counts.tolist() for one in wanted]
        assert [(one.predict, one.radius) for one in found] == [(one.predict, one.radius) for one in wanted]
        assert model.sigma == 0.125
    assert any((one.counts > 0).sum() > 1 for one in wanted), "the counts should be able to differ"


def test_the_models_stay_as_they_are(files):
    models = [rscli.load(path) for path in files[:2]]
    both = rscli.ensemble(models)
    with torch.no_grad():
        for parameter in both.network.parameters():
            parameter.zero_()
    assert all(parameter.any() for model in models for parameter in model.network.parameters())


def test_predict_reads_it(files, tmp_path):
    from PIL import Image

    Image.fromarray(np.full((28, 28), 99, np.uint8)).save(tmp_path / "image.png")
    assert run("ensemble", *files[:2], "--out", tmp_path / "e").exit_code == 0
    done = run("predict", tmp_path / "e", tmp_path / "image.png", "--n", 100)
    assert done.exit_code == 0, done.output


# --- what cannot be put together ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "spec", "said"),
    [
        ("noise.sigma=0.5", {}, ("sigma of", "0.25", "0.5", "--sigma")),
        ("seed=5", {"class_names": [f"digit {n}" for n in range(10)]}, ("class names of", "'digit 0'")),
        (
            "seed=5",
            {"shape": (1, 32, 32), "test_transform": {"channels": 1, "resize": 32, "crop": (32, 32)}},
            ("input shape of", "(1, 28, 28)", "(1, 32, 32)"),
        ),
        ("seed=5", {"test_transform": {"channels": 1, "resize": 30, "crop": (28, 28)}}, ("test transform of", "resize=30")),
    ],
    ids=["sigma", "classes", "shape", "transform"],
)
def test_models_that_differ_are_refused_in_words(files, tmp_path, sets, spec, said):
    other, out = write(tmp_path / "other.safetensors", sets, spec=spec), tmp_path / "e.safetensors"
    done = run("ensemble", files[0], other, "--out", out)
    assert done.exit_code == 2
    shown = " ".join(done.output.split())
    for text in (*said, files[0].name, "other.safetensors"):
        assert text in shown, (text, shown)
    assert not out.exists()
    with pytest.raises(InputError):
        rscli.ensemble([files[0], other])


def test_sigma_may_be_said(files, tmp_path):
    other, out = write(tmp_path / "other", "noise.sigma=0.5"), tmp_path / "e.safetensors"
    assert run("ensemble", files[0], other, "--sigma", 0.125, "--out", out).exit_code == 0
    assert rscli.load(out).sigma == 0.125
    with pytest.raises(ConfigError, match=r"noise\.sigma"):
        rscli.ensemble(files, sigma=-1.0)


def test_what_is_wrong_with_the_command_line_is_one_message(files, tmp_path):
    out = tmp_path / "e.safetensors"
    for words, said in (
        ((tmp_path / "none",), "there is no model file"),
        ((files[0], "--set", "arch.average=votes"), "arch.average"),
        ((files[0], "--set", "arch.members=[]"), "not a setting of ensemble"),
        ((files[0], "--set", "noise.sigma=1"), "not a setting of ensemble"),
    ):
        done = run("ensemble", *words, "--out", out)
        assert done.exit_code == 2, done.output
        assert said in " ".join(done.output.split())
        assert not out.exists()
    out.write_text("precious")
    done = run("ensemble", *files, "--out", out)
    assert (done.exit_code, out.read_text()) == (2, "precious")
    assert run("ensemble", *files, "--out", out, "--force", "--set", "arch.average=probabilities").exit_code == 0
    assert rscli.load(out).card.arch["average"] == "probabilities"


def test_what_does_not_say_how_it_is_built_is_refused(files):
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    mine = rscli.SmoothedClassifier(network, sigma=0.25, class_names=10)
    model = rscli.load(files[0])
    for wrong, said in (
        (lambda: rscli.ensemble([model, mine]), "does not say how it is built"),
        (lambda: rscli.ensemble([model, network]), "does not say how it is built"),
        (lambda: rscli.compose("denoised", denoiser=network, classifier=model), "does not say how it is built"),
        (lambda: rscli.compose("denoised", denoiser=(network, TINY), classifier=model), "does not have its tensors"),
        (lambda: rscli.compose("denoised", denoiser=TINY, classifier=model), "2 architectures, and weights for 1"),
        (lambda: rscli.compose("denoised", classifier=model), "denoiser: is missing"),
        (lambda: rscli.compose("denoised", denoiser=(network, TINY), classifier=(network, "lenet")), "no model says"),
        (lambda: rscli.compose("lenet", members=[model]), "members"),
        (lambda: rscli.ensemble([]), "no model says"),
        (lambda: mine.save("nowhere"), "architecture plugin"),
    ):
        with pytest.raises(InputError, match=said):
            wrong()


@pytest.mark.slow
def test_an_ensemble_can_be_trained_as_a_whole(tmp_path):
    from rscli.runtime.progress import Silent
    from rscli.training.train import TrainOptions, train

    sets = [*BASE, "arch.name=ensemble", 'arch.members=["lenet", "lenet"]', "epochs=1", "batch=720"]
    model = train(resolve(sets=sets), TrainOptions(tmp_path / "run", tmp_path, device="cpu", workers=0), Silent())
    first, second = rscli.load(model).network.network.members
    assert not torch.equal(first.network.fc1.weight, second.network.fc1.weight)
