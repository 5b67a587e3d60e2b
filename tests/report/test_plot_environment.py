"""Plots come out the same whatever MPLBACKEND, a matplotlibrc, and the names of results say."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest

from rscli.report.plot import save_plot
from rscli.report.summary import compare
from rscli.results.reader import read_results

ROWS = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t0\t0\t0.5\t1\t0:00:01\n1\t0\t0\t0.3\t1\t0:00:01\n"

SURROUNDINGS = {
    "notebook": ({"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, ""),
    "nonsense": ({"MPLBACKEND": "nonsense"}, ""),
    "no display": ({"MPLBACKEND": "TkAgg", "DISPLAY": ""}, ""),
    "usetex": ({}, "text.usetex: True\n"),
    "pgf": ({"MPLBACKEND": "pgf"}, "pgf.texsystem: nonsense\n"),
    "other look": ({}, 'font.family: Nonexistent Font\nsavefig.bbox: tight\naxes.prop_cycle: cycler("color", ["r"])\n'),
    "broken": ({}, "no.such.key: 1\nbackend: nonsense\nfigure.dpi: 1e9\nsavefig.dpi: x\n\x00\n"),
    "no home": ({"HOME": "/proc/nowhere", "MPLCONFIGDIR": "/proc/nowhere"}, ""),
}

NAMES = ["_hidden", "$\\frac", "a_b^c$", "caf\udce9", "模型", "\u05d0\u05d1", "a\x1b[2J", "a:x:b", "<b>&"]


def drawn(folder, environment):
    """The bytes of a PNG and what was said, of a process with the environment."""
    command = [sys.executable, "-m", "rscli", "compare", "r.tsv", "--plot", "p.png", "--format", "csv"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MPL")}
    names = {**clean, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=names, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return (folder / "p.png").read_bytes(), done.stderr


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("usual")
    (folder / "r.tsv").write_text(ROWS)
    return drawn(folder, {})


@pytest.mark.parametrize("case", SURROUNDINGS)
def test_surroundings_change_nothing(case, usual, tmp_path):
    environment, settings = SURROUNDINGS[case]
    (tmp_path / "r.tsv").write_text(ROWS)
    (tmp_path / "rc").mkdir()
    (tmp_path / "rc/matplotlibrc").write_text(settings)
    assert drawn(tmp_path, {"MPLCONFIGDIR": str(tmp_path / "rc"), **environment}) == usual


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
@pytest.mark.parametrize(
    "name", ["_hidden", "$\\frac", "a_b^c$", "caf\udce9", "模型", "\u05d0\u05d1", "a\x1b[2J", "a:x:b", "<b>&"]
)
def test_every_name_is_drawn(name, suffix, tmp_path):
    (tmp_path / "r.tsv").write_text(ROWS)
    run = read_results(tmp_path / "r.tsv")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_plot(compare([run, run], names=["base", name]), tmp_path / f"p.{suffix}")
    if suffix == "svg":
        text = (tmp_path / "p.svg").read_text(encoding="utf-8")
        assert text.count("(ACR") == 2  # both are in the legend
        assert "\x1b" not in text


def test_settings_of_the_caller_come_back(tmp_path):
    """The API is also used in notebooks, whose backend and settings are their own."""
    import matplotlib as mpl

    (tmp_path / "r.tsv").write_text(ROWS)
    run = read_results(tmp_path / "r.tsv")
    with mpl.rc_context({"text.usetex": True, "font.size": 31}):
        before = dict(mpl.rcParams)
        save_plot(compare([run]), tmp_path / "p.png")
        assert dict(mpl.rcParams) == before
