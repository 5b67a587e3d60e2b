"""Packages of other people, really installed with pip: one that works, one that breaks, one that takes a name twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rscli.cli.app import app
from rscli.models.modelfile import load_model
from rscli.registry import installed
from support import process

pytestmark = [pytest.mark.slow, pytest.mark.install]

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "{version}"

[tool.setuptools]
py-modules = {modules}
"""

BRIER = '''
from pydantic import Field
from rscli.api import NoisyLoss


class Brier(NoisyLoss):
    """Brier score, averaged over the noisy copies."""

    weight: float = Field(1.0, ge=0, description="factor of the score")

    def terms(self, logits, labels):  # logits: (m, batch, classes), labels: (batch,)
        from torch.nn.functional import one_hot

        target = one_hot(labels, logits.shape[-1])
        return {"brier": self.weight * (logits.softmax(-1) - target).square().sum(-1).mean()}
'''

ODD = '''
from rscli.api import Architecture


class Linear(Architecture):
    """One linear layer."""

    def build(self, spec, *, weights=True):
        from math import prod

        from torch import nn

        return nn.Sequential(nn.Flatten(), nn.Linear(prod(spec.shape), len(spec.class_names)))
'''

MOODY = '''
from rscli.api import Dataset


class Moody(Dataset):
    """A data set that fails when it is looked for."""

    def check(self, root):
        raise KeyError("no mood")
'''

TWIN = '''
from pydantic import Field
from rscli.api import NoisyLoss


class Consistency(NoisyLoss):
    """Another one of this name."""

    strength: float = Field(3.0, ge=0, description="a field of its own")

    def terms(self, logits, labels):
        return {"zero": logits.sum() * 0}
'''


def package(folder: Path, name: str, version: str, modules: dict[str, str], points: dict[str, dict[str, str]]) -> Path:
    """Writes a package as its author would: modules, and entry points in a pyproject."""
    folder.mkdir(parents=True)
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    text = PYPROJECT.format(name=name, version=version, modules=list(modules))
    for kind, found in points.items():
        text += f'\n[project.entry-points."rscli.{kind}"]\n' + "".join(f'{key} = "{target}"\n' for key, target in found.items())
    (folder / "pyproject.toml").write_text(text)
    return folder


def pip_install(target: Path, *packages: Path) -> Path:
    how = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *how, "--target", str(target), *map(str, packages)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def brier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package with one loss is installed."""
    source = tmp_path_factory.mktemp("source") / "brier"
    package(source, "their-brier", "0.3", {"their_brier": BRIER}, {"losses": {"brier": "their_brier:Brier"}})
    return pip_install(tmp_path_factory.mktemp("brier"), source)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where three more are installed: plugins that break, an architecture, and a loss of a name that core has."""
    source = tmp_path_factory.mktemp("source")
    crashing = {"crashing": 'raise RuntimeError("no licence found")\n', "quitting": "import sys\n\nsys.exit(3)\n"}
    crashing["moody"] = MOODY
    points = {"losses": {"crashing": "crashing:Loss", "quitting": "quitting:Loss"}, "datasets": {"moody": "moody:Moody"}}
    return pip_install(
        tmp_path_factory.mktemp("others"),
        package(source / "broken", "their-broken", "2.0", crashing, points),
        package(source / "odd", "their-odd", "1.1", {"odd": ODD}, {"architectures": {"linear": "odd:Linear"}}),
        package(source / "twin", "their-twin", "4.5", {"twin": TWIN}, {"losses": {"consistency": "twin:Consistency"}}),
    )


def rscli(*arguments: object, packages: tuple[Path, ...] = (), cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A process of its own that sees these packages besides what is installed."""
    folder = cwd or packages[0].parent  # not the checkout, whose folders Python would find first
    return process(*arguments, cwd=folder, path=packages)


def refused(done: subprocess.CompletedProcess[str], *said: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for text in said:
        assert text in done.stderr


@pytest.fixture(scope="module")
def trained(brier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the package's loss trained."""
    out = tmp_path_factory.mktemp("trained")
    sets = ["--set", "loss.name=brier", "--set", "loss.weight=2", "--set", "epochs=1", "--set", "batch=32"]
    done = rscli("train", "--preset", "digits-gaussian-0.25", *sets, "--out", out, "--json", packages=(brier,), cwd=out)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == str(out / "model.safetensors")
    return out


def test_a_loss_of_another_package_trains(trained):
    (line,) = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert line["loss"] == pytest.approx(line["brier"], rel=1e-5)
    assert 0 < line["brier"] < 2 * 2, "weight 2 times a score between 0 and 2"
    config = json.loads((trained / "config.json").read_text())
    assert config["config"]["loss"] == {"name": "brier", "m": 1, "weight": 2.0}


def test_the_model_file_says_which_package_the_loss_came_from(trained):
    plugins = load_model(trained / "model.safetensors").source.card.plugins
    assert {"kind": "losses", "name": "brier", "package": "their-brier", "version": "0.3"} in plugins


def test_the_model_certifies_when_the_package_of_its_loss_is_gone(trained):
    """Here, in this process, it never was."""
    assert "brier" not in {entry.name for entry in installed().entries("losses")}
    result = CliRunner().invoke(app, ["certify", str(trained), "--n", "50", "--max", "3", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["images"] == 3


def test_a_model_whose_architecture_is_gone_names_the_package(others, tmp_path):
    sets = ["--set", "arch.name=linear", "--set", "epochs=1"]
    done = rscli("train", "--preset", "digits-gaussian-0.25", *sets, "--out", tmp_path, packages=(others,), cwd=tmp_path)
    assert done.returncode == 0, done.stderr  # and the broken packages beside it did no harm
    result = CliRunner().invoke(app, ["certify", str(tmp_path), "--n", "50", "--max", "3"])
    assert result.exit_code == 2
    for text in ("architectures plugin", "linear", "their-odd 1.1", "pip install their-odd"):
        assert text in result.stderr
    assert not (tmp_path / "results.tsv").exists()


def test_broken_plugins_are_marked_and_the_listing_goes_on(others, brier):
    done = rscli("plugins", packages=(others, brier))
    assert done.returncode == 0, done.stderr
    (crashing,) = [line for line in done.stdout.splitlines() if "crashing " in line]
    (quitting,) = [line for line in done.stdout.splitlines() if "quitting " in line]
    for line, cause in ((crashing, "RuntimeError: no licence found"), (quitting, "SystemExit: 3")):
        assert "their-broken" in line
        assert "broken: " in line
        assert cause in line
    (working,) = [line for line in done.stdout.splitlines() if "their-brier" in line]
    assert working.split(maxsplit=4) == ["losses", "brier", "their-brier", "0.3", working.split(maxsplit=4)[4]]
    assert "Brier score, averaged over the noisy copies" in working
    assert "rscli" in done.stdout
    assert sum("consistency" in line.split()[:2] for line in done.stdout.splitlines()) == 2


def test_the_listing_as_json(others):
    done = rscli("plugins", "--json", packages=(others,))
    assert done.returncode == 0, done.stderr
    rows = {(row["kind"], row["name"], row["package"]): row for row in json.loads(done.stdout)}
    broken = rows["losses", "crashing", "their-broken"]
    assert broken["version"] == "2.0"
    assert broken["description"] is None
    for text in ("their-broken 2.0", "crashing:Loss", "RuntimeError: no licence found"):
        assert text in broken["error"]
    assert "SystemExit: 3" in rows["losses", "quitting", "their-broken"]["error"]
    assert {key for key, row in rows.items() if row["error"]} == {
        ("losses", "crashing", "their-broken"),
        ("losses", "quitting", "their-broken"),
    }


@pytest.mark.parametrize(
    ("name", "target", "cause"),
    [("crashing", "crashing:Loss", "RuntimeError: no licence found"), ("quitting", "quitting:Loss", "SystemExit: 3")],
)
def test_a_broken_plugin_breaks_its_own_use(others, name, target, cause):
    done = rscli("plugins", "info", "losses", name, packages=(others,))
    refused(done, f"losses plugin '{name}'", "their-broken 2.0", target, cause, "pip install --upgrade their-broken")


def test_training_with_a_broken_plugin_is_refused(others):
    done = rscli("train", "--preset", "digits-gaussian-0.25", "--set", "loss.name=quitting", packages=(others,))
    refused(done, "quitting", "their-broken 2.0", "quitting:Loss", "SystemExit: 3")
    assert not (others.parent / "runs").exists()


def test_the_doctor_names_what_is_broken_and_goes_on(others):
    done = rscli("doctor", "--json", packages=(others,))
    assert done.returncode == 0, done.stderr
    findings = [finding for found in json.loads(done.stdout).values() for finding in found]
    for text in ("RuntimeError: no licence found", "SystemExit: 3", "KeyError: 'no mood'"):
        (broken,) = [finding for finding in findings if text in finding["text"]]
        assert not broken["ok"]
        assert "their-broken 2.0" in broken["text"]
    assert any("digits comes with scikit-learn" in finding["text"] for finding in findings)


def test_the_fields_of_a_package_are_shown_like_those_of_core(brier):
    done = rscli("plugins", "info", "losses", "brier", "--json", packages=(brier,))
    shown = json.loads(done.stdout)
    assert (shown["package"], shown["version"]) == ("their-brier", "0.3")
    (weight,) = [field for field in shown["fields"] if field["name"] == "weight"]
    assert (weight["default"], weight["bounds"], weight["description"]) == (1.0, ">= 0", "factor of the score")


def test_a_name_that_two_packages_have_is_ambiguous(others):
    done = rscli("plugins", "info", "losses", "consistency", packages=(others,))
    refused(done, "two packages provide", "their-twin 4.5", "their-twin:consistency", "rscli:consistency")


@pytest.mark.parametrize(("package", "field"), [("their-twin", "strength"), ("rscli", "lbd")])
def test_a_package_in_front_of_the_name_chooses(others, package, field):
    done = rscli("plugins", "info", "losses", f"{package}:consistency", "--json", packages=(others,))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["package"] == package
    assert field in {each["name"] for each in json.loads(done.stdout)["fields"]}


def test_an_ambiguous_name_in_a_configuration_is_refused_and_a_chosen_one_taken(others):
    plain = rscli("train", "--preset", "digits-cons-0.25", "--dry-run", packages=(others,))
    refused(plain, "loss.name", "two packages provide", "their-twin:consistency")
    sets = ["--set", "loss.name=their-twin:consistency"]
    chosen = rscli("train", "--preset", "digits-gaussian-0.25", *sets, "--dry-run", "--json", packages=(others,))
    assert chosen.returncode == 0, chosen.stderr
    assert json.loads(chosen.stdout)["config"]["loss"]["strength"] == 3.0


def test_a_misspelt_name_suggests_that_of_a_package(brier):
    done = rscli("plugins", "info", "losses", "brierr", packages=(brier,))
    refused(done, "no installed package provides the losses plugin 'brierr'", "Did you mean 'brier'?")
