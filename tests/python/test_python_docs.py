"""docs/python.md: its blocks run one after the other, beside a run folder, and the guarantees that it gives hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import rscli
from rscli.cli.app import app
from rscli.errors import InputError
from rscli.registry import installed
from support import ROOT

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)

pytestmark = pytest.mark.slow


def run(*words: object) -> None:
    result = CliRunner().invoke(app, [*map(str, words), "-q"])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with `run` (a model and its results) and `again.tsv`, certified with another seed."""
    where = tmp_path_factory.mktemp("python")
    run("train", "--preset", "digits-gaussian-0.25", "--set", "epochs=1", "--out", where / "run")
    run("certify", where / "run", "--n", 500, "--max", 12)
    run("certify", where / "run", "--n", 500, "--max", 12, "--seed", 1, "--out", where / "again.tsv")
    return where


def test_the_blocks_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    namespace: dict = {}
    for block in BLOCKS:
        exec(compile(block, "docs/python.md", "exec"), namespace)
    assert [len(namespace[name]) for name in ("certificates", "decided", "accuracy", "bounded", "answers")] == [4] * 5
    assert {certificate.predict for certificate in namespace["accuracy"]} <= {-1, 1, 3, 4}
    assert namespace["comparison"].radii == (0.0, 0.25, 0.5)
    assert rscli.load("copy.safetensors").sigma == namespace["model"].sigma
    with pytest.raises(InputError, match="architecture plugin"):
        rscli.save(namespace["mine"], "mine.safetensors")
    assert not Path("mine.safetensors").exists()


def test_the_same_rows_as_the_command_whatever_the_order_and_the_batch(folder):
    rows = rscli.read_results(folder / "run")
    data = installed().build("datasets", {"name": "digits"}).load("test", Path())
    chosen = [7, 2, 11]
    for batch in (None, 64, 1000):
        found = rscli.load(folder / "run").certify(data.images[chosen], n=500, indices=chosen, batch=batch)
        assert [(c.index, c.predict, c.radius) for c in found] == [(i, rows.predict[i], rows.radius[i]) for i in chosen]
        assert [c.counts[c.candidate] for c in found] == rows.count[chosen].tolist()


def test_the_network_is_left_as_it_was(folder):
    model = rscli.load(folder / "run")
    model.network.train()
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    model.certify(torch.rand(2, 1, 28, 28), n=100)
    assert all(module.training for module in model.network.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.rand(2, 1, 28, 28) * 255, "pixels from"),
        (torch.full((1, 1, 28, 28), float("nan")), "pixels from nan"),
        (torch.rand(1, 28, 28), "has 2 dimensions"),
        (torch.rand(2, 1, 27, 28), "must have"),
        (torch.zeros(1, 1, 28, 28, dtype=torch.int64), "int64"),
        (["no-such-file.png"], "no-such-file.png"),
        ("no-such-file.png", "one path"),
    ],
)
def test_bad_images_are_answered_with_an_error_of_ours(folder, images, said):
    for ask in (rscli.load(folder / "run").certify, rscli.load(folder / "run").predict):
        with pytest.raises(InputError) as caught:
            ask(images, n=100)
        assert said in str(caught.value)
