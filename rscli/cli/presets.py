"""`rscli presets`"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from rscli.cli import options as opt
from rscli.cli.boundary import boundary

presets = typer.Typer(invoke_without_command=True)


@presets.callback()
@boundary
def listing(context: typer.Context, json: opt.Json = False) -> None:
    """List the presets, or show one: rows of papers, ready to train.

    Examples:

        rscli presets

        rscli presets show mnist-cons-0.5
    """
    if context.invoked_subcommand is not None:
        return
    from rich.table import Table

    from rscli.cli.output import emit_json, stdout
    from rscli.config.presets import list_presets
    from rscli.text import one_line

    found = list_presets()
    if json:
        emit_json([asdict(preset) for preset in found])
        return
    table = Table("preset", "package", "description", box=None, pad_edge=False)
    for preset in found:
        text = preset.title if preset.problem is None else f"broken: {preset.problem}"
        table.add_row(*map(one_line, (preset.name, preset.package, text)))
    stdout().print(table)


@presets.command("show")
@boundary
def show(
    name: Annotated[str, typer.Argument(help="As `rscli presets` lists it.")],
    json: opt.Json = False,
) -> None:
    """Show a preset's file, and the published figures that it should reproduce.

    Example: rscli presets show mnist-cons-0.5
    """
    from rscli.cli.output import emit_json, stdout
    from rscli.config.presets import load_preset, published_for
    from rscli.config.presets import show as text

    preset, published = load_preset(name), published_for(name)
    if json:
        header = preset.header.model_dump(mode="json", exclude={"published"})
        emit_json({"name": preset.name, **header, "settings": preset.settings, "published": published and asdict(published)})
        return
    console = stdout()
    console.print(text(name).rstrip(), highlight=False)
    if published is None:
        console.print("\nno published figures to compare with", highlight=False)
    else:
        spread = (
            "" if published.acr_sd is None else f" (standard deviation {published.acr_sd:.4f} over {published.seeds} seeds)"
        )
        console.print(f"\npublished ACR {published.acr:.4f}{spread}, {published.images:,} images", highlight=False)
        shown = ", ".join(f"{100 * value:.2f}% at {radius:g}" for radius, value in published.certified.items() if value)
        console.print(f"certified accuracy {shown}\nsource: {published.logs_of} ({published.repository})", highlight=False)
