"""`rscli plugins`"""

from __future__ import annotations

from inspect import getdoc
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rscli.cli import options as opt
from rscli.cli.boundary import boundary

if TYPE_CHECKING:
    from rscli.api import Plugin
    from rscli.registry import Entry

plugins = typer.Typer(invoke_without_command=True)


@plugins.callback()
@boundary
def listing(context: typer.Context, json: opt.Json = False) -> None:
    """List the installed plugins, or show the settings of one.

    The listing has name, package, version and description of each; broken ones are marked.

    Examples:

        rscli plugins

        rscli plugins info losses consistency
    """
    if context.invoked_subcommand is not None:
        return
    from rich.table import Table

    from rscli.cli.output import cell, emit_json, stdout
    from rscli.registry import installed

    rows = [_row(entry) for entry in installed().entries() if entry.kind != "presets"]
    if json:
        emit_json(rows)
        return
    table = Table("kind", "name", "package", "version", "description", box=None, pad_edge=False)
    for row in rows:
        text = cell("broken:", "red") + cell(f" {row['error']}") if row["error"] else cell(row["description"])
        table.add_row(*(cell(row[key]) for key in ("kind", "name", "package", "version")), text)
    stdout().print(table)


@plugins.command("info")
@boundary
def info(
    kind: Annotated[str, typer.Argument(help="noises, losses, attacks, architectures, datasets or certifiers")],
    name: Annotated[str, typer.Argument(help="As `rscli plugins` lists it; package:name chooses between packages.")],
    json: opt.Json = False,
) -> None:
    """Show a plugin's settings: type, default, bounds, unit and meaning.

    Example: rscli plugins info losses consistency
    """
    from rich.table import Table

    from rscli.cli.output import cell, emit_json, stdout
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
        table.add_row(*(cell(str(row[key])) for key in ("name", "type", "default", "bounds", "unit", "description")))
    if fields:
        console.print()
        console.print(table)


def _row(entry: Entry) -> dict[str, Any]:
    from rscli.errors import PluginError
    from rscli.registry import description, load_entry

    row: dict[str, Any] = {"kind": entry.kind, "name": entry.name, "package": entry.package, "version": entry.version}
    try:
        return {**row, "description": description(load_entry(entry)), "error": None}
    except PluginError as error:
        return {**row, "description": None, "error": error.message}


def _field(key: str, plugin: type[Plugin]) -> dict[str, Any]:
    """One hyper-parameter in words, from its JSON schema."""
    schema = plugin.model_json_schema()
    field, required = schema["properties"][key], key in schema.get("required", [])
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = " and ".join(f"{sign} {field[name]:g}" for name, sign in signs.items() if name in field)
    options = [part.get("type", "any") for part in field.get("anyOf", [])]
    kind = " | ".join(map(str, field["enum"])) if "enum" in field else " or ".join(options) or field.get("type", "any")
    return {
        "name": key,
        "type": kind,
        "default": "required" if required else field.get("default"),
        "bounds": bounds,
        "unit": field.get("unit", ""),
        "description": field.get("description", ""),
    }
