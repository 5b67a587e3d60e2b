"""The printed help at 80 columns: options in named panels, whose texts have room."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from rscli.cli.app import app

PANEL = re.compile(r"^╭─ ([A-Z][\w ]*) ─+╮$")

PANELS = {
    "certify": {"Options", "Certificate", "Data", "Settings", "Device and speed"},
    "train": {"Options", "Settings", "Several runs", "Data", "Device and speed", "Dry run"},
    "predict": {"Options", "Vote", "Settings", "Device and speed"},
    "import": {"Options", "Settings", "Weights", "Data"},
}


def panels(command: str) -> dict[str, list[str]]:
    """The lines of each panel of options in the help of `command`, at 80 columns."""
    done = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert done.exit_code == 0, done.output
    found: dict[str, list[str]] = {}
    for line in done.output.splitlines():
        if heading := PANEL.match(line):
            lines = found.setdefault(heading[1], [])
        elif line.startswith("│"):
            lines.append(line.strip("│ "))
    return {name: lines for name, lines in found.items() if name != "Arguments"}


@pytest.mark.parametrize("command", PANELS)
def test_options_are_grouped_in_panels(command):
    assert set(panels(command)) == PANELS[command]


@pytest.mark.parametrize("command", PANELS)
def test_a_panel_is_taken_in_at_a_glance(command):
    """At most eight options each, and no option needs more than six lines: long ranges and types leave texts no room."""
    for name, lines in panels(command).items():
        starts = [number for number, line in enumerate(lines) if line.lstrip("* ").startswith("--")]
        assert len(starts) <= 8, name
        heights = [end - start for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]
        assert max(heights) <= 6, (name, heights)


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("certify", "--n", 10**12 + 1),
        ("certify", "--n0", 10**12 + 1),
        ("certify", "--seed", 2**63),
        ("certify", "--batch", 10**6 + 1),
        ("predict", "--n", 10**12 + 1),
        ("predict", "--seed", 2**63),
        ("predict", "--batch", 10**6 + 1),
    ],
)
def test_a_bound_that_the_help_leaves_out_holds(command, option, value):
    arguments = [command, "model.safetensors", *(["photo.png"] if command == "predict" else []), option, str(value)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert option in done.output
    assert f"{value} is more than {value - 1}." in " ".join(re.sub("[│\n ]+", " ", done.output).split())
