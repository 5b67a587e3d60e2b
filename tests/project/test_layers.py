"""Who may import whom, and who must not import what is slow: read from the source, nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT

PROGRAM = sorted((ROOT / "rscli").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins" / "rscli_core").rglob("*.py"))
TORCH = {"python", "runtime", "data", "models", "results", "sampling", "smoothing", "training", "doctor"}
SLOW = {"torch", "timm", "torchvision", "sklearn", "matplotlib", "pandas"}

ORDER = (
    "errors", "text", "image_files", "api", "stats", "distributions", "registry", "plugin_files", "plugin_trial", "config",
    "runtime", "data", "models", "results", "sampling", "smoothing", "training", "doctor", "report", "python", "cli",
)  # fmt: skip
MAY_IMPORT = {layer: set(ORDER[:place]) for place, layer in enumerate(ORDER)}
MAY_IMPORT |= {
    "api": {"errors", "image_files"},
    "distributions": set(),
    "cli": set(ORDER) - {"python"},
    "report": set(ORDER[: ORDER.index("training")]),
    "__main__": {"cli"},
    "__init__": {"python"},
}
"""The layers, lowest first; each may import itself and those before it, but for the exceptions here.

`api` is what plugins import, and knows nothing else of rscli but the rule of what an image file is, which it hands on."""


def imports(tree: ast.AST, *, module_level: bool) -> Iterator[str]:
    """The dotted names that a file imports; those under TYPE_CHECKING, too, unless only the `module_level` is asked for."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (module_level and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _types_only(node))):
            yield from imports(node, module_level=module_level)


def _types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def names(path: Path, *, module_level: bool = False) -> list[str]:
    return list(imports(ast.parse(path.read_text(encoding="utf-8")), module_level=module_level))


def layer(path: Path) -> str:
    part = path.relative_to(ROOT / "rscli").parts[0]
    return part.removesuffix(".py")


def identify(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_layer_is_known():
    assert {layer(path) for path in PROGRAM} == set(MAY_IMPORT)
    assert len(PROGRAM) > 30
    assert len(PLUGINS) > 20


def test_the_reader_of_imports_sees_every_form():
    source = """
import torch.nn
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from torch import Tensor
try:
    import timm
except ImportError:
    pass
class A:
    import matplotlib
    def b(self):
        from rscli import models
"""
    tree = ast.parse(source)
    assert [*imports(tree, module_level=True)] == ["torch.nn", "typing.TYPE_CHECKING", "timm", "matplotlib"]
    assert {"torch.Tensor", "rscli.models"} <= {*imports(tree, module_level=False)}


@pytest.mark.parametrize("path", PROGRAM, ids=identify)
def test_a_layer_imports_only_layers_below(path):
    here = layer(path)
    for name in names(path):
        top, *rest = name.split(".")
        assert top not in ("rscli_core", "rscli_presets"), f"{identify(path)} imports {name}; plugins are found, not imported"
        if top == "rscli" and rest and rest[0] != "__version__":
            assert rest[0] in MAY_IMPORT[here] | {here}, f"{identify(path)} ({here}) imports {name}"


@pytest.mark.parametrize("path", PLUGINS, ids=identify)
def test_core_plugins_import_what_any_plugin_may(path):
    for name in names(path):
        top, *rest = name.split(".")
        if top == "rscli":
            assert rest[0] in ("api", "errors", "stats"), f"{identify(path)} imports {name}"


@pytest.mark.parametrize("path", PLUGINS, ids=identify)
def test_listing_plugins_imports_nothing_slow(path):
    if path.parent.name == "architectures" and path.name.startswith("_"):
        return  # the networks themselves, imported by `build`
    slow = [name for name in names(path, module_level=True) if name.split(".")[0] in SLOW or name.startswith("scipy.stats")]
    assert slow == []


@pytest.mark.parametrize("path", [p for p in PLUGINS if p.parent.name == "architectures"], ids=identify)
def test_networks_are_imported_when_they_are_built(path):
    """What an architecture has at its module level must not bring torch by way of its private module."""
    if not path.name.startswith("_"):
        assert [name for name in names(path, module_level=True) if name.startswith("rscli_core.architectures._")] == [
            name for name in names(path, module_level=True) if name.startswith("rscli_core.architectures._sizes")
        ]


@pytest.mark.parametrize("path", [p for p in PROGRAM if layer(p) not in TORCH], ids=identify)
def test_only_what_computes_imports_torch_at_once(path):
    slow = [name for name in names(path, module_level=True) if name.split(".")[0] in SLOW]
    assert slow == []
    if layer(path) in ("cli", "config", "registry"):
        reached = [
            n
            for n in names(path, module_level=True)
            if n.startswith((*(f"rscli.{name}" for name in TORCH), "rscli.report", "scipy"))
        ]
        assert reached == []


@pytest.mark.parametrize("path", [p for p in PROGRAM if layer(p) == "stats"], ids=identify)
def test_statistics_know_no_torch(path):
    assert not {name.split(".")[0] for name in names(path)} & SLOW
