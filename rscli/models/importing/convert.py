"""Checkpoints as this field publishes them, turned into a self-describing model file.

The file is read (`foreign`), its tensors are renamed as the network's (`keys`) and checked (`mismatch`), and the
normalisation that belongs in front is found (`normalization`). What the file does not say of itself, the user's options do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from rscli import __version__
from rscli.api import Architecture, Dataset, Plugin
from rscli.config.layers import build_section, defaults, full_section, read_sets
from rscli.config.problems import Problems
from rscli.config.schema import SECTIONS
from rscli.config.settings import Setting, Settings, dotted, flatten, nest, stack
from rscli.data.splits import spec_of
from rscli.errors import InputError, RscliError, did_you_mean
from rscli.models.card import ModelCard
from rscli.models.importing.foreign import Checkpoint, read_checkpoint
from rscli.models.importing.keys import fit_tensors
from rscli.models.importing.mismatch import check_fit
from rscli.models.importing.normalization import NORMALIZATIONS, Normalization, choose_normalization, take_constants
from rscli.models.modelfile import file_digest, save_model
from rscli.models.network import Classifier, build_classifier, parameter_count
from rscli.registry import installed, load_entry
from rscli.runtime.progress import Progress

IMPORTED = ("arch", "data", "noise")
"""The sections of a configuration that an import needs."""


@dataclass(frozen=True)
class ImportOptions:
    """What to import, and what the file does not say of itself. `arch` None: as the file says; `sigma` in [0, 1] pixels.

    `ema`, `prefix` and `ignore` say which tensors are taken, as for `read_checkpoint`.
    """

    checkpoint: Path
    out: Path
    dataset: str
    sigma: float
    data_dir: Path
    arch: str | None = None
    noise: str | None = None
    normalization: str = "auto"
    sets: tuple[str, ...] = ()
    force: bool = False
    ema: bool = False
    prefix: str = ""
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Imported:
    """What was imported, and where the model file is."""

    model: Path
    arch: dict[str, Any]
    data: dict[str, Any]
    noise: dict[str, Any]
    normalization: Normalization
    classes: int
    parameters: int
    epochs: int | None
    prefix: str
    origin: str


def import_checkpoint(options: ImportOptions, progress: Progress) -> Imported:
    """Reads a checkpoint, finds its network, and writes the model file; nothing is executed, and nothing downloaded.

    Raises `InputError` for a file that is no checkpoint or holds more than tensors, for tensors that do not fit the
    architecture or the data set, and for an `out` that exists (unless `force`); `ConfigError` for settings that do not hold.
    """
    _check_options(options)
    checkpoint = read_checkpoint(options.checkpoint, ema=options.ema, prefix=options.prefix, ignore=options.ignore)
    if checkpoint.note:
        progress.warn(checkpoint.note)
    plugins, sections = _plugins(options, checkpoint)
    spec = spec_of(cast(Dataset, plugins["data"]), options.data_dir)
    network = build_classifier(cast(Architecture, plugins["arch"]), spec, weights=False).network
    fit = fit_tensors(checkpoint.tensors, network.state_dict(), cast(Architecture, plugins["arch"]).rename)
    fit, constants = take_constants(fit, checkpoint, options.prefix)
    check_fit(fit, checkpoint.path, sections["arch"], sections["data"]["name"], spec, _other_arch(checkpoint, sections["arch"]))
    normalization = choose_normalization(options.normalization, constants, spec, checkpoint, fit.prefix)
    network.load_state_dict(fit.tensors)
    card = ModelCard(
        rscli=__version__,
        **sections,
        spec=spec.model_copy(update={"mean": normalization.mean, "std": normalization.std}),
        plugins=[
            *(asdict(installed().provenance(SECTIONS[name], sections[name]["name"])) for name in IMPORTED),
            *map(asdict, installed().part_provenance(plugins["arch"])),
        ],
        epochs=checkpoint.epochs,
        origin=f"imported from {options.checkpoint.name} (sha256 {file_digest(options.checkpoint)})",
    )
    save_model(options.out, Classifier(network, card.spec), card)
    (progress.note if normalization.sure else progress.warn)(str(normalization))
    return Imported(
        model=options.out,
        **sections,
        normalization=normalization,
        classes=len(spec.class_names),
        parameters=parameter_count(network),
        epochs=checkpoint.epochs,
        prefix=fit.prefix,
        origin=card.origin or "",
    )


def _check_options(options: ImportOptions) -> None:
    if options.normalization not in NORMALIZATIONS:
        raise InputError(f"--normalization is {options.normalization!r}, but must be one of {', '.join(NORMALIZATIONS)}")
    if not options.out.exists():
        return
    if options.checkpoint.exists() and options.out.samefile(options.checkpoint):
        raise InputError(f"{options.out} is the checkpoint itself", "Write the model file elsewhere: --out FILE.")
    if not options.force:
        raise InputError(f"{options.out} already exists", "--force overwrites it; --out FILE writes elsewhere.")


def _plugins(options: ImportOptions, checkpoint: Checkpoint) -> tuple[dict[str, Plugin], dict[str, dict[str, Any]]]:
    """The plugins, and what the model file says of each, by section. Raises `ConfigError` naming every wrong setting."""
    if options.arch is not None:
        _check_arch(options.arch)
    named = checkpoint.arch if options.arch is None else options.arch
    arch = (_guess(named) if options.arch is None else field_archs().get(named or "", {"name": named})) or {}
    settings = stack(defaults(), flatten({"arch": arch}, checkpoint.path.name if options.arch is None else "--arch"))
    flags: Settings = {
        ("data", "name"): Setting(options.dataset, "--dataset"),
        ("noise", "name"): Setting(options.noise or installed().default("noises"), "--noise"),
        ("noise", "sigma"): Setting(options.sigma, "--sigma"),
    }
    settings = stack(settings, flags)
    chosen, problems_of_sets = read_sets(options.sets, settings)
    for key in list(chosen):
        if len(key) < 2 or key[0] not in IMPORTED:
            takes = ", ".join(f"{section}.KEY=VALUE" for section in IMPORTED)
            problems_of_sets.append(f"--set {dotted(key)} is not a setting of import: it takes {takes}")
            del chosen[key]
    settings = stack(settings, chosen)
    if ("arch", "name") not in settings:
        raise _unknown_arch(checkpoint)
    problems, nested = Problems(settings, problems_of_sets), nest(settings)
    plugins = {name: plugin for name in IMPORTED if (plugin := build_section(name, nested[name], problems)) is not None}
    problems.check()
    if "pretrained" in type(plugins["arch"]).model_fields:
        plugins["arch"] = plugins["arch"].model_copy(update={"pretrained": False})  # the weights are in the file
    return plugins, {name: full_section(name, str(nested[name]["name"]), plugins[name]) for name in IMPORTED}


def field_archs() -> dict[str, dict[str, Any]]:
    """What other code calls an architecture, and what it is here, as the plugins say; broken plugins say nothing."""
    known: dict[str, dict[str, Any]] = {}
    for entry in installed().entries("architectures"):
        try:
            plugin = cast(type[Architecture], load_entry(entry))
        except RscliError:
            continue
        for name, fields in plugin.field_names.items():
            rest = dict(fields)
            variant = rest.pop(plugin.variant or "", None)
            here = entry.name if variant is None else f"{entry.name}/{variant}"
            known.setdefault(name, {"name": here, **rest})
    return known


def _guess(named: str | None) -> dict[str, Any] | None:
    """What a file's own word for its architecture means here; a wrong guess does no harm, for its tensors would not fit."""
    if named is None:
        return None
    offered = [{"name": name} for name in installed().offering("architectures", named)]
    return field_archs().get(named) or (offered[0] if offered else None)


def _way_to_arch(name: str) -> str:
    known = [*field_archs(), *(entry.name for entry in installed().entries("architectures"))]
    near = installed().offering("architectures", name)[:1] or get_close_matches(name, known, n=1)
    return did_you_mean(
        near, "timm's models, among them torchvision's ResNets, are timm/NAME; `rscli plugins` lists the others."
    )


def _check_arch(name: str) -> None:
    """Raises `InputError` if no plugin is called `name`, and no architecture of the field."""
    plugins = {entry.name for entry in installed().entries("architectures")}
    known = field_archs()
    if name in known or name.rpartition(":")[2].partition("/")[0] in plugins:
        return
    raise InputError(
        f"there is no architecture {name!r}: no plugin ({', '.join(sorted(plugins))}) and no published network "
        f"({', '.join(known)}) has that name",
        _way_to_arch(name),
    )


def _other_arch(checkpoint: Checkpoint, chosen: Mapping[str, Any]) -> str | None:
    """What the file itself says of its architecture, if that is one of the field's names, and another one than `chosen`."""
    field = _guess(checkpoint.arch)
    return None if field is None or field.items() <= chosen.items() else checkpoint.arch


def _unknown_arch(checkpoint: Checkpoint) -> InputError:
    says = (
        "does not say which architecture it belongs to"
        if checkpoint.arch is None
        else f"says arch = {checkpoint.arch!r}, which no plugin knows (known: {', '.join(field_archs())}, timm's names)"
    )
    hint = (
        "Name it: --arch NAME, with its fields as --set arch.KEY=VALUE; timm's models are timm/NAME. `rscli plugins` lists all."
    )
    return InputError(f"{checkpoint.path} {says}", hint)
