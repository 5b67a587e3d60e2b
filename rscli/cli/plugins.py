"""`rscli plugins`"""

from __future__ import annotations

from inspect import getdoc
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rscli.cli import options as opt
from rscli.cli.boundary import boundary

if TYPE_CHECKING:
    from rscli.api import Plugin
    from rscli.distributions import Problem
    from rscli.errors import PluginError
    from rscli.registry import Entry

plugins = typer.Typer(invoke_without_command=True)


@plugins.callback()
@boundary
def listing(context: typer.Context, json: opt.Json = False, _plugin: opt.PluginFiles = None) -> None:
    """List the installed plugins, or show the settings of one.

    The list shows the name, package, version and description of each; broken ones are marked.

    Examples:

        rscli plugins

        rscli plugins info losses consistency
    """
    if context.invoked_subcommand is not None:
        return
    from rich.table import Table

    from rscli.cli.output import emit_json, stdout
    from rscli.plugin_trial import descriptions
    from rscli.registry import installed, problems

    told = descriptions(entry for entry in installed().entries() if entry.kind != "presets")
    rows = [_row(entry, answer) for entry, answer in sorted(told.items(), key=lambda item: _place(item[0]))]
    if json:
        rows += [_left_out(problem) for problem in problems()]
        emit_json(rows)
        return
    table = Table("kind", "name", "package", "version", "description", box=None, pad_edge=False)
    for row in rows:
        text = f"broken: {_escape(row['error'])}" if row["error"] else _escape(row["description"])
        table.add_row(row["kind"], row["name"], row["package"], row["version"], text)
    console = stdout()
    console.print(table)
    for problem in problems():
        console.print(f"\nleft out: {problem}\n{problem.hint}", markup=False, highlight=False)


@plugins.command("info")
@boundary
def info(
    kind: Annotated[
        str,
        typer.Argument(
            help="noises, losses, attacks, architectures, datasets, certifiers, optimizers, schedules, loggers or callbacks"
        ),
    ],
    name: Annotated[str, typer.Argument(help="As `rscli plugins` lists it; package:name chooses between packages.")],
    json: opt.Json = False,
    _plugin: opt.PluginFiles = None,
) -> None:
    """Show a plugin's settings: type, default, bounds, unit and meaning.

    Example: rscli plugins info losses consistency
    """
    from rich.table import Table

    from rscli.cli.output import emit_json, stdout
    from rscli.registry import installed

    registry = installed()
    plugin, origin = registry.load(kind, name), registry.provenance(kind, name)
    fields = [_field(key, plugin) for key in plugin.model_fields]
    if json:
        emit_json({"kind": kind, "name": origin.name, "package": origin.package, "version": origin.version, "fields": fields})
        return
    console = stdout()
    console.print(f"{kind}: {origin.name} ({origin.package} {origin.version})\n")
    console.print(getdoc(plugin) or "", highlight=False)
    table = Table("setting", "type", "default", "bounds", "unit", "meaning", box=None, pad_edge=False)
    for row in fields:
        table.add_row(*(_escape(str(row[key])) for key in ("name", "type", "default", "bounds", "unit", "description")))
    if fields:
        console.print()
        console.print(table)


def _place(entry: Entry) -> tuple[int, str, str]:
    from rscli.api import KINDS

    return KINDS.index(entry.kind), entry.name, entry.package


def _row(entry: Entry, told: str | PluginError) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": entry.kind, "name": entry.name, "package": entry.package, "version": entry.version}
    if isinstance(told, str):
        return {**row, "description": told, "error": None}
    return {**row, "description": None, "error": told.message}


def _left_out(problem: Problem) -> dict[str, Any]:
    """A row of the JSON for a package whose metadata cannot be used; its kind, `problems`, is none of a plugin's."""
    empty = {"name": None, "package": None, "version": None, "description": None}
    return {"kind": "problems", **empty, "error": str(problem), "hint": problem.hint}


def _field(key: str, plugin: type[Plugin]) -> dict[str, Any]:
    """One hyper-parameter in words, from its JSON schema."""
    schema = plugin.model_json_schema()
    field, required = schema["properties"][key], key in schema.get("required", [])
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = " and ".join(f"{sign} {field[name]:g}" for name, sign in signs.items() if name in field)
    options = [part.get("type", "any") for part in field.get("anyOf", [])]
    plain = field.get("type", "section" if "$ref" in field else "any")
    kind = " | ".join(map(str, field["enum"])) if "enum" in field else " or ".join(options) or plain
    return {
        "name": key,
        "type": kind,
        "default": "required" if required else field.get("default"),
        "bounds": bounds,
        "unit": field.get("unit", ""),
        "description": field.get("description", ""),
    }


def _escape(text: str) -> str:
    from rscli.text import one_line

    return one_line(text)
