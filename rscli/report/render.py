"""Tables for people: on a terminal, in Markdown, in LaTeX (booktabs)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from io import StringIO
from typing import TYPE_CHECKING

from rscli.report.comparison import Comparison
from rscli.report.export import to_csv, to_json
from rscli.report.tables import Cell, Table, tables, widths
from rscli.text import one_line, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

FILE_WIDTH = 160
"""Characters in a line of a table that goes to a file."""

_GAP = 2


def render(comparison: Comparison, form: str) -> str:
    """The comparison as text: `form` is table, markdown, latex, csv or json (`FORMATS`)."""
    return FORMATS[form](comparison)


def print_tables(comparison: Comparison, console: Console) -> None:
    """Shows the tables on a `console`, split between columns where it is too narrow; no figure is ever cut off."""
    for table in tables(comparison):
        console.print(visible(f"\n{table.title}"), style="bold", highlight=False)
        for part in _parts(table, console.width):
            _print(part, console)
        console.print(visible(table.caption), style="dim", highlight=False)


def _parts(table: Table, width: int) -> Iterator[Table]:
    """The table in pieces that fit into `width` characters, each with at least one column besides the fixed ones."""
    wide = [needed + _GAP for needed in widths(table)]
    start = table.fixed
    while start < len(wide):
        stop, used = start + 1, sum(wide[: table.fixed]) + wide[start]
        while stop < len(wide) and used + wide[stop] <= width:
            used += wide[stop]
            stop += 1
        pick = [*range(table.fixed), *range(start, stop)]
        rows = tuple(tuple(row[column] for column in pick) for row in table.rows)
        yield Table(table.title, tuple(table.header[column] for column in pick), rows, table.caption, table.fixed)
        start = stop


def _print(table: Table, console: Console) -> None:
    from rich.table import Table as Grid

    grid = Grid(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for position, name in enumerate(table.header):
        grid.add_column(one_line(name), justify="right" if position else "left", no_wrap=position > 0, overflow="fold")
    for row in table.rows:
        grid.add_row(*map(_two_lines, row))
    console.print(grid)


def _two_lines(cell: Cell) -> Text:
    from rich.text import Text

    text, detail = one_line(cell.text), one_line(cell.detail)
    return Text.assemble(text, (f"\n{detail}", "dim")) if detail else Text(text)


def _plain(comparison: Comparison) -> str:
    from rich.console import Console

    page = StringIO()
    print_tables(comparison, Console(file=page, width=FILE_WIDTH, color_system=None, markup=False, emoji=False))
    lines = [line.rstrip() for line in page.getvalue().splitlines()]
    return "\n".join(lines).lstrip("\n") + "\n"


def _markdown(comparison: Comparison) -> str:
    return "\n".join(_markdown_table(table) for table in tables(comparison))


def _markdown_table(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rows = [line([_markdown_text(f"{cell.text} {cell.detail}".strip()) for cell in row]) for row in table.rows]
    head = [line([_markdown_text(name) for name in table.header]), line(["---", *["---:"] * (len(table.header) - 1)])]
    return "\n".join([f"**{_markdown_text(table.title)}**", "", *head, *rows, "", _markdown_text(table.caption), ""])


def _markdown_text(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", one_line(text))


def _latex(comparison: Comparison) -> str:
    return "% needs \\usepackage{booktabs}\n" + "\n".join(_latex_table(table) for table in tables(comparison))


def _latex_table(table: Table) -> str:
    def line(cells: list[str]) -> str:
        guard = "{}" if cells[0].startswith(("[", "*")) else ""  # after \\ these would be options of the line break
        return f"    {guard}{' & '.join(cells)} \\\\"

    return "\n".join(
        [
            "\\begin{table}",
            "  \\centering",
            f"  \\caption{{{latex_text(table.title)}. {latex_text(table.caption)}}}",
            f"  \\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
            "    \\toprule",
            line([latex_text(name) for name in table.header]),
            "    \\midrule",
            *(line([_latex_cell(cell) for cell in row]) for row in table.rows),
            "    \\bottomrule",
            "  \\end{tabular}",
            "\\end{table}",
            "",
        ]
    )


def _latex_cell(cell: Cell) -> str:
    return latex_text(cell.text) + (f" {{\\scriptsize {latex_text(cell.detail)}}}" if cell.detail else "")


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{mark: f"\\{mark}" for mark in "&%$#_{}"},
        **{mark: f"${mark}$" for mark in "<>|"},
        "±": r"$\pm$",
        "≥": r"$\ge$",
        "≤": r"$\le$",
        "−": "$-$",
        "–": "--",
        "σ": r"$\sigma$",
        "α": r"$\alpha$",
    }
)


def latex_text(text: str) -> str:
    """`text` as LaTeX that typesets it: special characters escaped, the signs of our tables in mathematics."""
    return one_line(text).translate(_LATEX)


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "table": _plain,
    "markdown": _markdown,
    "latex": _latex,
    "csv": to_csv,
    "json": to_json,
}
