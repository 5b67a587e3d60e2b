"""Who imports whom in rscli/: read from the source with ast, nothing is imported. Rooms, arrows between them, and circles.

    python bench/import_map.py                          # the rooms and the arrows between them
    python bench/import_map.py --files                  # the files too: every arrow between two of them
    python bench/import_map.py --out map.svg            # drawn
    python bench/import_map.py --root ../older-checkout # the same of another checkout

A room is a folder of rscli/, or a module directly in it. An arrow goes from a room to one that it imports, however often; it is
marked "late" where that happens only inside functions or for type checkers. A circle is a set of rooms, or of files, that reach
each other along arrows; those that close when modules are imported are told apart from those with late arrows.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "rscli"


@dataclass(frozen=True)
class Import:
    """One file imports another, by dotted names below rscli; `late`: inside a function or under TYPE_CHECKING."""

    source: str
    target: str
    late: bool


def modules_of(root: Path) -> dict[str, Path]:
    """The modules of the checkout at `root` by dotted name without `rscli.`; a package stands under its own name.

    Raises `SystemExit` if there is no rscli there.
    """
    folder = root / PACKAGE
    if not (folder / "__init__.py").is_file():
        raise SystemExit(f"{folder} is no package: --root must be a checkout of rscli")
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"] = path
    return found


def imports_of(name: str, path: Path, modules: Mapping[str, Path]) -> Iterator[Import]:
    """The imports of a module from other modules of rscli."""
    for target, late in _named(ast.parse(path.read_text(encoding="utf-8")), late=False):
        found = _module(target, modules)
        if found is not None and found != name:
            yield Import(name, found, late)


def _named(node: ast.AST, *, late: bool) -> Iterator[tuple[str, bool]]:
    """The dotted names that a tree imports absolutely, and whether late."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, late) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            yield from ((f"{child.module}.{alias.name}", late) for alias in child.names)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _types_only(child)
            yield from _named(child, late=late or inside)


def _types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _module(dotted: str, modules: Mapping[str, Path]) -> str | None:
    """The module of rscli that a dotted name is, or is something of; the version in `rscli` itself is nobody's."""
    top, _, rest = dotted.partition(".")
    if top != PACKAGE or not rest:
        return None
    while rest:
        if rest in modules:
            return rest
        rest = rest.rpartition(".")[0]
    return None


def room_of(module: str) -> str:
    """The room of a module: the folder of rscli/ that it is in, or the module itself."""
    return module.partition(".")[0]


def arrows(imports: Iterable[Import], *, rooms: bool) -> dict[tuple[str, str], tuple[int, bool]]:
    """(from, to) -> how many file-to-file imports there are, and whether all are late; between rooms, or between files."""
    found: dict[tuple[str, str], dict[tuple[str, str], bool]] = defaultdict(dict)
    for one in imports:
        ends = (room_of(one.source), room_of(one.target)) if rooms else (one.source, one.target)
        if ends[0] != ends[1]:
            pair = (one.source, one.target)
            found[ends][pair] = found[ends].get(pair, True) and one.late
    return {ends: (len(pairs), all(pairs.values())) for ends, pairs in sorted(found.items())}


def circles(pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The sets of names that reach each other along arrows (strongly connected, two or more), by Tarjan's algorithm."""
    after: dict[str, list[str]] = defaultdict(list)
    for here, there in pairs:
        after[here].append(there)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in after[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            place = stack.index(name)
            component = sorted(stack[place:])
            del stack[place:]
            if len(component) > 1:
                found.append(component)

    for name in list(after):
        if name not in index:
            visit(name)
    return sorted(found)


def levels(names: Iterable[str], pairs: Iterable[tuple[str, str]]) -> dict[str, int]:
    """How high each name stands: above all that it imports (0: imports none). Names in a circle stand where it is met."""
    after: dict[str, set[str]] = defaultdict(set)
    for here, there in pairs:
        after[here].add(there)
    found: dict[str, int] = {}

    def height(name: str, seen: tuple[str, ...]) -> int:
        if name not in found:
            below = [height(other, (*seen, name)) for other in sorted(after[name]) if other not in (*seen, name)]
            found[name] = 1 + max(below, default=-1)
        return found[name]

    for name in sorted(names):
        height(name, ())
    return found


def report(modules: Mapping[str, Path], imports: list[Import], *, files: bool) -> str:
    """The rooms, from the highest to the lowest, what each imports, the counts, and the circles."""
    between = arrows(imports, rooms=True)
    single = arrows(imports, rooms=False)
    rooms = sorted({room_of(name) for name in modules})
    height = levels(rooms, between)
    lines = []
    for room in sorted(rooms, key=lambda name: (-height[name], name)):
        count = sum(room_of(name) == room for name in modules)
        inner = sum(room_of(a) == room_of(b) == room for a, b in single)
        targets = [f"{there}{' (late)' * late}" for (here, there), (_, late) in between.items() if here == room]
        size = f"{count} file{'s' * (count > 1)}, {inner} arrows inside" if count > 1 else "1 file"
        lines.append(f"{room:<13} {size:<27} imports {', '.join(targets) or 'nothing'}")
    if files:
        lines += ["", *(f"{here} -> {there}{' (late)' * late}" for (here, there), (_, late) in single.items())]
    largest = max(rooms, key=lambda room: sum(room_of(name) == room for name in modules))
    inside = [(a, b) for a, b in single if room_of(a) == room_of(b) == largest]
    lines += [
        "",
        f"{len(rooms)} rooms, {len(modules)} files",
        f"{len(between)} arrows between rooms, {len(single)} between files",
        f"largest room: {largest}, {sum(room_of(n) == largest for n in modules)} files, {len(inside)} arrows inside",
        f"circles of rooms: {_shown(between)}",
        f"circles of files: {_shown(single)}",
    ]
    return "\n".join(lines)


def _shown(found: Mapping[tuple[str, str], tuple[int, bool]]) -> str:
    at_once = circles(pair for pair, (_, late) in found.items() if not late)
    later = [names for names in circles(found) if names not in at_once]
    shown = [" <-> ".join(names) for names in at_once] + [f"{' <-> '.join(names)} (with late arrows)" for names in later]
    return "; ".join(shown) or "none"


def draw(modules: Mapping[str, Path], imports: list[Import], out: Path) -> None:
    """Draws the rooms, lowest at the bottom, and their arrows to an image file.

    Dashed: late. Red: part of a circle. Faint: implied by others, since there is a longer way along arrows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    between = arrows(imports, rooms=True)
    rooms = sorted({room_of(name) for name in modules} - {"__init__", "__main__"})
    pairs = {ends: late for ends, (_, late) in between.items() if set(ends) <= set(rooms)}
    place = _places(rooms, pairs)
    circle = {name for names in circles(pairs) for name in names}
    figure = Figure(figsize=(9, 0.75 * len(rooms) + 1))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(-5.2, 5.2)
    axes.set_ylim(-0.7, len(rooms) - 0.3)
    for (here, there), late in sorted(pairs.items(), key=lambda item: not _implied(item[0], pairs)):
        side = 1 if (place[here] - place[there]) % 2 else -1
        bend = side * (0.25 + 0.02 * abs(place[here] - place[there]))
        axes.annotate(
            "",
            xy=(1.15 * side, place[there]),
            xytext=(1.15 * side, place[here]),
            arrowprops={
                "arrowstyle": "-|>",
                "connectionstyle": f"arc3,rad={-bend if place[here] > place[there] else bend}",
                "linestyle": "--" if late else "-",
                "color": "tab:red" if {here, there} <= circle else "0.85" if _implied((here, there), pairs) else "0.2",
                "linewidth": 1.0,
            },
        )
    for room in rooms:
        count = sum(room_of(name) == room for name in modules)
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "0.2"}
        text = f"{room}  ({count})" if count > 1 else room
        axes.text(0, place[room], text, ha="center", va="center", bbox=box, fontsize=10)
    figure.savefig(out)


def _implied(arrow: tuple[str, str], pairs: Iterable[tuple[str, str]]) -> bool:
    """Whether there is another way from the one end of `arrow` to the other."""
    here, there = arrow
    seen, todo = {here}, [b for a, b in pairs if a == here and b != there]
    while todo:
        name = todo.pop()
        if name == there:
            return True
        if name not in seen:
            seen.add(name)
            todo += [b for a, b in pairs if a == name]
    return False


def _places(rooms: list[str], pairs: Iterable[tuple[str, str]]) -> dict[str, int]:
    """A place for each room on a vertical line, above all that it imports."""
    height = levels(rooms, pairs)
    return {room: place for place, room in enumerate(sorted(rooms, key=lambda name: (height[name], name)))}


def main(arguments: list[str] | None = None) -> None:
    """Reads the checkout, prints the map, and draws it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="a checkout of rscli")
    parser.add_argument("--files", action="store_true", help="every arrow between two files, too")
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw the rooms: map.svg, map.png or map.pdf")
    chosen = parser.parse_args(arguments)
    modules = modules_of(chosen.root)
    imports = [one for name, path in modules.items() for one in imports_of(name, path, modules)]
    print(report(modules, imports, files=chosen.files))
    if chosen.out is not None:
        draw(modules, imports, chosen.out)
        print(f"drawn: {chosen.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
