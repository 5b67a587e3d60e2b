"""Docstrings: every public name has one, and whatever takes or gives arrays says their shapes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [
    ROOT / "rscli",
    ROOT / "plugins/rscli_core",
    ROOT / "plugins/rscli-smoothmix/rscli_smoothmix",
    ROOT / "plugins/rscli-catrs/rscli_catrs",
]
FILES = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]

ARRAYS = re.compile(r"\b(Tensor|NDArray|ndarray|Counts)\b")
"""What an annotation calls an array of numbers."""

_SIZE = r"(?:\.\.\.|\w+(?: [-+*/] \w+)*)"
SHAPE = re.compile(rf"\({_SIZE}(?:,|(?:,\s+{_SIZE})+)\)|\bscalars?\b|\bany shape\b")
"""What tells a shape: `(batch, classes)` or `(n,)`, a scalar, or that any will do."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(node: ast.AST, name: str = "") -> Iterator[tuple[str, Definition]]:
    """Every public class, method and function below `node`, by its dotted name; what is inside functions is private."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition) and not child.name.startswith("_") and not is_overload(child):
            dotted = f"{name}.{child.name}".lstrip(".")
            yield dotted, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, dotted)
        elif isinstance(child, ast.If | ast.Try):
            yield from public(child, name)


def is_overload(node: Definition) -> bool:
    """Whether it only declares a signature."""
    return any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)


def without_docstring(source: str) -> list[str]:
    """The public names in `source` that have no docstring."""
    return [name for name, node in public(ast.parse(source)) if not ast.get_docstring(node)]


def without_shape(source: str) -> list[str]:
    """The public functions in `source` that take or give an array, and whose docstring names no shape."""
    found = []
    for name, node in public(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        annotations = [node.returns, *(argument.annotation for argument in arguments if argument)]
        takes_arrays = any(ARRAYS.search(ast.unparse(annotation)) for annotation in annotations if annotation)
        if takes_arrays and not SHAPE.search(ast.get_docstring(node) or ""):
            found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_name_has_a_docstring(path):
    source = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)) is not None or not source.strip()
    assert without_docstring(source) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_function_of_arrays_names_a_shape(path):
    assert without_shape(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("The logits (batch, classes).", True),
        ("`counts` (classes,) int64", True),
        ("images (..., channel, height, width)", True),
        ("a scalar with gradients", True),
        ("noise of any shape", True),
        ("The logits of a batch.", False),
        ("Raises (if wrong) an error (see below, and above it).", False),
        ("SGD (Robbins and Monro 1951)", False),
    ],
)
def test_what_counts_as_a_shape(text, told):
    assert without_shape(f'def f(x: Tensor):\n    """{text}"""\n') == ([] if told else ["f"])


def test_what_lacks_a_docstring_is_found():
    source = "class A:\n    '''A.'''\n    def f(self): ...\n    def _g(self): ...\nif True:\n    def h(): ...\n"
    assert without_docstring(source) == ["A.f", "h"]
