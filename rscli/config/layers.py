"""Puts a training configuration together from its layers, and remembers where every value came from.

    defaults < preset < --config FILE < --set key=value < flags such as --seed

Naming another plugin in a higher layer drops what lower layers said in that section: those fields belong to the other plugin.
Everything that is wrong is reported at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from rscli import registry
from rscli.api import (
    Architecture,
    Attack,
    Callback,
    Dataset,
    Logger,
    Loss,
    Noise,
    Optimizer,
    Plugin,
    Provenance,
    Schedule,
    fields_of,
)
from rscli.config.files import read_settings
from rscli.config.presets import load_preset
from rscli.config.problems import FINITE, Problems
from rscli.config.ramps import check_ramps
from rscli.config.schema import GROUPS, SECTIONS, TrainConfig
from rscli.config.settings import Key, Setting, Settings, dotted, flatten, leaves, nest, parse_sets, scalars, stack
from rscli.config.words import field_type
from rscli.errors import PluginError, RscliError


def defaults() -> Settings:
    """What neither the schema nor a plugin can say: the usual noise, optimiser and schedule, as the core plugins announce."""
    return {
        (section, "name"): Setting(registry.installed().default(SECTIONS[section]), "default")
        for section in ("noise", "optimizer", "schedule")
    }


@dataclass(frozen=True)
class Resolved:
    """A configuration that holds: values, the plugins built from them, and the layer that each value came from.

    `plugins` maps a section to its plugin, `groups` a section of several to its plugins by name; `sources` maps a dotted key to
    `default`, `preset NAME`, a file, `--set` or a flag. `notes` says which keys were given under names of an earlier version.
    """

    config: TrainConfig
    plugins: dict[str, Plugin]
    groups: dict[str, dict[str, Plugin]]
    sources: dict[str, str]
    provenance: list[Provenance]
    preset: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def dataset(self) -> Dataset:
        """The data set."""
        return cast(Dataset, self.plugins["data"])

    @property
    def architecture(self) -> Architecture:
        """The architecture."""
        return cast(Architecture, self.plugins["arch"])

    @property
    def noise(self) -> Noise:
        """The smoothing distribution."""
        return cast(Noise, self.plugins["noise"])

    @property
    def loss(self) -> Loss:
        """The objective."""
        return cast(Loss, self.plugins["loss"])

    @property
    def attack(self) -> Attack | None:
        """What moves the clean images, if anything does."""
        return cast("Attack | None", self.plugins.get("attack"))

    @property
    def optimizer(self) -> Optimizer:
        """The optimiser."""
        return cast(Optimizer, self.plugins["optimizer"])

    @property
    def schedule(self) -> Schedule:
        """The learning rate over the epochs."""
        return cast(Schedule, self.plugins["schedule"])

    @property
    def loggers(self) -> dict[str, Logger]:
        """What keeps the figures of a run, by name."""
        return cast(dict[str, Logger], self.groups["loggers"])

    @property
    def callbacks(self) -> dict[str, Callback]:
        """What happens during training, by name."""
        return cast(dict[str, Callback], self.groups["callbacks"])

    @property
    def overrides(self) -> dict[str, Any]:
        """What departs from the preset: values by dotted key, of all that came from a layer above it."""
        given = {dotted(key): value for key, value in leaves(self.as_dict())}
        below = ("default", f"preset {self.preset}")
        return {key: value for key, value in given.items() if self.sources[key] not in below}

    @property
    def chunked(self) -> bool:
        """Whether a batch is split into m chunks: as `chunk` says, or else as the loss wants."""
        return self.loss.chunked if self.config.chunk is None else self.config.chunk

    def as_dict(self) -> dict[str, Any]:
        """The full configuration, defaults of plugins included, as plain JSON values; `rebuild` turns it back."""
        return self.config.model_dump(mode="json")


def resolve(
    preset: str | None = None,
    config_file: Path | None = None,
    sets: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Resolved:
    """The configuration from its layers, lowest first; `flags` maps dotted keys to values, None: not given.

    Raises `ConfigError` with every problem of the values, and `InputError` for an unknown preset or a file that cannot be read.
    """
    settings, notes = defaults(), list[str]()

    def put(layer: Settings) -> Settings:
        return stack(settings, _with_new_names(layer, settings, notes))

    if preset is not None:
        settings = put(flatten(load_preset(preset).settings, f"preset {preset}"))
    if config_file is not None:
        values = read_settings(config_file)
        values.pop("preset", None)  # the file may be a copy of a preset, which says in that section what it is
        settings = put(flatten(values, str(config_file)))
    chosen, malformed = read_sets(sets, settings)
    settings = put(chosen)
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    settings = put({tuple(key.split(".")): Setting(value, _flag(key)) for key, value in given.items()})
    return _assemble(settings, malformed, preset, tuple(notes))


def read_sets(sets: Iterable[str], lower: Settings, kinds: Mapping[str, str] = SECTIONS) -> tuple[Settings, list[str]]:
    """The settings in the texts of `--set` over `lower`, each read for its field, and a line for each text that is none.

    `kinds` maps the sections that name a plugin to its kind. A plugin that is unknown or does not load is passed over here.
    """
    sets = list(sets)
    named = stack(lower, parse_sets(sets, lambda key: str if key[-1] == "name" else Any)[0])
    models: dict[str, type[Plugin]] = {}
    for section, kind in kinds.items():
        name = named.get((section, "name"))
        if name is not None and isinstance(name.value, str):
            with suppress(PluginError):
                models[section] = registry.installed().load(kind, name.value)

    def type_of(key: Key) -> Any:
        if key[0] in GROUPS:
            return _type_in_group(key)
        if len(key) == 1 or key[0] not in kinds:
            return field_type(TrainConfig, key)
        if key[1:] == ("name",):
            return str
        model = models.get(key[0])
        return Any if model is None else field_type(model, (model.renamed.get(key[1], key[1]), *key[2:]))

    return parse_sets(sets, type_of)


def _type_in_group(key: Key) -> Any:
    """The type of a field such as `callbacks.checkpoint.every`; unknown for a plugin as a whole, and where there is none."""
    if len(key) > 2:
        with suppress(PluginError):
            return field_type(registry.installed().load(key[0], key[1]), key[2:])
    return Any


def rebuild(config: Mapping[str, Any]) -> Resolved:
    """The configuration that `Resolved.as_dict` wrote down. Raises `ConfigError` if it no longer fits the installed plugins."""
    lower = defaults()
    return _assemble(stack(lower, _with_new_names(flatten(config, "saved configuration"), lower, [])))


def as_now(config: Any) -> Any:
    """A recorded configuration in the words of this version, new settings included; unchanged where it no longer holds."""
    try:
        return rebuild(config).as_dict()
    except (RscliError, AttributeError, TypeError, ValueError):
        return config


def decisive(config: Any) -> Any:
    """A recorded configuration without what only looks on, and may differ in a run that is resumed: loggers, and callbacks that
    say so of themselves. Anything but a table stays as it is.
    """
    if not isinstance(config, dict):
        return config
    callbacks = {name: fields for name, fields in (config.get("callbacks") or {}).items() if not _looks_on(name)}
    kept = {key: value for key, value in config.items() if key not in (*GROUPS, "init")}  # its digest counts, not its path
    return {**kept, "callbacks": callbacks} if callbacks else kept


def _looks_on(callback: str) -> bool:
    try:
        return cast(type[Callback], registry.installed().load("callbacks", callback)).looks_on
    except PluginError:
        return False


def _assemble(
    settings: Settings, malformed: Iterable[str] = (), preset: str | None = None, notes: tuple[str, ...] = ()
) -> Resolved:
    """Validates everything, builds the plugins, and fills in their defaults."""
    problems = Problems(settings, malformed)
    for key, setting in settings.items():
        if any(isinstance(number, float) and not math.isfinite(number) for number in scalars(setting.value)):
            problems.add(key, FINITE)
    nested = nest(settings)
    sections = {name: nested.pop(name, None) for name in SECTIONS}
    several = {name: nested.pop(name, {}) for name in GROUPS}
    head = _head(nested, problems)
    plugins = {name: plugin for name, given in sections.items() if (plugin := build_section(name, given, problems)) is not None}
    groups = {name: _build_group(name, given, problems) for name, given in several.items()}
    if head is not None and "loss" in plugins:
        _check_chunks(head, cast(Loss, plugins["loss"]), problems)
    if head is not None:
        check_ramps(head, plugins, problems)
        _check_holdout(head, groups["callbacks"], problems)
    if head is not None and head.init is not None and getattr(plugins.get("arch"), "pretrained", False):
        problems.add(("init",), "names a file of weights, and arch.pretrained = true asks for others; leave one out")
    problems.check()
    assert head is not None  # for mypy: without a head there was a problem
    names = {name: str(sections[name]["name"]) for name in plugins}
    full: dict[str, Any] = {name: full_section(name, names[name], plugin) for name, plugin in plugins.items()}
    full |= {group: {name: dict(fields_of(plugin)) for name, plugin in built.items()} for group, built in groups.items()}
    config = head.model_copy(update=full)
    origins = {dotted(key): _origin(key, settings) for key, _ in leaves(config.model_dump(mode="json"))}
    found = registry.installed()
    provenance = [found.provenance(SECTIONS[name], names[name]) for name in plugins]
    provenance += [found.provenance(group, name) for group, built in groups.items() for name in built]
    provenance += [one for plugin in plugins.values() for one in found.part_provenance(plugin) if one not in provenance]
    return Resolved(config, plugins, groups, origins, provenance, preset, notes)


def _with_new_names(layer: Settings, lower: Settings, notes: list[str]) -> Settings:
    """A `layer` over `lower` with the names that fields have now; a note for each that had another in an earlier version."""
    found = dict(layer)
    for section, kind in SECTIONS.items():
        named = layer.get((section, "name")) or lower.get((section, "name"))
        try:
            renamed = registry.installed().load(kind, str(named.value)).renamed if named else {}
        except PluginError:
            continue  # said when the section is built
        for old, new in renamed.items():
            if (section, old) not in found:
                continue
            given = found.pop((section, old))
            if (section, new) in found:
                notes.append(
                    f"{section}.{old} ({given.source}) is ignored: it is now called {section}.{new}, which is given too"
                )
            else:
                notes.append(f"{section}.{old} is now called {section}.{new} ({given.source})")
                found[section, new] = given
    if ("data", "limit") in found and ("limit",) not in found and not _has_limit(layer, lower):
        found["limit",] = found.pop(("data", "limit"))
    return found


def _has_limit(layer: Settings, lower: Settings) -> bool:
    """Whether the data set itself has a setting `limit`: elsewhere, data.limit is another way to write limit."""
    named = layer.get(("data", "name")) or lower.get(("data", "name"))
    try:
        return named is not None and "limit" in registry.installed().load("datasets", str(named.value)).model_fields
    except PluginError:
        return False


def _head(nested: dict[str, Any], problems: Problems) -> TrainConfig | None:
    """Everything but the plugins' sections, which stay empty here."""
    problems.models |= {"": TrainConfig}
    try:
        return TrainConfig(**nested, data={}, arch={}, noise={}, loss={}, optimizer={}, schedule={})
    except ValidationError as error:
        problems.add_errors(error, (), nested)
        return None


def _build_group(group: str, given: Any, problems: Problems) -> dict[str, Plugin]:
    """The plugins of a section that holds several, by name: those given, and the usual ones unless they are set to none."""
    if not isinstance(given, dict | None):
        problems.add((group,), f"is a section of plugins; write {group}.NAME={{}}")
        return {}
    found, built = registry.installed(), {}
    for name, fields in {**{usual: {} for usual in found.usual(group)}, **(given or {})}.items():
        if fields is None:
            continue
        if not isinstance(fields, dict):
            problems.add((group, name), f"is a table of settings; write {group}.{name}={{}}, or none to leave it out")
            continue
        try:
            problems.models[f"{group}.{name}"] = found.load(group, name)
            built[name] = found.build(group, {**fields, "name": name})
        except PluginError as error:
            problems.add((group, name), f"{error.message}. {error.hint}" if error.hint else error.message)
        except ValidationError as error:
            problems.add_errors(error, (group, name), fields)
    return built


def build_section(section: str, given: Any, problems: Problems, kind: str | None = None) -> Plugin | None:
    """The plugin of a section (`kind` None: of the kind in `SECTIONS`); None if it has none, or after a problem was noted."""
    kind, key = kind or SECTIONS[section], (section, "name")
    if given is None and section == "attack":
        return None
    if not isinstance(given, dict | None):
        problems.add((section,), f"is a section; write {section}.name=NAME")
        return None
    found = registry.installed()
    if given is None or not isinstance(given.get("name"), str):
        names = ", ".join(dict.fromkeys(entry.name for entry in found.entries(kind)))
        problems.add(key, f"must name a plugin; write --set {section}.name=NAME, one of: {names}")
        return None
    try:
        plugin = found.load(kind, given["name"])
        problems.models[section] = plugin
        variant = found.find(kind, given["name"])[1]
        if variant is not None and plugin.variant is not None and plugin.variant in given:
            problems.add((section, plugin.variant), f"is already given by {section}.name = {given['name']!r}; leave one out")
            return None
        return found.build(kind, given)
    except PluginError as error:
        problems.add(key, f"{error.message}. {error.hint}" if error.hint else error.message)
    except ValidationError as error:
        problems.add_errors(error, (section,), given)
    return None


def _check_chunks(head: TrainConfig, loss: Loss, problems: Problems) -> None:
    chunked = loss.chunked if head.chunk is None else head.chunk
    if chunked and loss.m > head.batch:
        problems.add(
            ("loss", "m"), f"must be at most batch = {head.batch}, which is split into m chunks; or write --set chunk=false"
        )


def _check_holdout(head: TrainConfig, callbacks: Mapping[str, Plugin], problems: Problems) -> None:
    for name, callback in callbacks.items():
        if cast(Callback, callback).needs_holdout and not head.holdout:
            problems.add(("holdout",), f"must be above 0: callbacks.{name} looks at images set aside; write --set holdout=1000")


def full_section(section: str, name: str, plugin: Plugin) -> dict[str, Any]:
    """A plugin's section in full; what the name says (timm/resnet18) is not said again."""
    return registry.installed().full_section(SECTIONS[section], name, plugin)


def _origin(key: Key, settings: Settings) -> str:
    """The layer of a value: of the key itself, or of the table that was given whole."""
    given = next((settings[key[:length]] for length in range(len(key), 0, -1) if key[:length] in settings), None)
    return "default" if given is None else given.source


def _flag(key: str) -> str:
    return "--data-limit" if key == "limit" else "--" + key.rpartition(".")[2].replace("_", "-")
