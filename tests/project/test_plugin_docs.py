"""docs/plugins.md: every example is a plugin, of at most 30 lines, that does what the page says of it."""

from __future__ import annotations

import csv
import json
import re
import textwrap
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import nn
from typer.testing import CliRunner

from rscli import registry
from rscli.api import ABSTAIN, KINDS, Plan, Question, TrainStep
from rscli.cli.app import app
from rscli.config.layers import resolve
from rscli.errors import InputError
from rscli.models.modelfile import load_model
from rscli.models.network import build_classifier
from rscli.plugin_files import load_plugin_file
from rscli.registry import installed
from rscli.results.reader import read_results
from support import ROOT, forget_plugins

PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
TABLES = [tomllib.loads(text) for text in re.findall(r"^```toml\n(.*?)^```$", PAGE, re.M | re.S)]
POINTS = [
    (group.removeprefix("rscli."), name, target)
    for table in TABLES
    for group, points in table.get("project", {}).get("entry-points", {}).items()
    for name, target in points.items()
]
PLAIN = {"data.name": "digits", "noise.sigma": 0.5, "loss.name": "gaussian", "optimizer.lr": 0.1}
SHARED = {"loss.m": 2, "noise.sigma": 0.15, "epochs": 3, "batch": 64, "optimizer.lr": 0.01}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """One file for each example."""
    folder = tmp_path_factory.mktemp("examples")
    made = [folder / f"example_{number}.py" for number in range(len(EXAMPLES))]
    for path, text in zip(made, EXAMPLES, strict=True):
        path.write_text(text, encoding="utf-8")
    return made


@pytest.fixture(autouse=True)
def known(files):
    """Every example is known, as after --plugin FILE; afterwards none is."""
    for path in files:
        load_plugin_file(path)
    yield
    forget_plugins()


def build(kind: str, name: str, **fields):
    return installed().build(kind, {"name": name, **fields})


def run(files: list[Path], *words: object):
    given = [word for path in files for word in ("--plugin", str(path))]
    return CliRunner().invoke(app, [*map(str, words), *given])


# --- the page ----------------------------------------------------------------------------------------------------------------


def test_every_kind_has_an_example_of_at_most_30_lines():
    assert {kind for kind, _, _ in POINTS} == set(KINDS)
    assert max(text.count("\n") for text in EXAMPLES) <= 30
    assert len(EXAMPLES) >= 11


def test_the_entry_points_are_those_of_the_examples():
    """The name of an entry point is the one that a file gives the same class, so nothing changes when a package is made."""
    found = {(entry.kind, entry.name): entry.target.rpartition(":")[2] for entry in registry._announced}
    assert {(kind, name): target.rpartition(":")[2] for kind, name, target in POINTS if kind != "presets"} == found


@pytest.mark.parametrize("text", EXAMPLES, ids=lambda text: re.findall(r"^class (\w+)", text, re.M)[0])
def test_no_example_imports_torch_at_module_level_or_what_is_private(text):
    assert not re.search(r"^(import|from) (torch|sklearn)", text, re.M)
    assert set(re.findall(r"^\s*from (rscli[\w.]*) import", text, re.M)) <= {"rscli.api", "rscli.errors", "rscli.stats"}


def test_the_preset_resolves(tmp_path):
    (preset,) = (table for table in TABLES if "preset" in table)
    text = next(block for block in re.findall(r"^```toml\n(.*?)^```$", PAGE, re.M | re.S) if "[preset]" in block)
    path = tmp_path / "mnist-jensen-shannon-0.5.toml"
    path.write_text(text, encoding="utf-8")
    resolved = resolve(config_file=path)
    assert (resolved.loss.lbd, resolved.noise.sigma, resolved.config.epochs) == (10, 0.5, 90)
    assert set(preset["preset"]) == {"title", "source"}


# --- all at once, through the commands ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory) -> Path:
    """A run with an example of every kind in it."""
    folder = tmp_path_factory.mktemp("run")
    names = {
        "data": "breast-cancer",
        "arch": "mlp",
        "noise": "laplace",
        "loss": "jensen-shannon",
        "attack": "random-direction",
        "optimizer": "adamw",
        "schedule": "half-cosine",
    }
    words = [f"{section}.name={name}" for section, name in names.items()]
    words += [f"{key}={value}" for key, value in SHARED.items()]
    words += ["attack.epsilon=0.1", "loggers.csv={}", "callbacks.averaging.decay=0.9"]
    given = [word for text in words for word in ("--set", text)]
    result = run(files, "train", *given, "--out", folder / "run", "-q")
    assert result.exit_code == 0, result.output
    (folder / "words").write_text("\n".join(given), encoding="utf-8")
    return folder / "run"


def test_a_run_with_all_of_them(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    table = list(csv.DictReader((trained / "metrics.csv").open(newline="")))
    assert [int(row["epoch"]) for row in table] == [line["epoch"] for line in lines] == [1, 2, 3]
    assert [float(row["loss"]) for row in table] == [line["loss"] for line in lines]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"ce", "js"} <= set(lines[0])
    assert lines[-1]["lr"] < 0.5 * lines[0]["lr"]


def test_the_model_file_has_the_average_of_the_weights(trained):
    kept = torch.load(trained / "checkpoint.pt", weights_only=True)
    model = load_model(trained / "model.safetensors")
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, kept["callbacks"]["averaging"][name])
    assert any(not torch.equal(value, kept["model"][name]) for name, value in model.network.state_dict().items())


def test_what_callbacks_keep_survives_a_kill_before_the_model_file(files, trained):
    finished = (trained / "model.safetensors").read_bytes()
    (trained / "model.safetensors").unlink()
    words = (trained.parent / "words").read_text(encoding="utf-8").splitlines()
    result = run(files, "train", *words, "--out", trained, "--resume", "-q")
    assert result.exit_code == 0, result.output
    assert (trained / "model.safetensors").read_bytes() == finished


def test_it_is_certified_in_l1_and_results_of_two_bounds_are_not_compared(files, trained, tmp_path):
    for bound in ("hoeffding", "bernstein"):
        words = ["certify", trained, "--certifier", "concentration", "--set", f"certifier.bound={bound}", "--n", "2000", "-q"]
        result = run(files, *words, "--max", "20", "--out", tmp_path / f"{bound}.tsv")
        assert result.exit_code == 0, result.output
    rows = {bound: read_results(tmp_path / f"{bound}.tsv") for bound in ("hoeffding", "bernstein")}
    assert rows["bernstein"].protocol["norm"] == "L1"
    assert rows["bernstein"].correct.mean() > 0.7
    assert rows["bernstein"].radius.max() > rows["hoeffding"].radius.max() > 0
    refused = CliRunner().invoke(app, ["compare", *(str(tmp_path / f"{bound}.tsv") for bound in rows)])
    assert refused.exit_code == 2
    assert "bound of concentration: hoeffding (hoeffding); bernstein" in refused.output


def test_a_student_learns_from_soft_labels(files, trained, tmp_path):
    words = ["data.name=breast-cancer", "arch.name=mlp", "noise.name=laplace", "loss.name=distill", f"loss.teacher={trained}"]
    words += [f"{key}={value}" for key, value in SHARED.items()]
    given = [word for text in words for word in ("--set", text)]
    result = run(files, "train", *given, "--out", tmp_path / "run", "-q")
    assert result.exit_code == 0, result.output
    losses = [json.loads(line)["distill"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert set(load_model(tmp_path / "run/model.safetensors").source.card.loss_state) == {"soft"}


# --- one by one --------------------------------------------------------------------------------------------------------------


def a_step(**changes) -> TrainStep:
    """A step of four 1x5x6 images in three noisy copies."""
    random = torch.Generator().manual_seed(0)
    images = torch.rand(4, 1, 5, 6, generator=random)
    smoothing = build("noises", "laplace", sigma=0.5)
    noise = smoothing.sample((3, *images.shape), generator=random, device=torch.device("cpu"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(30, 5))
    fields = {
        "model": model,
        "images": images,
        "clean": images,
        "labels": torch.tensor([0, 1, 4, 1]),
        "indices": torch.arange(4),
        "noise": noise,
        "smoothing": smoothing,
        "generator": random,
    }
    return TrainStep(**{**fields, **changes})


def test_the_divergence_is_that_of_its_definition():
    """JS = H(mean p) - mean H(p), in float64."""
    step = a_step()
    logits = step.noisy_logits.detach().double()
    terms = build("losses", "jensen-shannon", m=3, lbd=2).terms(logits, step.labels)
    p = logits.softmax(-1).numpy()
    entropy = lambda q: -(q * np.log(q)).sum(-1)  # noqa: E731
    assert terms["js"].item() == pytest.approx(2 * (entropy(p.mean(0)) - entropy(p).mean(0)).mean(), rel=1e-12)
    picked = np.log(p)[:, np.arange(4), step.labels.numpy()]
    assert terms["ce"].item() == pytest.approx(-picked.mean(), rel=1e-12)


def test_the_attack_moves_by_epsilon_and_repeats():
    attack = build("attacks", "random-direction", epsilon=0.3)
    inside = torch.full((4, 1, 5, 6), 0.5)
    moved = [attack.perturb(a_step(images=inside, generator=torch.Generator().manual_seed(1))).images for _ in range(2)]
    assert torch.equal(*moved)
    assert (moved[0] - inside).flatten(1).norm(dim=1).numpy() == pytest.approx(np.full(4, 0.3), rel=1e-5)


def test_laplace_noise_has_standard_deviation_sigma():
    noise = build("noises", "laplace", sigma=0.7)
    drawn = noise.sample((400_000,), generator=torch.Generator().manual_seed(0), device=torch.device("cpu"))
    assert drawn.dtype == torch.float32
    drawn = drawn.double()
    assert drawn.std().item() == pytest.approx(0.7, rel=0.01)
    assert drawn.abs().mean().item() == pytest.approx(0.7 / 2**0.5, rel=0.01)  # E|x| = b
    assert drawn.mean().item() == pytest.approx(0, abs=0.01)


def worst_probability(p: float, r: float, b: float) -> float:
    """The smallest mass under Laplace(r, b) of a set with mass p under Laplace(0, b), on the line, by Neyman & Pearson.

    The sets are cut at a threshold of the likelihood ratio; where it is constant (beyond 0 and r), any part of the mass may be
    taken. By numerical integration, nothing of the closed form is used.
    """
    x = np.linspace(-60 * b, 60 * b + r, 1_200_001)
    here, there = np.exp(-np.abs(x) / b) / (2 * b), np.exp(-np.abs(x - r) / b) / (2 * b)
    order = np.argsort(there / here, kind="stable")  # points where it is least probable under the shift come first
    mass = np.cumsum(here[order]) * (x[1] - x[0])
    return float(np.interp(p, mass, np.cumsum(there[order]) * (x[1] - x[0])))


@pytest.mark.parametrize("p_a", [0.51, 0.7, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_at_the_laplace_radius_the_worst_classifier_is_at_one_half(p_a, sigma):
    noise = build("noises", "laplace", sigma=sigma)
    radius = noise.radius(p_a, 1 - p_a)
    b = sigma / 2**0.5
    assert integrate.quad(lambda x: x * x * np.exp(-abs(x) / b) / (2 * b), -50 * b, 50 * b, points=[0])[0] ** 0.5 == (
        pytest.approx(sigma)
    )
    assert worst_probability(p_a, radius, b) == pytest.approx(0.5, abs=2e-4)
    assert worst_probability(p_a, 0.9 * radius, b) > 0.5
    assert noise.probability(radius) == pytest.approx(p_a, rel=1e-12)


def test_the_laplace_probability_never_gives_less_than_the_radius():
    for sigma in (0.12, 0.25, 1.0):
        noise = build("noises", "laplace", sigma=sigma)
        for radius in np.linspace(0, 12 * sigma, 997).tolist():
            p = noise.probability(radius)
            assert noise.radius(p, 1 - p) >= radius


def test_what_the_laplace_radius_refuses():
    noise = build("noises", "laplace", sigma=1)
    assert noise.radius(0.4, 0.6) == 0
    assert noise.radius(0.3, 0.1) == pytest.approx(max(np.log(3) / 2, -np.log(0.8)) / 2**0.5)
    assert noise.probability(0) == 0.5
    for p_a, p_b in ((1, 0.5), (0.5, 0), (1.1, 0), (float("nan"), 0.1)):
        with pytest.raises(InputError):
            noise.radius(p_a, p_b)
    for radius in (-1, float("inf"), float("nan")):
        with pytest.raises(InputError):
            noise.probability(radius)


@pytest.mark.parametrize("bound", ["hoeffding", "bernstein"])
def test_the_bound_of_the_certifier_holds(bound):
    """The bound exceeds the truth in at most alpha of all runs; summed exactly over all counts."""
    from scipy.stats import binom

    n, alpha = 500, 0.05
    certifier = build("certifiers", "concentration", bound=bound, n=n, alpha=alpha)
    for p in (0.5, 0.7, 0.9, 0.97, 0.995):
        wrong = [hits for hits in range(n + 1) if certifier.lower(hits, n) > p]
        assert binom.pmf(wrong, n, p).sum() <= alpha
    sample = np.repeat([1.0, 0.0], [450, 50])
    least = {  # Hoeffding 1963, theorem 1; Maurer & Pontil 2009, theorem 4
        "hoeffding": sample.mean() - np.sqrt(-np.log(alpha) / 2 / n),
        "bernstein": sample.mean()
        - sample.std(ddof=1) * np.sqrt(2 * np.log(2 / alpha) / n)
        - 7 * np.log(2 / alpha) / 3 / (n - 1),
    }
    assert certifier.lower(450, n) == pytest.approx(least[bound], rel=1e-12)
    assert certifier.largest_p_a(n) == certifier.lower(n, n) == max(certifier.lower(hits, n) for hits in range(n + 1))
    assert certifier.plan(np.array([1, 5, 2]), Question(3)) == Plan(1, (n,))
    assert certifier.decide(np.array([0, n, 0]), n, Plan(1, (n,))).predict == 1
    assert certifier.decide(np.array([n, 0, 0]), n, Plan(1, (n,))).predict == ABSTAIN


def test_an_n_that_can_prove_nothing_is_refused(files, trained):
    result = run(files, "certify", trained, "--certifier", "concentration", "--n", "5", "--out", trained / "no.tsv", "-q")
    assert result.exit_code == 2
    assert "n is 5" in result.output
    assert not (trained / "no.tsv").exists()


def test_weight_decay_spares_vectors():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = build("optimizers", "adamw", lr=0.1).build(model)
    assert [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups] == [(0.05, 1), (0.0, 3)]


def test_the_schedule_at_its_corners():
    schedule = build("schedules", "half-cosine", warmup=2)
    assert [schedule.factor(epoch, 10) for epoch in (0, 1, 2, 6, 10)] == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_the_log_drops_epochs_of_a_killed_run(tmp_path):
    at = lambda epoch: SimpleNamespace(folder=tmp_path, epoch=epoch)  # noqa: E731
    logger = build("loggers", "csv")
    first = logger.open(at(0))
    for epoch in (1, 2, 3):
        first.write({"epoch": epoch, "loss": 1 / epoch})
    first.close()
    again = logger.open(at(1))
    again.write({"epoch": 2, "loss": 0.25, "more": 7})
    assert (tmp_path / "metrics.csv").read_text() == "epoch,loss\n1,1.0\n2,0.25\n"


def test_the_average_goes_on_after_a_checkpoint():
    model = nn.Linear(2, 1)
    ema, state, run = build("callbacks", "averaging", decay=0.5), {}, SimpleNamespace(model=model)
    with torch.no_grad():
        model.weight.fill_(0)
        ema.begin(run, state)
        for value in (1.0, 2.0):
            model.weight.fill_(value)
            ema.after_step(run, state)
            state = {name: kept.clone() for name, kept in state.items()}
            ema.begin(run, state)
        assert state["weight"].tolist() == [[1.25, 1.25]]
        assert model.weight.tolist() == [[2.0, 2.0]]
        ema.end(run, state)
    assert model.weight.tolist() == [[1.25, 1.25]]


def test_the_data_set_has_the_images_that_it_announces():
    data = build("datasets", "breast-cancer")
    spec = data.spec(Path())
    for split, images in spec.sizes.items():
        loaded = data.load(split, Path())
        assert loaded.images.shape == (images, *spec.shape)
        assert loaded.images.dtype == np.uint8
        assert set(loaded.labels) == set(range(len(spec.class_names)))
    with pytest.raises(InputError, match="no split"):
        data.load("validation", Path())


# --- the README's example ----------------------------------------------------------------------------------------------------


def test_the_readme_example_trains_as_it_stands(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^(    from pydantic import Field\n(?:    .*\n|\n)+?)(?=\S)", readme, re.M)
    path = tmp_path / "my_loss.py"
    path.write_text(textwrap.dedent(block), encoding="utf-8")
    words = ["--preset", "digits-gaussian-0.25", "--set", "loss.name=brier", "--set", "epochs=1", "--out", tmp_path / "run"]
    result = run([path], "train", *words, "-q")
    assert result.exit_code == 0, result.output
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert 0 < line["brier"] < 1  # 0.9 for a network that knows nothing
    assert re.search(r'^    brier = "my_package:Brier"$', readme, re.M)


# --- an architecture made of others ------------------------------------------------------------------------------------------


def test_a_mirrored_network_answers_alike_for_mirror_images():
    mirrored = build("architectures", "mirrored", network={"name": "mlp", "hidden": 3})
    spec = installed().build("datasets", {"name": "breast-cancer"}).spec(Path())
    network = build_classifier(mirrored, spec).eval()
    images = torch.rand(4, *spec.shape)
    assert torch.allclose(network(images), network(images.flip(-1)))
    inner = network.network.inner
    assert torch.allclose(network(images), (inner(images) + inner(images.flip(-1))) / 2)
    assert resolve(sets=["arch.name=mirrored", "arch.network=mlp", *(f"{key}={value}" for key, value in PLAIN.items())])
