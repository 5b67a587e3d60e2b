"""Finds plugins by their entry points, and loads one at a time.

Finding reads package metadata only: nothing of a plugin is imported until it is asked for, so a broken one harms nothing but
its own use. Core plugins are found the same way as anybody else's.
"""

from __future__ import annotations

import difflib
import signal
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from pydantic import ValidationError

from rscli.api import API_VERSION, KINDS, MOST_PARTS, READ_PART, Plugin, Provenance, fields_of, parts_of
from rscli.distributions import Problem, environment, normalised
from rscli.errors import PluginError, RscliError, did_you_mean, reason


@dataclass(frozen=True)
class Entry:
    """A plugin as its package announces it: where it is, without importing it."""

    kind: str
    name: str
    package: str
    version: str
    target: str

    def __str__(self) -> str:
        return f"{self.kind} plugin {self.name!r} of {self.package} {self.version} ({self.target})"


class Registry:
    """The plugins that the installed packages announce."""

    def __init__(self, entries: Iterable[Entry], defaults: Mapping[str, str] | None = None) -> None:
        self._defaults = dict(defaults or {})
        self._entries = sorted(entries, key=lambda e: (KINDS.index(e.kind), e.name, e.package))

    def entries(self, kind: str | None = None) -> list[Entry]:
        """Every announced plugin, or those of one `kind`, sorted by name."""
        return [entry for entry in self._entries if kind in (None, entry.kind)]

    def default(self, kind: str) -> str:
        """The name of the plugin of a `kind` that is used where none is named. Raises `PluginError` if there is none.

        Core plugins announce it in the entry-point group `rscli.defaults`, as `noises = "NAME"`.
        """
        if kind not in self._defaults:
            raise PluginError(f"no installed package announces a default for {kind}", "Reinstall rscli.")
        return self._defaults[kind]

    def usual(self, kind: str) -> list[str]:
        """The names of the plugins of a `kind` that are used unless they are left out: the default, then any further ones.

        Those are announced in the same group as `"callbacks.NAME" = "NAME"`.
        """
        return [self.default(kind), *(name for key, name in self._defaults.items() if key.startswith(f"{kind}."))]

    def find(self, kind: str, name: str) -> tuple[Entry, str | None]:
        """The entry called `name`, and the variant behind its slash (`timm/resnet18` is `timm` and `resnet18`).

        `package:name` chooses between packages. Raises `PluginError` if no plugin has that name (naming the nearest) or
        two packages provide it (naming both).
        """
        if kind not in KINDS:
            raise PluginError(f"there is no kind of plugin called {kind!r}", f"The kinds are: {', '.join(KINDS)}.")
        package, colon, rest = name.rpartition(":")
        for plugin_name, variant in ((rest, None), _split(rest)):
            found = [e for e in self.entries(kind) if e.name == plugin_name and (not colon or _same(e.package, package))]
            if len(found) > 1:
                both = " and ".join(f"{e.package} {e.version}" for e in found)
                raise PluginError(f"two packages provide the {kind} plugin {plugin_name!r}: {both}", _choice(found, rest))
            if found:
                return found[0], variant
        known = [e.name for e in self.entries(kind)] + [f"{e.package}:{e.name}" for e in self.entries(kind)]
        near = self.offering(kind, name) or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = did_you_mean(near[:1], "`rscli plugins` lists what is installed.")
        raise PluginError(f"no installed package provides the {kind} plugin {name!r}", hint)

    def offering(self, kind: str, name: str) -> list[str]:
        """The names, with a slash, under which plugins of `kind` offer what is called `name` elsewhere: `timm/resnet18`.

        Imports every plugin of the kind; broken ones offer nothing.
        """
        found = []
        for entry in self.entries(kind):
            try:
                plugin = load_entry(entry)
                if plugin.variant is not None and plugin.offers(name):
                    found.append(f"{entry.name}/{name}")
            except Exception:  # somebody else's code, asked on the way to an error of the user's
                continue
        return found

    def load(self, kind: str, name: str) -> type[Plugin]:
        """The plugin class called `name` (a variant behind a slash is ignored here).

        Raises `PluginError` if it is unknown, ambiguous, or does not load: whatever its import raises, SystemExit included.
        """
        return load_entry(self.find(kind, name)[0])

    def build(self, kind: str, section: Mapping[str, Any], parts: PartReader | None = None) -> Plugin:
        """A plugin from a configuration section: `name`, and its fields; `parts` reads the architectures inside of it.

        Raises `PluginError` as `load` does, and pydantic's `ValidationError` if the fields do not fit.
        """
        entry, variant = self.find(kind, str(section["name"]))
        plugin = load_entry(entry)
        fields = {plugin.renamed.get(key, key): value for key, value in section.items() if key != "name"}
        if variant is not None:
            if plugin.variant is None:
                raise PluginError(f"{entry} takes no variant, so {section['name']!r} means nothing", f"Write {entry.name!r}.")
            fields = {plugin.variant: variant, **fields}
        try:
            return plugin.model_validate(fields, context={READ_PART: parts or PartReader(self)})
        except (ValidationError, RscliError):
            raise
        except Exception as cause:  # a validator of the plugin's own
            raise PluginError(f"the {entry} cannot be built: {reason(cause)}", fix(entry)) from cause

    def provenance(self, kind: str, name: str) -> Provenance:
        """Which package, in which version, provides the plugin. Raises `PluginError` as `find` does."""
        entry, _ = self.find(kind, name)
        return Provenance(kind, entry.name, entry.package, entry.version)

    def full_section(self, kind: str, name: str, plugin: Plugin) -> dict[str, Any]:
        """A plugin's section in full; what the name says (timm/resnet18) is not said again."""
        _, variant = self.find(kind, name)
        said = {plugin.variant} if variant is not None else set()
        return {"name": name, **{field: value for field, value in fields_of(plugin).items() if field not in said}}

    def part_provenance(self, plugin: Plugin) -> list[Provenance]:
        """Where the architectures inside a plugin came from, at every depth; each once. Raises `PluginError` as `find` does."""
        found: dict[Provenance, None] = {}
        for part in parts_of(plugin):
            found[self.provenance("architectures", part.name)] = None
            found |= dict.fromkeys(self.part_provenance(self.build("architectures", part.section)))
        return list(found)


class PartReader:
    """Reads the architectures inside a plugin's fields, at every depth: builds each, and gives its section in full."""

    def __init__(self, registry: Registry) -> None:
        self.registry, self.count = registry, 0

    def __call__(self, section: Any) -> dict[str, Any]:
        """The full section. Raises `PluginError` if there are too many, `ValueError`, for the field, if it does not hold."""
        self.count += 1
        if self.count > MOST_PARTS:  # no ValueError, after which pydantic would go on to the next
            raise PluginError(f"there are more than {MOST_PARTS:,} architectures inside it", "Use fewer.")
        if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
            raise ValueError("must name an architecture: {name = NAME, ...}")
        kept = {key: section[key] for key in ("normalization",) if key in section}
        name, plugin = self.build({key: value for key, value in section.items() if key not in kept})
        return {**self.registry.full_section("architectures", name, plugin), **kept}

    def build(self, section: Mapping[str, Any]) -> tuple[str, Plugin]:
        """The name that is recorded, and the plugin."""
        try:
            return str(section["name"]), self.registry.build("architectures", section, self)
        except PluginError as cause:
            raise ValueError(str(cause).replace("\n", ". ")) from cause
        except ValidationError as cause:
            told = [f"{'.'.join(map(str, each['loc']))}: {_rule(each['msg'])}" for each in cause.errors(include_url=False)]
            raise ValueError(f"{section['name']!r} does not take its fields ({'; '.join(told[:10])})") from cause


_announced: dict[Entry, type[Plugin]] = {}
"""Plugins that no package announces: those of files that the user named."""


_origins: dict[type, Entry] = {}
"""Which entry a loaded class came from."""


def origin_of(plugin: type[Plugin]) -> Entry | None:
    """The entry that a loaded plugin class came from; None for a class that was not loaded through the registry."""
    return _origins.get(plugin)


def announce(entry: Entry, plugin: type[Plugin]) -> None:
    """Makes a plugin known to this process that no installed package announces."""
    _announced[entry] = plugin
    installed.cache_clear()


@cache
def installed() -> Registry:
    """The registry of everything installed in this environment, read once a process, and of what was announced."""
    found: dict[Entry, None] = dict.fromkeys(_announced)
    usual: dict[str, str] = {}
    for one in environment().distributions:
        for group, name, target in one.points:
            kind = group.removeprefix("rscli.")
            if kind in KINDS:
                found[Entry(kind, name, one.name, one.version, target)] = None
            elif kind == "defaults":
                usual.setdefault(name, target)
    return Registry(found, usual)


def problems() -> tuple[Problem, ...]:
    """The installed packages whose metadata is damaged or there twice: their plugins are left out."""
    return environment().problems


@cache
def load_entry(entry: Entry) -> type[Plugin]:
    """Imports one plugin and checks that it is of its kind. Raises `PluginError` with package, version, target and cause."""
    if entry in _announced:
        _origins[_announced[entry]] = entry
        return _announced[entry]
    point = metadata.EntryPoint(entry.name, entry.target, f"rscli.{entry.kind}")
    try:
        plugin = point.load()
    except BaseException as cause:
        if from_a_signal(cause):
            raise
        raise PluginError(f"the {entry} does not load: {reason(cause)}", fix(entry)) from cause
    if isinstance(plugin, type):
        _origins[plugin] = entry
    if not (isinstance(plugin, type) and issubclass(plugin, Plugin)) or getattr(plugin, "kind", None) != entry.kind:
        raise PluginError(f"the {entry} is not a plugin of that kind: it must be a class derived from rscli.api", fix(entry))
    check_contract(entry, plugin)
    return plugin


def check_contract(entry: Entry, plugin: type[Plugin]) -> None:
    """Raises `PluginError`, saying which side to update, if the plugin was written for another version of the contract."""
    if plugin.api_version != API_VERSION:
        text = f"the {entry} is written for version {plugin.api_version} of rscli.api, but this is version {API_VERSION}"
        older = isinstance(plugin.api_version, int) and plugin.api_version < API_VERSION
        raise PluginError(text, f"Update {entry.package}." if older else "Update rscli (pip install --upgrade rscli).")


def from_a_signal(cause: BaseException) -> bool:
    """Whether `cause` was raised by a signal (Ctrl-C), and not by a plugin.

    A handler of rscli's is the frame that raised it. Python's own leaves no frame: every KeyboardInterrupt is taken for real.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        return isinstance(cause, KeyboardInterrupt)
    frames = [frame.f_code for frame, _ in traceback.walk_tb(cause.__traceback__)]
    return bool(frames) and frames[-1] is getattr(handler, "__code__", None)


def description(plugin: type[Plugin]) -> str:
    """The first line of a plugin's docstring, without its full stop."""
    lines = (plugin.__doc__ or "").strip().splitlines()
    return lines[0].rstrip(".") if lines else ""


def fix(entry: Entry) -> str:
    """What to do about a broken plugin."""
    return f"Update or uninstall {entry.package} (pip install --upgrade {entry.package}); nothing else is affected."


def _choice(found: list[Entry], name: str) -> str:
    """How to choose between entries of one name. Within one package there is nothing to write."""
    packages = list(dict.fromkeys(normalised(entry.package) for entry in found))
    if len(packages) == 1:
        return f"Install {found[0].package} again: it announces one name for {' and '.join(e.target for e in found)}."
    return f"Write {' or '.join(f'{entry.package}:{name}' for entry in found)}."


def _rule(message: str) -> str:
    """What pydantic says of a field, as a rule."""
    return message.removeprefix("Value error, ").replace("Input should ", "must ").replace("Extra inputs are", "is")


def _split(name: str) -> tuple[str, str | None]:
    head, slash, tail = name.partition("/")
    return head, tail if slash else None


def _same(a: str, b: str) -> bool:
    """Whether two spellings name one distribution (PEP 503)."""
    return normalised(a) == normalised(b)
