"""The picture of a run: loss and accuracy against the epoch, as PNG, SVG or PDF, and in a few lines of a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rscli.errors import InputError
from rscli.report.plot import COLOURS, DASHES, SMALL, check_plot_path, save_figure
from rscli.report.runs import CERTIFIED, RunState, series
from rscli.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLOCKS = "▁▂▃▄▅▆▇█"

OWN = {"epoch", "lr", "loss", "accuracy", "images_per_s", "seconds"}
"""What a line has of its own, and is no term of the loss."""

MOST_TERMS = 6


def save_curves(runs: Mapping[str, RunState], path: Path) -> None:
    """Draws `runs` by name and writes the picture to `path`, atomically, as its suffix says (.png, .svg, .pdf).

    Raises `InputError` for another suffix, and if none of the runs has finished an epoch.
    """
    check_plot_path(path)
    drawn = {name: run for name, run in runs.items() if run.lines}
    if not drawn:
        raise InputError("there is nothing to draw: no run has finished an epoch", "Wait for the first, or name other folders.")
    save_figure(lambda: draw(drawn), path)


def draw(runs: Mapping[str, RunState]) -> Figure:
    """The figure: the loss above, of a single run with its terms; below, accuracy under noise and what a probe certified."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 4.6 + 0.18 * (len(runs) if len(runs) > 1 else 0)), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    lines = []
    for place, (name, run) in enumerate(runs.items()):
        colour, dash = COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)]
        lines += _line(above, run, "loss", one_line(name) if len(runs) > 1 else "loss", colour, dash)
        _line(below, run, "accuracy", "accuracy under noise", colour, dash, scale=100)
        _draw_probe(below, run, colour if len(runs) > 1 else None)
    if len(runs) == 1:
        _draw_terms(above, *runs.values())
    _dress(above, "loss")
    _dress(below, "accuracy (%)")
    if above.dataLim.y0 >= 0:
        above.set_ylim(bottom=0)
    below.set_ylim(0, 100)
    below.set_xlabel("epoch")
    below.xaxis.get_major_locator().set_params(integer=True)
    if len(runs) > 1:
        names = [str(line.get_label()) for line in lines]
        figure.legend(lines, names, loc="outside upper left", frameon=False, handlelength=1.8, labelspacing=0.3)
        below.text(0.01, 0.02, _remark(runs), transform=below.transAxes, ha="left", va="bottom", **SMALL)
    else:
        figure.suptitle(one_line(next(iter(runs))), fontsize=9, x=0.02, ha="left")
        for axes in (above, below):
            beside: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "ncols": 4}
            axes.legend(frameon=False, fontsize=7, handlelength=1.8, labelspacing=0.3, columnspacing=1.2, **beside)
    return figure


def _line(
    axes: Axes, run: RunState, key: str, label: str, colour: str, dash: Any, *, scale: float = 1, **style: Any
) -> list[Any]:
    epochs, values = series(run.lines, key)
    if not epochs:
        return []
    marker = "o" if len(epochs) == 1 else style.pop("marker", "")  # a line needs two points
    kind = {"linewidth": 1.2, "markersize": 3, "marker": marker, **style}
    return axes.plot(epochs, [scale * value for value in values], color=colour, linestyle=dash, label=label, **kind)


def _draw_terms(axes: Axes, run: RunState) -> None:
    for place, key in enumerate(terms(run.lines)[:MOST_TERMS]):
        _line(axes, run, key, one_line(key), COLOURS[1 + place], DASHES[1 + place % 2], linewidth=0.9)


def terms(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The terms of the loss in a log, if there are several: the first figures behind the loss that add up to it."""
    last = lines[-1] if lines else {}
    keys = [*last][[*last].index("loss") + 1 :] if "loss" in last else []
    total, found = 0.0, list[str]()
    for key in keys:
        if not isinstance(last[key], int | float) or key in OWN:
            return []
        total, found = total + last[key], [*found, key]
        if len(found) > 1 and math.isclose(total, last["loss"], rel_tol=1e-3, abs_tol=1e-6):
            return found
    return []


def _draw_probe(axes: Axes, run: RunState, colour: str | None) -> None:
    """Certified accuracy by radius: a colour for each radius; of several runs, that of the run, and a marker for each."""
    keys = sorted({key for line in run.lines for key in line if CERTIFIED.fullmatch(key)}, key=_radius)
    for place, key in enumerate(keys):
        style = {"marker": "os^Dv"[place % 5], "linewidth": 0.8}
        label = f"certified at {_radius(key):g}"
        _line(axes, run, key, label, colour or COLOURS[(1 + place) % len(COLOURS)], DASHES[2], scale=100, **style)


def _radius(key: str) -> float:
    return float(key.partition("_")[2])


def _remark(runs: Mapping[str, RunState]) -> str:
    keys = sorted({key for run in runs.values() for line in run.lines for key in line if CERTIFIED.fullmatch(key)}, key=_radius)
    if not keys:
        return "accuracy under noise"
    signs = ("circle", "square", "triangle", "diamond", "inverted triangle")
    shown = ", ".join(f"at {_radius(key):g} ({signs[place % 5]})" for place, key in enumerate(keys))
    return f"line: accuracy under noise; dotted: certified accuracy {shown}"


def _dress(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, width=0.6)


# --- in a terminal -----------------------------------------------------------------------------------------------------------


def sparklines(lines: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """Loss, accuracy under noise and what a probe certified, a line each of at most `width` characters: first value, blocks,
    last value. Empty if there are fewer than two epochs, or no room.
    """
    keys = sorted({key for line in lines for key in line if CERTIFIED.fullmatch(key)}, key=_radius)
    wanted = {"loss": "loss", "accuracy": "accuracy", **{key: f"certified at {_radius(key):g}" for key in keys}}
    rows = [(name, series(lines, key)[1], key == "loss") for key, name in wanted.items()]
    rows = [row for row in rows if len(row[1]) > 1]
    room = width - max((len(name) for name, *_ in rows), default=0) - 2 * 9
    if not rows or room < 10:
        return []
    pad = max(len(name) for name, *_ in rows)
    return [
        f"{name:<{pad}} {_value(values[0], plain):>7} {sparkline(values, min(room, 60))} {_value(values[-1], plain)}"
        for name, values, plain in rows
    ]


def _value(value: float, plain: bool) -> str:
    return f"{value:.4f}"[:7] if plain else f"{100 * value:.1f}%"


def sparkline(values: Sequence[float], width: int) -> str:
    """`values` as blocks from the lowest to the highest, at most `width`: of more, the mean of each stretch."""
    if len(values) > width:
        cuts = [place * len(values) // width for place in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(values), max(values)
    if high == low:
        return BLOCKS[0] * len(values)
    return "".join(BLOCKS[round((value - low) / (high - low) * (len(BLOCKS) - 1))] for value in values)
