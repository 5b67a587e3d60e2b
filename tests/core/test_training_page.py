"""docs/training.md: every command on the page is one that resolves, and the names in its table exist."""

from __future__ import annotations

import re
import shlex
import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import typer

from rscli.cli.app import app
from rscli.config.layers import resolve
from rscli.registry import installed

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
OPTIONS = {name for option in typer.main.get_command(app).commands["train"].params for name in option.opts}
COMMANDS = re.findall(r"^    (rscli train .*)$", PAGE, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_resolves(command, monkeypatch):
    for name in ("tensorboard", "wandb", "trackio"):  # as if the extras were installed
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    words = shlex.split(command, comments=True)
    assert {word for word in words if word.startswith("--")} <= OPTIONS
    sets = [value for word, value in pairwise(words) if word == "--set"]
    resolved = resolve(words[words.index("--preset") + 1], sets=sets)
    for text in sets:
        key, _, value = text.partition("=")
        assert value == "{}" or resolved.sources[key] == "--set"


def test_the_table_has_every_schedule():
    names = {entry.name for entry in installed().entries("schedules") if entry.package == "rscli"}
    assert set(re.findall(r"^\| `(\w+)`.*\|$", PAGE, re.M)) == names


def test_every_extra_that_is_named_exists():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"rscli\[(\w+)\]", PAGE))
    assert extras == {"tensorboard", "wandb", "trackio"}
    assert all(re.search(rf"^{extra} = \[", text, re.M) for extra in extras)
