"""bench/import_map.py: arrows, late ones and circles of made-up packages, and the map of this one."""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys
from pathlib import Path

import pytest

from support import ROOT


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("import_map", ROOT / "bench" / "import_map.py")
    module = sys.modules["import_map"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["import_map"]


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in {"__init__.py": "", **files}.items():
        path = folder / "rscli" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_arrows_between_files_and_rooms(tool, tmp_path, capsys):
    written(
        tmp_path,
        {
            "errors.py": "import os",
            "low/__init__.py": "",
            "low/a.py": "from rscli import errors\nfrom rscli.low import b",
            "low/b.py": "import rscli.errors",
            "high/__init__.py": "from rscli import __version__",
            "high/c.py": "from rscli.low.a import thing\ndef f():\n    from rscli.low.b import other",
        },
    )
    tool.main(["--root", str(tmp_path), "--files", "--out", str(tmp_path / "map.svg")])
    shown = capsys.readouterr().out
    assert "high.c -> low.b (late)" in shown
    assert "high.c -> low.a\n" in shown
    assert "3 arrows" not in shown
    assert "2 arrows between rooms, 5 between files" in shown
    assert "circles of rooms: none" in shown
    assert (tmp_path / "map.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("late", "said"),
    [
        ("from rscli.one import a", "one <-> two\n"),
        ("def f():\n    import rscli.one.a", "one <-> two (with late arrows)\n"),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rscli.one import a",
            "one <-> two (with late arrows)\n",
        ),
    ],
)
def test_circles_are_found_and_late_ones_told_apart(tool, tmp_path, capsys, late, said):
    files = {"one/__init__.py": "", "one/a.py": "from rscli.two.b import x", "two/__init__.py": "", "two/b.py": late}
    tool.main(["--root", str(written(tmp_path, files))])
    assert f"circles of rooms: {said}" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(30))
def test_circles_of_random_graphs(tool, seed):
    """Against reachability, computed by Warshall's algorithm."""
    chance = random.Random(seed)
    names = "abcdefgh"
    pairs = [pair for pair in itertools.permutations(names, 2) if chance.random() < 0.15]
    reach = set(pairs)
    for middle, here, there in itertools.product(names, repeat=3):
        if (here, middle) in reach and (middle, there) in reach:
            reach.add((here, there))
    groups = {tuple(sorted({a, *(b for b in names if (a, b) in reach and (b, a) in reach)})) for a in names}
    assert tool.circles(pairs) == sorted(list(group) for group in groups if len(group) > 1)


def test_an_other_folder_is_refused(tool, tmp_path):
    with pytest.raises(SystemExit, match="must be a checkout"):
        tool.main(["--root", str(tmp_path)])


def test_there_is_no_circle_of_rooms_here(tool, capsys):
    tool.main([])
    assert "circles of rooms: none" in capsys.readouterr().out
