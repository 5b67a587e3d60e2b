"""Plugins from a file that the user names: which classes are found, what is recorded, and that nothing else makes code run."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rscli.cli.app import app
from rscli.errors import InputError, PluginError
from rscli.models.modelfile import load_model
from rscli.plugin_files import load_plugin_file
from rscli.registry import installed
from support import ROOT, forget_plugins

pytestmark = pytest.mark.usefixtures("plugins_forgotten")

PARTS = '''
from math import prod

from pydantic import Field
from rscli.api import ABSTAIN, Architecture, Certifier, Decision, Loss, NoisyLoss, Plan


class JSDivergence(NoisyLoss):
    """Cross-entropy, and half the squared distance of the copies from their mean."""

    m: int = Field(2, ge=2, description="noisy copies")

    def terms(self, logits, labels):
        from torch.nn.functional import cross_entropy

        p = logits.softmax(-1)
        ce = cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))
        return {"ce": ce, "spread": (p - p.mean(0)).square().sum(-1).mean()}


class FlatNet(Architecture):
    """One linear layer."""

    def build(self, spec, *, weights=True):
        from torch import nn

        return nn.Sequential(nn.Flatten(), nn.Linear(prod(spec.shape), len(spec.class_names)))


class Majority(Certifier):
    """Says the class of most samples, and certifies nothing about the radius."""

    def plan(self, counts, question):
        return Plan(int(counts.argmax()), (self.n,))

    def decide(self, counts, n, plan):
        return Decision(plan.candidate, 0.5, 0.5, "vote")


class _Hidden(Loss):
    """Not to be found."""
'''


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "my_parts.py"
    path.write_text(PARTS)
    return path


def run(*words: object):
    result = CliRunner().invoke(app, [str(word) for word in words])
    forget_plugins()  # the next command is another process
    return result


def test_every_class_of_the_file_is_known_by_its_name_in_kebab_case(file):
    found = load_plugin_file(file)
    digest = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    assert [(entry.kind, entry.name, entry.package, entry.version) for entry in found] == [
        ("losses", "js-divergence", "my_parts.py", digest),
        ("architectures", "flat-net", "my_parts.py", digest),
        ("certifiers", "majority", "my_parts.py", digest),
    ]
    assert installed().load("losses", "js-divergence").__name__ == "JSDivergence"
    assert installed().load("losses", "my_parts.py:js-divergence").__name__ == "JSDivergence"


def test_a_name_that_a_package_has_too_is_solved_as_between_packages(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(PARTS.replace("JSDivergence", "Consistency"))
    load_plugin_file(path)
    with pytest.raises(PluginError, match="two packages provide"):
        installed().load("losses", "consistency")
    assert installed().load("losses", "mine.py:consistency").__module__.startswith("rscli_plugin_file_")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    {
        "no-such-file": ("none.py", None, "must be a Python file"),
        "another-ending": ("loss.txt", PARTS, "must be a Python file"),
        "no-plugin": ("empty.py", "x = 1\nfrom rscli.api import NoisyLoss\n", "defines no plugin"),
        "syntax": ("torn.py", "x = 1\nclass (\n", "line 2 fails to run: SyntaxError"),
        "raises": ("sad.py", "x = 1\n\nraise KeyError('y')\n", "line 3 fails to run: KeyError: 'y'"),
        "exits": ("exit.py", "raise SystemExit(3)\n", "line 1 fails to run: SystemExit: 3"),
        "older-contract": (
            "old.py",
            PARTS.replace("m: int", "api_version = 1\n    m: int"),
            "written for version 1 of rscli.api",
        ),
        "newer-contract": (
            "new.py",
            PARTS.replace("m: int", "api_version = 3\n    m: int"),
            "written for version 3 of rscli.api",
        ),
        "missing-import": ("needs.py", "import no_such_package\n", "line 1 fails to run: ModuleNotFoundError"),
    }.values(),
)
def test_a_file_that_cannot_be_used_is_one_message(tmp_path, name, text, said):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises((InputError, PluginError), match="plugin") as caught:
        load_plugin_file(path)
    assert said in caught.value.message
    result = run("plugins", "--plugin", path)
    assert result.exit_code == 2 or caught.value.exit_code == 2


def test_train_certify_and_predict_with_one_file(file, tmp_path):
    """The network comes from the file, so every later command must be given it, and the very same one."""
    words = [
        "--set",
        "arch.name=flat-net",
        "--set",
        "loss.name=js-divergence",
        "--set",
        "epochs=1",
        "--set",
        "optimizer.lr=0.1",
    ]
    trained = run("train", "--preset", "digits-gaussian-0.25", *words, "--plugin", file, "--out", tmp_path / "run", "-q")
    assert trained.exit_code == 0, trained.output
    load_plugin_file(file)
    digest = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    recorded = load_model(tmp_path / "run/model.safetensors").source.card.plugins
    assert [p["version"] for p in recorded if p["package"] == "my_parts.py"] == [digest, digest]
    assert json.loads((tmp_path / "run/config.json").read_text())["plugin_files"] == {"my_parts.py": digest}
    forget_plugins()

    certify = ["certify", tmp_path / "run", "--n", "100", "--max", "3", "--certifier", "majority", "-q"]
    assert run(*certify, "--plugin", file).exit_code == 0
    predicted = run("predict", tmp_path / "run", ROOT / "examples/digits", "--plugin", file, "-q", "--json")
    assert predicted.exit_code == 0

    without = run("certify", tmp_path / "run", "--n", "100", "--max", "3", "--out", tmp_path / "other.tsv")
    assert without.exit_code == 2
    assert "my_parts.py" in without.stderr
    assert digest in without.stderr.replace("\n", "")
    assert "--plugin" in without.stderr
    file.write_text(PARTS + "\n# changed\n")
    changed = run("certify", tmp_path / "run", "--n", "100", "--max", "3", "--out", tmp_path / "other.tsv", "--plugin", file)
    assert changed.exit_code == 2
    assert "a different one" in changed.stderr
    assert not list(tmp_path.glob("other*"))


def test_a_run_goes_on_with_the_same_file_only(file, tmp_path):
    words = ["train", "--preset", "digits-gaussian-0.25", "--set", "loss.name=js-divergence", "--set", "epochs=1", "-q"]
    words += ["--out", tmp_path / "run", "--plugin", file]
    assert run(*words).exit_code == 0
    assert run(*words, "--resume").exit_code == 0
    file.write_text(PARTS + "\n# changed\n")
    result = run(*words, "--resume")
    assert result.exit_code == 2
    assert "my_parts.py" in result.stderr


@pytest.mark.slow
def test_under_torchrun_every_process_has_it(file, tmp_path):
    trained = run("train", "--preset", "digits-gaussian-0.25", "--set", "epochs=1", "--out", tmp_path / "run", "-q")
    assert trained.exit_code == 0, trained.output
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617", "-m", "--"]
    words = [
        "rscli",
        "certify",
        tmp_path / "run",
        "--n",
        "200",
        "--max",
        "6",
        "--certifier",
        "majority",
        "--plugin",
        file,
        "-q",
    ]
    done = subprocess.run([*launcher, *map(str, words)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run/results.tsv").read_text().splitlines()
    assert len(lines) == 7
    assert all("\tvote\t" in line for line in lines[1:])
