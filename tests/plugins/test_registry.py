"""The registry: names, packages, variants, and plugins that do not load."""

from __future__ import annotations

import sys
import types
from importlib import metadata

import pytest

from rscli import distributions, registry
from rscli.api import API_VERSION, KINDS, Loss, Noise
from rscli.errors import PluginError
from rscli.registry import Entry, Registry, description, installed, load_entry


class Good(Loss):
    """The first line. Of more.

    And another.
    """

    scale: float = 1.0


class Wordless(Loss):
    __doc__ = None


class Zoo(Loss):
    """Has variants."""

    variant = "animal"
    animal: str


NOT_A_CLASS = Good()


@pytest.fixture
def module(monkeypatch):
    """A module of plugins, importable as `their_plugins`."""
    made = types.ModuleType("their_plugins")
    made.__dict__.update(Good=Good, Zoo=Zoo, NOT_A_CLASS=NOT_A_CLASS, Noise=type("Other", (Noise,), {}), function=lambda: None)
    monkeypatch.setitem(sys.modules, "their_plugins", made)
    load_entry.cache_clear()
    yield made
    load_entry.cache_clear()


def entry(name: str = "good", target: str = "their_plugins:Good", package: str = "theirs", kind: str = "losses") -> Entry:
    return Entry(kind, name, package, "1.2", target)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "presets"])
def test_core_plugins_of_every_kind_are_found_and_load(kind):
    entries = [entry for entry in installed().entries(kind) if entry.package == "rscli"]
    assert entries
    for each in entries:
        plugin = installed().load(kind, f"rscli:{each.name}")
        assert plugin.kind == kind
        assert description(plugin)
        assert description(plugin)[-1] not in ".,:;", f"{each} is described by half a sentence"


@pytest.mark.parametrize(
    ("version", "advice"), [(1, "Update theirs."), (0, "Update theirs."), (3, "Update rscli"), ("2", "Update rscli")]
)
def test_a_plugin_of_another_contract_says_which_side_to_update(module, version, advice):
    module.Old = type("Old", (Good,), {"api_version": version, "__module__": "their_plugins"})
    with pytest.raises(
        PluginError, match=f"written for version {version} of rscli.api, but this is version {API_VERSION}"
    ) as caught:
        load_entry(entry(target="their_plugins:Old"))
    assert advice in caught.value.hint
    assert load_entry(entry(target="their_plugins:Good")) is Good


def test_entries_are_sorted_by_kind_and_name():
    found = Registry([entry("b"), entry("a"), entry("z", kind="noises")]).entries()
    assert [(e.kind, e.name) for e in found] == [("noises", "z"), ("losses", "a"), ("losses", "b")]


def test_finding_imports_nothing():
    name = "module_that_is_not_there"
    assert Registry([entry(target=f"{name}:X")]).find("losses", "good")[0].target == f"{name}:X"
    assert name not in sys.modules


@pytest.mark.parametrize(
    ("asked", "near"), [("consistancy", "consistency"), ("rscli:gausian", "rscli:gaussian"), ("Stability", "stability")]
)
def test_an_unknown_name_suggests_the_nearest(asked, near):
    with pytest.raises(PluginError, match=f"no installed package provides the losses plugin '{asked}'") as error:
        installed().find("losses", asked)
    assert f"Did you mean '{near}'?" in error.value.hint


def test_a_name_like_no_other_suggests_nothing():
    with pytest.raises(PluginError) as error:
        installed().find("losses", "zzzzzzzz")
    assert "Did you mean" not in error.value.hint


def test_an_unknown_kind_lists_the_kinds():
    with pytest.raises(PluginError, match="'loss'") as error:
        installed().find("loss", "gaussian")
    assert all(kind in error.value.hint for kind in KINDS)


def test_a_name_of_two_packages_needs_its_package(module):
    found = Registry([entry(package="one-package"), entry(package="two", target="their_plugins:Zoo")])
    with pytest.raises(PluginError, match=r"two packages provide .*one-package 1\.2 and two 1\.2") as error:
        found.load("losses", "good")
    assert error.value.hint == "Write one-package:good or two:good."
    assert found.load("losses", "two:good") is Zoo
    assert found.load("losses", "one-package:good") is Good


@pytest.mark.parametrize("spelt", ["My.Package", "my_package", "my-package", "MY-PACKAGE"])
def test_packages_are_named_in_any_spelling_that_pip_takes(spelt):
    assert Registry([entry(package="My-Package")]).find("losses", f"{spelt}:good")[0].package == "My-Package"


def test_a_package_that_has_no_such_plugin_is_not_guessed():
    with pytest.raises(PluginError):
        Registry([entry(package="one")]).find("losses", "two:good")


def test_the_part_behind_the_slash_is_the_variant(module):
    found = Registry([entry("zoo", "their_plugins:Zoo"), entry()])
    assert found.find("losses", "zoo/a/b") == (entry("zoo", "their_plugins:Zoo"), "a/b")
    assert found.build("losses", {"name": "zoo/cat"}).animal == "cat"
    with pytest.raises(PluginError, match="takes no variant"):
        found.build("losses", {"name": "good/cat"})


def test_a_plugin_is_built_from_its_section(module):
    built = Registry([entry()]).build("losses", {"name": "theirs:good", "scale": 2.5})
    assert built == Good(scale=2.5)


def test_a_plugin_called_with_a_slash_is_found_before_a_variant(module):
    found = Registry([entry("zoo", "their_plugins:Zoo"), entry("zoo/own")])
    assert found.find("losses", "zoo/own") == (entry("zoo/own"), None)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module_at_all:X", "ModuleNotFoundError"),
        ("their_plugins:Missing", "AttributeError"),
        ("their_plugins:function", "not a plugin of that kind"),
        ("their_plugins:NOT_A_CLASS", "not a plugin of that kind"),
        ("their_plugins:Noise", "not a plugin of that kind"),
        ("their plugins!", ""),
    ],
    ids=["no-module", "no-attribute", "function", "instance", "another-kind", "no-target"],
)
def test_what_does_not_load_is_named_with_package_version_target_and_cause(module, target, reason):
    with pytest.raises(PluginError) as error:
        load_entry(entry(target=target))
    for text in ("losses plugin 'good'", "theirs 1.2", target, reason):
        assert text in error.value.message
    assert "theirs" in error.value.hint
    assert error.value.exit_code == 2


def test_provenance_names_package_and_version():
    origin = Registry([entry()]).provenance("losses", "theirs:good")
    assert (origin.kind, origin.name, origin.package, origin.version) == ("losses", "good", "theirs", "1.2")


@pytest.mark.parametrize(("plugin", "text"), [(Good, "The first line. Of more"), (Wordless, "")])
def test_the_description_is_the_first_line_without_its_full_stop(plugin, text):
    assert description(plugin) == text


def test_one_name_twice_from_one_package_is_one_plugin(tmp_path, monkeypatch):
    """An editable install and its metadata on the path twice must not make every name ambiguous."""
    for place in ("a", "b"):
        folder = tmp_path / place / "theirs-1.2.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.2\n")
        (folder / "entry_points.txt").write_text("[rscli.losses]\ngood = their_plugins:Good\n")
    read = distributions.read(metadata.distributions(path=[str(tmp_path / "a"), str(tmp_path / "b")]))
    monkeypatch.setattr(registry, "environment", lambda: read)
    installed.cache_clear()
    try:
        assert installed().entries() == [entry()]
        assert not registry.problems()
    finally:
        installed.cache_clear()
