"""The program knows no core plugin by its name: what it uses where none is named, the core plugins announce themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from rscli.registry import installed
from support import ROOT

NAMES = {entry.name for entry in installed().entries() if entry.package == "rscli" and entry.kind != "presets"}
WORDS = {"step", "checkpoint", "digits", "ensemble", "linear", "cosine"}
"""Names that are words of the program too; a plugin called so is not meant by them."""

LIBRARIES = {("rscli/runtime/devices.py", "timm"), ("rscli/runtime/devices.py", "torchvision")}
"""Where a name is that of a Python library."""


def texts(node: ast.AST) -> Iterator[ast.Constant]:
    """Every text of a module that is no docstring and no help."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        if isinstance(child, ast.keyword) and child.arg in ("help", "description"):
            continue
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child
        yield from texts(child)


def named(path: Path) -> list[str]:
    found = []
    for text in texts(ast.parse(path.read_text(encoding="utf-8"))):
        name = text.value.partition("/")[0]
        if name in NAMES - WORDS and (path.relative_to(ROOT).as_posix(), name) not in LIBRARIES:
            found.append(f"line {text.lineno}: {text.value!r}")
    return found


def test_there_are_names_to_look_for():
    assert {"gaussian", "cohen", "sequential", "lenet", "timm", "sgd", "jsonl"} <= NAMES


@pytest.mark.parametrize("path", sorted((ROOT / "rscli").rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_names_a_core_plugin(path):
    assert named(path) == []


def test_the_test_sees_a_name(tmp_path):
    path = ROOT / "rscli" / "unwritten.py"
    tree = ast.parse('"""gaussian"""\nx = "gaussian"\nf(help="cohen")\ny = {"name": "timm/resnet18"}\n')
    assert [text.value for text in texts(tree) if text.value.partition("/")[0] in NAMES] == ["gaussian", "timm/resnet18"]
    assert not path.exists()
