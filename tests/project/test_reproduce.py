"""docs/reproduce.md: every command in it is one that works, and every figure is the published one of what stands beside it."""

from __future__ import annotations

import csv
import re
import shlex
from itertools import pairwise

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from rscli.cli.app import app
from rscli.config.layers import resolve
from rscli.config.presets import list_presets, load_preset, published_for
from rscli.report.recipe import ATTACK, Recipe, schedule, setting_differences
from rscli.report.shelf import read_shelf
from support import ROOT

TEXT = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
SIGMAS = ("0.25", "0.5", "1.0")
SHIPPED = {preset.name for preset in list_presets() if preset.package == "rscli" and not preset.name.startswith("digits")}

FOUND = re.findall(r"^    (rscli .+)$", TEXT, re.M) + re.findall(r"`(rscli [^`]+)`", TEXT)
COMMANDS = [
    text.replace("NAME", "mnist-cons-0.5").replace("SIGMA", sigma)
    for text in FOUND
    for sigma in (SIGMAS if "SIGMA" in text else SIGMAS[:1])
]
TABLE = [line.strip("|").split("|") for line in TEXT.splitlines() if line.startswith("| `")]
ABLATIONS = [line.strip("|").split("|")[1:] for line in TEXT.splitlines() if re.match(r"\| [^|]+ \| `rscli ", line)]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_works(command, tmp_path):
    """`train` as a dry run; of the others, which need a trained model, the words."""
    name, *words = shlex.split(command)[1:]
    if name == "train":
        result = CliRunner().invoke(app, [name, *words, *(() if "--dry-run" in words else ["--dry-run"])])
        assert result.exit_code == 0, result.output
        assert "steps per epoch" in result.stdout
    elif name == "presets":
        assert CliRunner().invoke(app, [name, *words]).exit_code == 0
    else:
        typer.main.get_command(app).commands[name].make_context(name, words)  # raises for a word that is none
    assert list(tmp_path.iterdir()) == []


def test_the_options_that_the_text_names_exist():
    options = {
        option
        for command in typer.main.get_command(app).commands.values()
        for each in command.params
        for option in (*each.opts, *each.secondary_opts)
    }
    assert set(re.findall(r"--[a-z][a-z-]+", TEXT)) <= options


def test_every_preset_is_in_a_table_and_no_other():
    names = [name.strip(" `").split("`")[0] for name, *_ in TABLE]
    assert {name.replace("SIGMA", s) for name in names for s in (SIGMAS if "SIGMA" in name else SIGMAS[:1])} == SHIPPED


@pytest.mark.parametrize("row", TABLE, ids=[row[0].split("`")[1] for row in TABLE])
def test_every_figure_is_the_published_one(row):
    name = row[0].split("`")[1]
    for sigma, cell in zip(SIGMAS if "SIGMA" in name else SIGMAS[:1], row[1:], strict=True):
        published = published_for(name.replace("SIGMA", sigma))
        if published is None:
            wanted = "no row here"
        else:
            wanted = f"{published.acr:.4f}" + (f" ± {published.acr_sd:.4f}" if published.acr_sd is not None else "")
        assert cell.strip().rstrip("*") == wanted
        assert ("*" in cell) is (published is not None and published.images not in (500, 10_000))


def recipe_of(preset: str, sets: list[str]) -> Recipe:
    """What a run of `preset` with `sets` is held against: as a result file would tell it."""
    config = resolve(preset, sets=sets).as_dict()
    loss, attack = config["loss"], config["attack"] or {}
    row = load_preset(preset).header.published
    return Recipe(
        dataset=row.dataset,
        arch=row.arch,
        method=row.method,
        sigma=config["noise"]["sigma"],
        setting={**loss, **{theirs: attack[ours] for ours, theirs in ATTACK.items() if ours in attack}},
        schedule=schedule(config),
    )


@pytest.mark.parametrize(("command", "figures"), ABLATIONS, ids=[row[0].strip(" `") for row in ABLATIONS])
def test_every_figure_of_an_ablation_is_the_published_one(command, figures):
    """Found as `compare --published` finds it, and then without any difference in settings; or there is none, as is said."""
    shelf = read_shelf()
    words = shlex.split(command.strip(" `"))
    preset, sets = words[words.index("--preset") + 1], [b for a, b in pairwise(words) if a == "--set"]
    pairs = re.findall(r"(\d\.\d{4}) \((\w+) (\d+)\)", figures)
    assert bool(pairs) is bool(figures.strip())
    for acr, key, value in pairs:
        ours = recipe_of(preset, [*sets, f"loss.{key}={value}"])
        row = shelf.nearest(ours, np.arange(10_000))
        assert (f"{row.acr:.4f}", setting_differences(ours, row, shelf.schedule(row))) == (acr, ())
    if not pairs:
        if any(key.partition(".")[0] == "attack" for key in resolve(preset, sets=sets).overrides):
            return  # another method than the preset's: held against nothing
        ours = recipe_of(preset, sets)
        row = shelf.nearest(ours, np.arange(10_000))
        assert row is None or setting_differences(ours, row, shelf.schedule(row))


@pytest.mark.parametrize("name", ["published.csv", "published_mnist_subsets.csv"])
def test_the_tables_are_those_that_were_computed_from_the_logs(name, shared):
    ours, theirs = (list(csv.DictReader((folder / name).open(encoding="utf-8"))) for folder in (ROOT / "presets", shared))
    assert theirs
    about = {"dataset": "mnist", "arch": "lenet"}  # which the table of MNIST alone leaves out
    assert ours == [row if "dataset" in row else {**about, **row} for row in theirs]
