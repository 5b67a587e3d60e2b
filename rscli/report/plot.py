"""Certified accuracy against radius: a step curve for each run, from its raw radii."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rscli.errors import InputError
from rscli.report.comparison import LEVEL, Comparison
from rscli.report.tables import acr_text
from rscli.results.reader import Results
from rscli.runtime.files import replacing
from rscli.stats import bounds
from rscli.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}
"""The kinds of file, and what keeps the date out of each: the same results give the same bytes."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Distinguishable with every kind of colour vision: Okabe & Ito, "Color Universal Design", 2008."""

DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))
"""Beyond seven curves, the colours come back with other dashes."""

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#555555",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "svg.hashsalt": "rscli",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}

SMALL: dict[str, Any] = {"fontsize": 7, "color": "#555555"}


def check_plot_path(path: Path) -> None:
    """Raises `InputError` unless the suffix of `path` is one that plots are written as."""
    if path.suffix.lower() not in METADATA:
        raise InputError(f"the plot {path} must end in .png, .svg or .pdf", f"As in --plot {path.stem}.svg")


def save_plot(comparison: Comparison, path: Path) -> None:
    """Draws the comparison and writes it to `path`, atomically, as its suffix says (.png, .svg, .pdf). Needs no display."""
    check_plot_path(path)
    save_figure(lambda: draw(comparison), path)


def save_figure(figure: Callable[[], Figure], path: Path) -> None:
    """Writes the `figure`, drawn under our own settings, to `path`, atomically, as its suffix says."""
    suffix, page = path.suffix.lower(), BytesIO()
    with _own_settings(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a box stands for it, as everywhere
        figure().savefig(page, format=suffix[1:], dpi=200, metadata=METADATA[suffix])
    with replacing(path) as beside:
        beside.write_bytes(page.getbuffer())


@contextmanager
def _own_settings() -> Iterator[None]:
    """While the body draws, matplotlib's defaults and `STYLE` hold, whatever MPLBACKEND and a matplotlibrc say.

    A backend that does not exist would fail the import, and a matplotlibrc that is broken be complained of. Both are looked
    at only when matplotlib is imported first.
    """
    before = os.environ.get("MPLBACKEND")
    os.environ["MPLBACKEND"] = "agg"
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            yield
    finally:
        log.setLevel(level)
        if before is None:
            del os.environ["MPLBACKEND"]
        else:
            os.environ["MPLBACKEND"] = before


def curve(run: Results) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The step curve of a run: `radii` (steps,), from 0 up, and the `counts` (steps,) of images certified beyond each.

    Up to and including `radii[i + 1]`, `counts[i]` images are certified; beyond the last radius none are.
    """
    radii, ending = np.unique(run.radius[run.correct], return_counts=True)
    counts = int(run.correct.sum()) - np.cumsum(ending)
    return np.concatenate([[0.0], radii]), np.concatenate([[int(run.correct.sum())], counts])


def draw(comparison: Comparison) -> Figure:
    """The figure: a curve for each run, its pointwise interval as a band, and a legend above them in their order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.2 + 0.18 * len(comparison.runs)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for position, (run, summary) in enumerate(zip(comparison.runs, comparison.summaries, strict=True)):
        colour = COLOURS[position % len(COLOURS)]
        dash = DASHES[position // len(COLOURS) % len(DASHES)]
        _draw_run(axes, run, one_line(f"{run.name}  (ACR {acr_text(summary)})"), colour, dash)
    right = max(summary.largest for summary in comparison.summaries) or 1.0
    axes.set_xlim(0, 1.03 * right)
    axes.set_ylim(0, 100)
    axes.set_xlabel(f"certified {comparison.norm} radius (pixels in [0, 1])")
    axes.set_ylabel("certified accuracy (%)")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, width=0.6)
    remark = f"band: {100 * LEVEL:g} % pointwise interval"
    if any(summary.lower_bound for summary in comparison.summaries):
        remark += "\nACR ≥: only given radii were decided;\nelsewhere, the curve is a lower bound"
    axes.text(0.99, 0.98, remark, transform=axes.transAxes, ha="right", va="top", **SMALL)
    lines = axes.get_lines()  # given as such: matplotlib would leave out a label that begins with _
    names = [str(line.get_label()) for line in lines]
    figure.legend(lines, names, loc="outside upper left", frameon=False, handlelength=1.8, labelspacing=0.3)
    return figure


def _draw_run(axes: Axes, run: Results, label: str, colour: str, dash: Any) -> None:
    radii, counts = curve(run)
    images, side = run.idx.size, (1 - LEVEL) / 2
    axes.step(radii, 100 * counts / images, where="post", color=colour, linestyle=dash, linewidth=1.2, label=label)
    low, high = bounds.lower(counts, images, side), bounds.upper(counts, images, side)
    axes.fill_between(radii, 100 * low, 100 * high, step="post", color=colour, alpha=0.2, linewidth=0)
