"""Architectures inside architectures: what a model file says of them, what it takes to read them again, and their bounds."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rscli import registry
from rscli.api import Composite, Part, Parts, parts_of
from rscli.config.layers import rebuild, resolve
from rscli.errors import ConfigError, InputError, PluginError, RscliError
from rscli.models.card import ModelCard
from rscli.models.compose import compose
from rscli.models.modelfile import content_digest, load_model, save_model
from rscli.models.network import Classifier, build_classifier
from rscli.plugin_files import load_plugin_file
from rscli.registry import installed
from rscli.training.model_card import model_card
from rscli.training.trainer import initial_classifier

BASE = ("data.name=digits", "noise.sigma=0.25", "loss.name=gaussian", "optimizer.lr=0.1")
TWO = ("arch.name=ensemble", 'arch.members=[{name="lenet"}, {name="cifar-resnet", depth=8}]')
MEMBER = """
    from rscli.api import Architecture

    print("the file runs")

    class Member(Architecture):
        \"\"\"A linear network.\"\"\"

        def build(self, spec, *, weights=True):
            from torch import nn

            return nn.Sequential(nn.Flatten(), nn.Linear(784, len(spec.class_names), bias={bias}))
"""


def made(*sets: str) -> tuple[Classifier, ModelCard]:
    """A classifier with its initial weights, and its card."""
    resolved = resolve(sets=[*BASE, *sets])
    spec = resolved.dataset.spec(Path()).model_copy(update={"mean": (0.25,), "std": (0.5,)})
    return initial_classifier(resolved, spec), model_card(resolved, spec, {})


def forged(path: Path, card: ModelCard, arch: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    """A model file whose card says another architecture, with the digest that belongs to it."""
    tensors = {"x": torch.zeros(3)} if tensors is None else tensors
    raw = {**card.model_dump(mode="json"), "arch": arch}
    raw["sha256"] = content_digest(tensors, raw)
    save_file(tensors, path, metadata={"rscli": json.dumps(raw)})
    return path


def refusal(path: Path) -> RscliError:
    with pytest.raises(RscliError) as caught:
        load_model(path)
    assert caught.value.exit_code == 2
    return caught.value


def written(folder: Path, text: str, **values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "my_member.py"
    path.write_text(textwrap.dedent(text).format(**values))
    return path


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Plugins of files are known in one test only."""
    yield
    forget()


def forget() -> None:
    registry._announced.clear()
    registry.load_entry.cache_clear()
    installed.cache_clear()


# --- what is recorded --------------------------------------------------------------------------------------------------------


def test_the_record_has_every_field_and_where_each_part_came_from():
    members = '["lenet", {name="timm/resnet18"}, {name="ensemble", members=["lenet"]}]'
    resolved = resolve(
        sets=[
            *BASE,
            "arch.name=ensemble",
            f"arch.members={members}",
        ]
    )
    assert resolved.as_dict()["arch"]["members"] == [
        {"name": "lenet"},
        {
            "name": "timm/resnet18",
            "pretrained": False,
            "input_size": None,
            "drop_rate": None,
            "drop_path_rate": None,
            "grad_checkpointing": False,
            "kwargs": {},
        },
        {"name": "ensemble", "members": [{"name": "lenet"}], "average": "logits"},
    ]
    found = [one.name for one in resolved.provenance if one.kind == "architectures"]
    assert found == ["ensemble", "lenet", "timm"]
    again = rebuild(resolved.as_dict())
    assert (again.as_dict(), again.plugins, again.provenance) == (resolved.as_dict(), resolved.plugins, resolved.provenance)


def test_a_model_of_parts_reads_back_as_it_was(tmp_path):
    classifier, card = made(*TWO)
    save_model(tmp_path / "m", classifier, card)
    loaded = load_model(tmp_path / "m")
    images = torch.rand(5, 1, 28, 28)
    with torch.inference_mode():
        assert torch.equal(loaded.network(images), classifier.eval()(images))
    assert {"members.0.network.conv1.weight", "members.1.network.fc.bias"} <= set(classifier.network.state_dict())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ('["lenett"]', "Did you mean 'lenet'?"),
        ('[{name="cifar-resnet", depth=9}]', "'cifar-resnet' does not take its fields (depth: depth must be 6 n + 2"),
        ('[{name="lenet", width=3}]', "width: is not permitted"),
        ("[3]", "must name an architecture"),
        ("[{}]", "must name an architecture"),
        ("[]", "must hold one architecture or more"),
        ('[{name="ensemble", members=[{name="denoised", denoiser="dncnn"}]}]', "classifier: Field required"),
    ],
)
def test_a_part_that_does_not_hold_is_one_line_under_its_key(value, said):
    with pytest.raises(ConfigError) as caught:
        resolve(sets=[*BASE, "arch.name=ensemble", f"arch.members={value}"])
    (line,) = caught.value.problems
    assert line.startswith("arch.members")
    assert said in line


def test_naming_another_part_drops_what_a_lower_layer_said_of_the_one_before(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('[arch]\nname = "denoised"\ndenoiser = "dncnn"\n[arch.classifier]\nname = "cifar-resnet"\ndepth = 8\n')
    assert resolve(config_file=file, sets=BASE).config.arch["classifier"] == {"name": "cifar-resnet", "depth": 8}
    deeper = resolve(config_file=file, sets=[*BASE, "arch.classifier.depth=14"]).config.arch["classifier"]
    assert deeper == {"name": "cifar-resnet", "depth": 14}
    for other in ("arch.classifier.name=lenet", "arch.classifier=lenet"):
        assert resolve(config_file=file, sets=[*BASE, other]).config.arch["classifier"] == {"name": "lenet"}


# --- where parts are taken from ----------------------------------------------------------------------------------------------


def test_a_part_that_is_missing_is_named_with_its_package(tmp_path):
    classifier, card = made(*TWO)
    plugins = [{**p, "package": "away", "version": "1.2.3"} if p["name"] == "lenet" else p for p in card.plugins]
    save_model(tmp_path / "m", classifier, card.model_copy(update={"plugins": plugins}))
    error = refusal(tmp_path / "m")
    for text in (str(tmp_path / "m"), "needs the architectures plugin 'lenet'", "away 1.2.3", "pip install away"):
        assert text in str(error)
    assert isinstance(error, PluginError)


def test_fields_that_a_part_no_longer_takes_are_named(tmp_path):
    classifier, card = made(*TWO)
    arch = {**card.arch, "members": [{"name": "lenet", "width": 3}]}
    save_model(tmp_path / "m", classifier, card.model_copy(update={"arch": arch}))
    assert f"'lenet' does not accept the fields that {tmp_path / 'm'} records: width" in str(refusal(tmp_path / "m"))


@pytest.mark.usefixtures("forgotten")
def test_a_part_from_a_file_wants_that_file(tmp_path):
    load_plugin_file(written(tmp_path / "a", MEMBER, bias=True))
    classifier, card = made("arch.name=ensemble", 'arch.members=["member", "lenet"]')
    (origin,) = [p for p in card.plugins if p["name"] == "member"]
    assert (origin["package"], origin["version"][:7]) == ("my_member.py", "sha256:")
    save_model(tmp_path / "m", classifier, card)

    forget()
    assert f"comes from the file my_member.py with {origin['version']}: pass that file with --plugin" in str(
        refusal(tmp_path / "m")
    )
    load_plugin_file(written(tmp_path / "b", MEMBER, bias=False))
    assert "the file my_member.py that was given is a different one" in str(refusal(tmp_path / "m"))
    forget()
    load_plugin_file(tmp_path / "a/my_member.py")
    assert torch.equal(
        load_model(tmp_path / "m").network.network.state_dict()["members.0.network.1.bias"],
        classifier.network.members[0].network[1].bias,
    )


@pytest.mark.usefixtures("forgotten")
def test_two_parts_of_one_name_come_from_their_packages(tmp_path):
    """A file calls its network as a package does: composed, each part says which of them it is."""
    save_model(tmp_path / "core", *made("arch.name=lenet"))
    text = MEMBER.replace("Member(", "Lenet(")
    load_plugin_file(written(tmp_path / "a", text, bias=True))
    save_model(tmp_path / "own", *made("arch.name=my_member.py:lenet"))
    models = [load_model(tmp_path / name) for name in ("core", "own")]
    both = compose("ensemble", {"members": models})
    assert [part["name"] for part in both.card.arch["members"]] == ["rscli:lenet", "my_member.py:lenet"]
    save_model(tmp_path / "both", both.network, both.card)
    images = torch.rand(3, 1, 28, 28)
    with torch.inference_mode():
        wanted = torch.stack([model.network(images) for model in models]).mean(0)
        assert torch.equal(load_model(tmp_path / "both").network(images), wanted)


@pytest.mark.parametrize(
    "name", ["os:system", "builtins:exec", "{}:Member", "{}:member", "my_member:Member", "rscli.api:Plugin", ":", ""]
)
def test_a_name_in_a_model_file_makes_no_code_run(tmp_path, name, capsys, monkeypatch):
    path = written(tmp_path / "a", MEMBER, bias=True)
    monkeypatch.syspath_prepend(path.parent)
    _, card = made("arch.name=lenet")
    error = refusal(forged(tmp_path / "m", card, {"name": "ensemble", "members": [{"name": name.format(path)}]}))
    assert "no installed package provides the architectures plugin" in str(error)
    assert "the file runs" not in capsys.readouterr().out


# --- bounds ------------------------------------------------------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    section: dict[str, Any] = {"name": "lenet"}
    for _ in range(depth):
        section = {"name": "ensemble", "members": [section]}
    return section


LARGE = {"name": "cifar-densenet", "depth": 994, "growth": 1000}


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ({"name": "ensemble", "members": [{"name": "lenet"}] * 1001}, "more than 1,000 architectures"),
        ({"name": "ensemble", "members": [{"name": "ensemble", "members": [{"name": "lenet"}] * 50}] * 50}, "more than 1,000"),
        ({"name": "ensemble", "members": [{}] * 300_000}, "more than 1,000"),
        (nested(40), "nested more than 32 levels deep"),
        ({"name": "ensemble", "members": [{"name": "lenet"}, LARGE]}, "much larger than the weights"),
        ({"name": "denoised", "denoiser": {"name": "dncnn", "width": 4096}, "classifier": {"name": "lenet"}}, "much larger"),
        ({"name": "denoised", "denoiser": "lenet", "classifier": "lenet"}, "lenet' gives logits"),
        ({"name": "denoised", "denoiser": "dncnn", "classifier": "dncnn"}, "dncnn' gives images"),
        ({"name": "dncnn"}, "no classifier by itself"),
        ({"name": "ensemble", "members": [{"name": "lenet", "normalization": {"mean": [0.5] * 3, "std": [1] * 3}}]}, "3 means"),
        ({"name": "ensemble", "members": [{"name": "lenet", "normalization": {"mean": [0.5], "std": [0]}}]}, "std"),
        ({"name": "ensemble", "members": [{"name": "lenet", "normalization": 1}]}, "normalization"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_bounds_hold_for_parts(tmp_path, arch, said):
    _, card = made("arch.name=lenet")
    path, start = forged(tmp_path / "m", card, arch), time.monotonic()
    assert said in str(refusal(path))
    assert time.monotonic() - start < 10


def test_what_could_not_be_read_again_is_not_composed(tmp_path):
    save_model(tmp_path / "m", *made("arch.name=lenet"))
    model = load_model(tmp_path / "m")
    for _ in range(14):
        model = compose("ensemble", {"members": [model]})
    save_model(tmp_path / "deep", model.network, model.card)
    model = compose("ensemble", {"members": [load_model(tmp_path / "deep")]})
    with pytest.raises(InputError, match="nested more than 32 levels"):
        compose("ensemble", {"members": [model]})
    assert load_model(tmp_path / "deep").classes == 10


# --- normalisation -----------------------------------------------------------------------------------------------------------


def with_constants(path: Path, mean: float | None, std: float | None, *sets: str) -> nn.Module:
    """Writes a model with these constants; its network without them."""
    resolved = resolve(sets=[*BASE, *sets])
    update = {"mean": None if mean is None else (mean,), "std": None if std is None else (std,)}
    spec = resolved.dataset.spec(Path()).model_copy(update=update)
    classifier = initial_classifier(resolved, spec)
    save_model(path, classifier, model_card(resolved, spec, {}))
    return classifier.network.eval()


def test_every_member_keeps_its_own_normalisation(tmp_path):
    constants = [(0.25, 0.5), (0.5, 0.125), (None, None)]
    networks = [with_constants(tmp_path / str(n), *c, "arch.name=lenet", f"seed={n}") for n, c in enumerate(constants)]
    model = compose("ensemble", {"members": [load_model(tmp_path / str(n)) for n in range(3)]})
    assert [part.get("normalization") for part in model.card.arch["members"]] == [
        {"mean": [0.25], "std": [0.5]},
        {"mean": [0.5], "std": [0.125]},
        None,
    ]
    assert (model.card.spec.mean, model.card.spec.std) == (None, None)
    save_model(tmp_path / "all", model.network, model.card)
    images = torch.rand(4, 1, 28, 28)
    with torch.inference_mode():
        logits = [
            network.double()((images.double() - (mean or 0)) / (std or 1)).numpy()
            for network, (mean, std) in zip(networks, constants, strict=True)
        ]
        for found in (model, load_model(tmp_path / "all")):
            assert np.allclose(found.network(images).numpy(), np.mean(logits, axis=0), atol=1e-5)
    # an ensemble of ensembles with other constants again: what is inside keeps its own
    with_constants(tmp_path / "pair", 0.75, 0.25, *TWO)
    pair = load_model(tmp_path / "pair")
    more = compose("ensemble", {"members": [model, pair, load_model(tmp_path / "0")]})
    with torch.inference_mode():
        wanted = sum(each.network(images) for each in (model, pair, load_model(tmp_path / "0"))) / 3
        assert torch.allclose(more.network(images), wanted, atol=1e-6)


def test_members_of_one_normalisation_share_that_of_the_data(tmp_path):
    for n in range(2):
        with_constants(tmp_path / str(n), 0.25, 0.5, "arch.name=lenet", f"seed={n}")
    model = compose("ensemble", {"members": [load_model(tmp_path / str(n)) for n in range(2)]})
    assert (model.card.spec.mean, model.card.spec.std) == ((0.25,), (0.5,))
    assert model.card.arch["members"] == [{"name": "rscli:lenet"}] * 2


# --- composite architectures that break their contract -----------------------------------------------------------------------

BROKEN = """
    from rscli.api import Architecture, Composite, Part

    class Deaf(Composite):
        \"\"\"Builds no part.\"\"\"

        part: Part

        def compose(self, spec, parts):
            from torch import nn

            return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

    class Short(Architecture):
        \"\"\"Gives a logit too few.\"\"\"

        def build(self, spec, *, weights=True):
            from torch import nn

            return nn.Sequential(nn.Flatten(), nn.Linear(784, 9))

    class Raising(Architecture):
        \"\"\"Builds nothing.\"\"\"

        def build(self, spec, *, weights=True):
            return 1 // 0
"""


@pytest.mark.usefixtures("forgotten")
def test_whose_fault_it_is_is_said(tmp_path):
    load_plugin_file(written(tmp_path / "a", BROKEN))
    save_model(tmp_path / "m", *made("arch.name=lenet"))
    with pytest.raises(PluginError, match=r"the architecture deaf of my_member\.py .* did not build"):
        compose("deaf", {"part": load_model(tmp_path / "m")})
    _, card = made("arch.name=lenet")
    for name, said in (("short", "logits of shape (2, 9), not (2, 10)"), ("raising", "ZeroDivisionError")):
        plugin = installed().build("architectures", {"name": "ensemble", "members": ["lenet", name]})
        with pytest.raises(PluginError) as caught:
            build_classifier(plugin, card.spec)
        assert f"the architecture {name} of my_member.py" in str(caught.value)
        assert said in str(caught.value)


class Twice(Composite):
    """A part in a table and one in a list."""

    table: dict[str, Part] = {}
    rest: list[Part] = []

    def compose(self, spec: Any, parts: Parts) -> nn.Module:
        raise NotImplementedError


def test_parts_are_found_in_tables_and_lists():
    plugin = Twice(table={"a": {"name": "x"}, "b": {"name": "y", "depth": 3}}, rest=[{"name": "z"}])
    assert [part.section for part in parts_of(plugin)] == [{"name": "x"}, {"name": "y", "depth": 3}, {"name": "z"}]


def test_pretrained_weights_of_parts_are_not_fetched_for_a_file(monkeypatch):
    from rscli_core.architectures.timm import TimmModel

    seen: list[bool] = []

    def create(self: TimmModel, pretrained: bool, *_: Any, **__: Any) -> nn.Module:
        seen.append(pretrained)
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

    monkeypatch.setattr(TimmModel, "_create", create)
    monkeypatch.setattr("rscli_core.architectures._hub.no_network", lambda model: None)
    section = {"name": "ensemble", "members": [{"name": "timm/resnet18", "pretrained": True}]}
    _, card = made("arch.name=lenet")
    for weights in (False, True):
        build_classifier(installed().build("architectures", section), card.spec, weights=weights)
    assert seen == [False, True]
