"""The picture of a run, and what differs between runs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from rscli.report.curves import BLOCKS, draw, save_curves, sparkline, sparklines, terms
from rscli.report.differences import difference_texts, differing
from rscli.report.runs import RunState, series


def run(*lines: dict, path: str = "x") -> RunState:
    return RunState(Path(path), "finished", lines=[{"epoch": place, **line} for place, line in enumerate(lines, 1)])


THREE = run(
    {"lr": 0.1, "loss": 2.0, "ce": 1.5, "kl": 0.5, "accuracy": 0.25, "probe_seconds": 1.0},
    {"lr": 0.1, "loss": 1.0, "ce": 0.75, "kl": 0.25, "accuracy": 0.5, "certified_0.5": 0.125, "images_per_s": 9.0},
    {"lr": 0.1, "loss": 0.5, "ce": 0.375, "kl": 0.125, "accuracy": 0.75, "certified_0.5": 0.25, "certified_1.0": 0.1},
)


# --- in a terminal ---


@pytest.mark.parametrize(
    ("values", "width", "blocks"),
    [
        ([0, 7], 10, "▁█"),
        (range(8), 10, BLOCKS),
        ([3, 3, 3], 10, "▁▁▁"),
        ([7, 0], 10, "█▁"),
        ([0, 0, 7, 7], 2, "▁█"),
        ([0, 2, 7, 7, 7], 2, "▁█"),  # two and three of five
    ],
)
def test_a_sparkline(values, width, blocks):
    assert sparkline(list(values), width) == blocks


def test_a_long_run_fits():
    width = 60
    long = run(*({"loss": 1 / epoch, "accuracy": epoch / 1000} for epoch in range(1, 1000)))
    found = sparklines(long.lines, width)
    assert all(len(text) <= width for text in found)
    assert [text.split()[0] for text in found] == ["loss", "accuracy"]
    assert [text.split()[-1] for text in found] == ["0.0010", "99.9%"]


def test_a_line_for_each_figure_that_there_is():
    assert sparklines(THREE.lines, 80) == [
        "loss              2.0000 █▃▁ 0.5000",
        "accuracy           25.0% ▁▅█ 75.0%",
        "certified at 0.5   12.5% ▁█ 25.0%",
    ]
    assert sparklines(THREE.lines[:1], 80) == []
    assert sparklines(THREE.lines, 20) == []
    assert sparklines(THREE.lines, 0) == []
    assert sparklines([], 80) == []


# --- the picture ---


def drawn(*runs: RunState) -> dict[str, list[list[float]]]:
    """What is drawn, by label: the values (percent in the lower panel)."""
    figure = draw({one.path.name: one for one in runs})
    lines = [line for axes in figure.get_axes() for line in axes.get_lines()]
    return {str(line.get_label()): [*map(float, line.get_ydata())] for line in lines}


def test_one_run_has_its_terms_and_what_the_probe_certified():
    assert drawn(THREE) == {
        "loss": [2.0, 1.0, 0.5],
        "ce": [1.5, 0.75, 0.375],
        "kl": [0.5, 0.25, 0.125],
        "accuracy under noise": [25, 50, 75],
        "certified at 0.5": [12.5, 25],
        "certified at 1": [10],
    }


def test_several_runs_have_a_colour_each():
    second = run({"loss": 3.0}, path="second")
    figure = draw({"x": THREE, "second": second})
    above, below = figure.get_axes()
    assert [str(line.get_label()) for line in above.get_lines()] == ["x", "second"]
    assert len({line.get_color() for line in above.get_lines()}) == 2
    assert {line.get_color() for line in below.get_lines()} == {above.get_lines()[0].get_color()}
    assert len({line.get_marker() for line in below.get_lines()[1:]}) == 2
    assert above.get_lines()[1].get_marker() == "o"  # a single epoch


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ({"loss": 1.0, "accuracy": 0.5, "images_per_s": 1.0}, []),
        ({"loss": 1.0, "ce": 1.0, "accuracy": 0.5}, []),  # a single term is the loss
        ({"loss": 1.0, "a": 0.5, "b": 0.25, "c": 0.25, "accuracy": 0.5, "other": 3.0}, ["a", "b", "c"]),
        ({"loss": 1.0, "a": 0.75, "b": 0.25, "clean_accuracy": 0.5}, ["a", "b"]),
        ({"loss": 1.0, "x": 0.5, "y": 0.1}, []),
        ({"loss": 1.0, "x": "text", "y": 0.1}, []),
        ({}, []),
    ],
)
def test_terms_are_the_figures_that_add_up_to_the_loss(line, found):
    assert terms([{"epoch": 1, **line}]) == found


def test_the_same_log_gives_the_same_bytes_and_a_grey_print_shows_it(tmp_path):
    save_curves({"a $x$ _name": THREE}, tmp_path / "a.png")
    save_curves({"a $x$ _name": THREE}, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(io.BytesIO((tmp_path / "a.png").read_bytes())) as image:
        assert image.width > 1000
        assert image.convert("L").getextrema()[0] < 60


def test_a_series_leaves_out_what_is_no_number():
    lines = json.loads(
        '[{"epoch": 1, "a": NaN}, {"epoch": 2, "a": 3}, {"epoch": 3, "a": "x"}, {"epoch": 4, "a": Infinity}, {"epoch": 5}]'
    )
    assert series(lines, "a") == ([2], [3.0])


# --- what differs ---

CONS = {
    "epochs": 90,
    "seed": 0,
    "loss": {"name": "consistency", "lbd": 5.0, "m": 2},
    "attack": None,
    "loggers": {"x": {"file": "a"}},
}


def test_settings_that_differ_are_told_and_what_follows_from_a_name_is_not():
    other = {**CONS, "seed": 1, "loss": {**CONS["loss"], "lbd": 10.0}, "loggers": {}}
    third = {**CONS, "loss": {"name": "gaussian", "m": 2}, "attack": {"name": "pgd", "steps": 3}, "limit": None}
    assert differing({"a": CONS, "b": other}) == {"a": {"seed": 0, "loss.lbd": 5.0}, "b": {"seed": 1, "loss.lbd": 10.0}}
    found = differing({"a": CONS, "b": other, "c": third})
    assert found["c"] == {"seed": 0, "loss.name": "gaussian", "attack.name": "pgd"}
    assert differing({"a": CONS, "b": CONS}) == {"a": {}, "b": {}}
    assert difference_texts(found)["c"] == {"seed": "0", "loss.name": "gaussian", "loss.lbd": "–", "attack.name": "pgd"}
    assert difference_texts(found)["b"]["loss.lbd"] == "10"
