"""Layers of a training configuration: what wins, where a value came from, and what is said when something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import Field, model_validator

from rscli import api, registry
from rscli.config import layers, presets
from rscli.config.layers import rebuild, resolve
from rscli.config.problems import nearest
from rscli.config.schema import (
    PresetHeader,
    PublishedKey,
    TrainConfig,
    chunk_count,
    smallest_step,
    steps_per_epoch,
)
from rscli.config.settings import flatten, nest, parse_sets
from rscli.errors import ConfigError, InputError
from rscli.registry import Entry, Registry
from rscli_core.callbacks.checkpoint import Checkpoint
from rscli_core.loggers.jsonl import JsonLines
from rscli_core.optimizers.sgd import Sgd
from rscli_core.schedules.step import Step


class Digits(api.Dataset):
    size: int = Field(28, ge=1, description="pixels of a side")
    folder: Path = Path("data")


class Small(api.Architecture):
    width: int = 8


class Zoo(api.Architecture):
    variant: ClassVar[str | None] = "model"
    model: str = Field(description="a name from the zoo")
    kwargs: dict[str, bool | int | float | str] = Field(default_factory=dict)


class Gauss(api.Noise):
    norm = "L2"


class Laplace(api.Noise):
    norm = "L1"


class Consistency(api.Loss):
    m: int = Field(2, ge=1, description="noisy copies")
    lbd: float = Field(ge=0, description="weight of the consistency term")
    eta: float = Field(0.5, ge=0)
    form: Literal["default", "xent", "mse"] = "default"

    @model_validator(mode="after")
    def _copies(self) -> Consistency:
        if self.form == "mse" and self.m < 2:
            raise ValueError("the form mse needs m >= 2")
        return self


class Stability(api.Loss):
    chunked: ClassVar[bool] = False
    lbd: float = Field(2.0, ge=0)


class Pgd(api.Attack):
    epsilon: float = Field(1.0, gt=0)
    steps: int = Field(10, ge=1)


PLUGINS = [
    ("datasets", "digits", Digits),
    ("architectures", "small", Small),
    ("architectures", "zoo", Zoo),
    ("noises", "gaussian", Gauss),
    ("noises", "laplace", Laplace),
    ("losses", "consistency", Consistency),
    ("losses", "stability", Stability),
    ("attacks", "pgd", Pgd),
    ("optimizers", "sgd", Sgd),
    ("schedules", "step", Step),
    ("loggers", "jsonl", JsonLines),
    ("callbacks", "checkpoint", Checkpoint),
]

BASE = """
epochs = 30
[preset]
title = "a row"
source = "a paper"
[data]
name = "digits"
[arch]
name = "small"
[noise]
sigma = 0.25
[loss]
name = "consistency"
lbd = 10.0
[attack]
name = "pgd"
epsilon = 2.0
[optimizer]
lr = 0.01
[schedule]
milestones = [10, 20]
"""


@pytest.fixture(autouse=True)
def _fake_plugins(monkeypatch, tmp_path):
    """Plugins of this file, and one preset called `row`, found the way that installed ones are."""
    package = tmp_path / "fake_presets"
    package.mkdir()
    (package / "row.toml").write_text(BASE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    (package / "__init__.py").write_text("raise RuntimeError('a package of presets is never imported')", encoding="utf-8")
    entries = [Entry(kind, name, "fake", "1.0", f"{plugin.__module__}:{plugin.__name__}") for kind, name, plugin in PLUGINS]
    entries.append(Entry("presets", "fake", "fake", "1.0", "fake_presets"))
    entries.append(Entry("losses", "broken", "bad-package", "0.3", "no_such_module_at_all:Loss"))
    usual = {"noises": "gaussian", "optimizers": "sgd", "schedules": "step", "loggers": "jsonl", "callbacks": "checkpoint"}
    fake = Registry(entries, usual)
    monkeypatch.setattr(registry, "installed", lambda: fake)


def problems(*sets: str, preset: str | None = "row", **more) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(preset, sets=sets, **more)
    return caught.value.problems


# --- layers and sources -----------------------------------------------------------------------------------------------------


def test_every_layer_overrides_the_one_below_and_is_remembered(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("epochs = 4\nbatch = 64\nseed = 1\n[optimizer]\nmomentum = 0.5\n", encoding="utf-8")
    found = resolve("row", file, ["batch=32", "seed=2"], {"seed": 3, "epochs": None})
    config, sources = found.config, found.sources
    assert (config.optimizer["weight_decay"], sources["optimizer.weight_decay"]) == (1e-4, "default")
    assert (config.optimizer["lr"], sources["optimizer.lr"]) == (0.01, "preset row")
    assert (config.epochs, sources["epochs"]) == (4, str(file))
    assert (config.optimizer["momentum"], sources["optimizer.momentum"]) == (0.5, str(file))
    assert (config.batch, sources["batch"]) == (32, "--set")
    assert (config.seed, sources["seed"]) == (3, "--seed")
    assert (config.loss["eta"], sources["loss.eta"]) == (0.5, "default")
    assert (config.noise["name"], sources["noise.name"]) == ("gaussian", "default")
    assert sources["attack.epsilon"] == "preset row"


def test_every_leaf_has_a_source():
    found = resolve("row", sets=["arch.name=zoo/tiny", "arch.kwargs.drop_rate=0.1"])
    leaves = {".".join(key) for key in flatten(found.as_dict(), "x")}
    assert set(found.sources) == leaves | {"ramps"}  # a section without anything in it
    assert found.sources["arch.kwargs.drop_rate"] == "--set"


def test_plugins_are_built_and_their_package_is_recorded():
    found = resolve("row")
    assert found.loss == Consistency(lbd=10.0)
    assert found.noise == Gauss(sigma=0.25)
    assert found.dataset == Digits()
    assert found.architecture == Small()
    assert found.attack == Pgd(epsilon=2.0)
    assert [(p.kind, p.name, p.package, p.version) for p in found.provenance] == [
        ("datasets", "digits", "fake", "1.0"),
        ("architectures", "small", "fake", "1.0"),
        ("noises", "gaussian", "fake", "1.0"),
        ("losses", "consistency", "fake", "1.0"),
        ("attacks", "pgd", "fake", "1.0"),
        ("optimizers", "sgd", "fake", "1.0"),
        ("schedules", "step", "fake", "1.0"),
        ("loggers", "jsonl", "fake", "1.0"),
        ("callbacks", "checkpoint", "fake", "1.0"),
    ]


def test_naming_another_plugin_drops_the_fields_of_the_first():
    found = resolve("row", sets=["loss.name=stability"])
    assert found.loss == Stability(lbd=2.0)  # not the preset's 10
    assert found.sources["loss.lbd"] == "default"


def test_naming_another_plugin_keeps_the_fields_of_the_same_and_of_higher_layers():
    found = resolve("row", sets=["loss.lbd=3", "loss.name=stability"], flags={"loss.m": 4})
    assert found.loss == Stability(lbd=3.0, m=4)


def test_naming_the_same_plugin_keeps_its_fields():
    assert resolve("row", sets=["loss.name=consistency"]).loss == Consistency(lbd=10.0)


def test_a_new_noise_asks_for_its_own_sigma():
    assert problems("noise.name=laplace") == [
        "noise.sigma: is missing (standard deviation of the noise); write --set noise.sigma=VALUE"
    ]


def test_none_takes_the_attack_away():
    found = resolve("row", sets=["attack=none"])
    assert found.attack is None
    assert found.config.attack is None
    assert found.sources["attack"] == "--set"


def test_an_attack_can_come_back_above_the_layer_that_took_it_away(tmp_path):
    file = tmp_path / "none.json"
    file.write_text('{"attack": null}', encoding="utf-8")
    assert resolve("row", file, ["attack.name=pgd"]).attack == Pgd()


def test_an_empty_section_changes_nothing(tmp_path):
    file = tmp_path / "empty.toml"
    file.write_text("[loss]\n[attack]\n", encoding="utf-8")
    assert resolve("row", file).as_dict() == resolve("row").as_dict()


def test_a_copied_preset_works_as_a_file(tmp_path):
    file = tmp_path / "copy.toml"
    file.write_text(BASE, encoding="utf-8")
    assert resolve(config_file=file).as_dict() == resolve("row").as_dict()


def test_a_table_is_merged_key_by_key(tmp_path):
    file = tmp_path / "zoo.toml"
    file.write_text('[arch]\nname = "zoo/tiny"\nkwargs = {a = 1, b = 2}\n', encoding="utf-8")
    assert resolve("row", file, ["arch.kwargs.b=3", "arch.kwargs.c=true"]).config.arch["kwargs"] == {"a": 1, "b": 3, "c": True}
    assert resolve("row", file, ["arch.kwargs={}"]).config.arch["kwargs"] == {}


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("epochs=5", ("epochs",), 5),
        ("loss.lbd=5", ("loss", "lbd"), 5),
        ("loss.lbd = 5e-1", ("loss", "lbd"), 0.5),
        ("loss.name=stability", ("loss", "name"), "stability"),
        ('loss.name="stability"', ("loss", "name"), "stability"),
        ("arch.name=timm/resnet18", ("arch", "name"), "timm/resnet18"),
        ("arch.kwargs.drop_rate=0.1", ("arch", "kwargs", "drop_rate"), 0.1),
        ("schedule.milestones=[31, 61]", ("schedule", "milestones"), [31, 61]),
        ("chunk=false", ("chunk",), False),
        ("chunk=none", ("chunk",), None),
        ("data.folder=a=b", ("data", "folder"), "a=b"),
        ("data.folder=", ("data", "folder"), ""),
        ("data.x=1\ny=2", ("data", "x"), "1\ny=2"),
    ],
)
def test_set_reads_toml_and_falls_back_to_text(text, key, value):
    settings, malformed = parse_sets([text])
    assert not malformed
    assert {k: s.value for k, s in settings.items()} == {key: value}


SAID = {
    "text-that-is-a-date": ("data.folder=2024-01-05", "2024-01-05"),
    "text-that-is-a-number": ("data.folder=7", "7"),
    "text-that-is-a-truth": ("data.folder=true", "true"),
    "text-that-is-a-table": ("data.folder={a=1}", "{a=1}"),
    "text-that-is-nothing": ("data.folder=none", "none"),
    "text-in-quotes": ('data.folder="a b"', "a b"),
    "truth": ("optimizer.nesterov=True", True),
    "truth-in-words": ("optimizer.nesterov=yes", True),
    "number": ("optimizer.lr=.01", 0.01),
    "power": ("batch=1e3", 1000),
    "underscore": ("batch=1_000", 1000),
    "nothing": ("chunk=null", None),
    "list": ("schedule.milestones=31,61", [31, 61]),
}


@pytest.mark.parametrize(("text", "value"), SAID.values(), ids=SAID)
def test_a_set_is_read_for_its_field(text, value):
    section, _, field = text.partition("=")[0].rpartition(".")
    record = resolve("row", sets=[text]).as_dict()
    assert (record[section] if section else record)[field] == value


def test_a_set_is_read_for_the_plugin_that_another_set_names():
    for sets in (["arch.model=7", "arch.name=zoo"], ["arch.name=zoo", "arch.model=7"]):
        assert resolve("row", sets=sets).config.arch["model"] == "7"


def test_the_last_set_of_a_key_wins():
    assert resolve("row", sets=["epochs=5", "epochs=6"]).config.epochs == 6


def test_nest_undoes_flatten():
    nested = {"a": 1, "b": {"c": [1, 2], "d": {"e": {}}}}
    assert nest(flatten(nested, "x")) == nested


# --- the full record --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["attack=none", "chunk=false"],
        ["arch.name=zoo/tiny", "arch.kwargs.drop_rate=0.1"],
        ["arch.name=zoo", "arch.model=tiny"],
        ["loss.name=stability", "schedule.milestones=[]", "data.folder=some/where"],
    ],
    ids=["preset", "no-attack", "variant", "variant-as-field", "other-loss"],
)
def test_the_record_is_json_and_gives_the_same_again(sets, tmp_path):
    found = resolve("row", sets=sets)
    record = json.loads(json.dumps(found.as_dict()))
    again = rebuild(record)
    assert again.as_dict() == found.as_dict() == record
    assert (again.config, again.plugins, again.provenance) == (found.config, found.plugins, found.provenance)
    run = tmp_path / "config.json"
    run.write_text(json.dumps({"config": record, "sources": found.sources}), encoding="utf-8")
    assert resolve(config_file=run).as_dict() == record


def test_the_record_holds_the_defaults_of_plugins():
    assert resolve("row").as_dict()["loss"] == {"name": "consistency", "m": 2, "lbd": 10.0, "eta": 0.5, "form": "default"}


def test_the_record_says_a_variant_once():
    arch = resolve("row", sets=["arch.name=zoo/tiny"]).as_dict()["arch"]
    assert arch == {"name": "zoo/tiny", "kwargs": {}}


@pytest.mark.parametrize(
    ("sets", "chunked"),
    [([], True), (["chunk=false"], False), (["loss.name=stability"], False), (["loss.name=stability", "chunk=true"], True)],
    ids=["loss-wants", "overruled", "loss-does-not", "overruled-again"],
)
def test_chunk_is_as_the_loss_wants_unless_said(sets, chunked):
    assert resolve("row", sets=sets).chunked is chunked


# --- what is said when something is wrong -----------------------------------------------------------------------------------

WRONG = {
    "too-small": (["epochs=0"], "epochs = 0 (--set): must be greater than or equal to 1"),
    "fraction": (["epochs=1.5"], "epochs = 1.5 (--set): must be a valid integer"),
    "text-for-number": (["batch=many"], 'batch = "many" (--set): must be a valid integer'),
    "truth-for-number": (["batch=true"], "batch = true (--set): must be a valid integer"),
    "seed": (["seed=-1"], "seed = -1 (--set): must be greater than or equal to 0"),
    "lr": (["optimizer.lr=0"], "optimizer.lr = 0 (--set): must be greater than 0"),
    "momentum": (["optimizer.momentum=1"], "optimizer.momentum = 1 (--set): must be less than 1"),
    "nesterov": (
        ["optimizer.momentum=0", "optimizer.nesterov=true"],
        "optimizer.nesterov = true (--set): needs optimizer.momentum > 0",
    ),
    "milestones-order": (
        ["schedule.milestones=[20, 10]"],
        "schedule.milestones = [20, 10] (--set): must be increasing numbers of epochs, the first at least 1",
    ),
    "milestones-zero": (
        ["schedule.milestones=[0]"],
        "schedule.milestones = [0] (--set): must be increasing numbers of epochs, the first at least 1",
    ),
    "milestones-fraction": (
        ["schedule.milestones=[1.5]"],
        "schedule.milestones = [1.5] (--set): must be a valid integer, got a number with a fractional part",
    ),
    "gamma": (["schedule.gamma=2"], "schedule.gamma = 2 (--set): must be less than or equal to 1"),
    "plugin-field": (["noise.sigma=-1"], "noise.sigma = -1 (--set): must be greater than 0"),
    "choice": (["loss.form=l1"], "loss.form = \"l1\" (--set): must be 'default', 'xent' or 'mse'"),
    "whole-plugin": (["loss.form=mse", "loss.m=1"], "loss: the form mse needs m >= 2"),
    "nan": (["optimizer.lr=nan"], "optimizer.lr = NaN (--set): must be a finite number"),
    "infinite-plugin-field": (["noise.sigma=inf"], "noise.sigma = Infinity (--set): must be a finite number"),
    "nan-in-list": (
        ["schedule.milestones=[nan]"],
        "schedule.milestones = [NaN] (--set): must be a finite number",
    ),
    "nan-in-table": (
        ["arch.name=zoo/tiny", "arch.kwargs.rate=nan"],
        "arch.kwargs.rate = NaN (--set): must be a finite number",
    ),
    "unknown-here": (["loss.lambd=5"], "loss.lambd = 5 (--set): unknown key. Did you mean 'loss.lbd'?"),
    "unknown-section": (["sigma=1"], "sigma = 1 (--set): unknown key. Did you mean 'noise.sigma'?"),
    "unknown-lr": (["lr=0.1"], "lr = 0.1 (--set): unknown key. Did you mean 'optimizer.lr'?"),
    "unknown-top": (["epoch=3"], "epoch = 3 (--set): unknown key. Did you mean 'epochs'?"),
    "unknown-table": (["optimiser.lr=1"], "optimiser.lr = 1 (--set): unknown key. Did you mean 'optimizer.lr'?"),
    "unknown-name": (["arch.nmae=x"], "arch.nmae = \"x\" (--set): unknown key. Did you mean 'arch.name'?"),
    "unknown-nothing-near": (
        ["zzz=1"],
        "zzz = 1 (--set): unknown key. The keys here are batch, callbacks, chunk, clip_norm, epochs, freeze, holdout, init, "
        "limit, loggers, micro_batch, precision, ramps, seed, sync_batch_norm",
    ),
    "unknown-nothing-near-in-section": (
        ["attack.zzz=1"],
        "attack.zzz = 1 (--set): unknown key. The keys here are attack.epsilon, attack.name, attack.steps",
    ),
    "header-outside-a-file": (["preset.title=x"], None),
    "value-for-section": (["optimizer=3"], "optimizer = 3 (--set): is a section; write optimizer.name=NAME"),
    "value-for-plugin": (["loss=stability"], 'loss = "stability" (--set): is a section; write loss.name=NAME'),
    "no-equals": (["epochs"], "--set 'epochs': must be KEY=VALUE, such as --set loss.lbd=5"),
    "empty-key": (["loss.=3"], "--set 'loss.=3': must be KEY=VALUE, such as --set loss.lbd=5"),
    "variant-twice": (
        ["arch.name=zoo/tiny", "arch.model=big"],
        "arch.model = \"big\" (--set): is already given by arch.name = 'zoo/tiny'; leave one out",
    ),
    "variant-missing": (["arch.name=zoo"], "arch.model: is missing (a name from the zoo); write --set arch.model=VALUE"),
    "copies": (
        ["loss.m=300"],
        "loss.m = 300 (--set): must be at most batch = 256, which is split into m chunks; or write --set chunk=false",
    ),
}


@pytest.mark.parametrize(("sets", "line"), WRONG.values(), ids=WRONG)
def test_one_line_says_key_value_layer_and_rule(sets, line):
    found = problems(*sets)
    assert len(found) == 1
    if line is not None:
        assert found == [line]


def test_a_plugin_that_does_not_exist_names_the_nearest():
    (line,) = problems("loss.name=consistancy")
    assert line.startswith("loss.name = \"consistancy\" (--set): no installed package provides the losses plugin 'consistancy'")
    assert "Did you mean 'consistency'?" in line


def test_a_plugin_without_variants_refuses_one():
    (line,) = problems("arch.name=small/tiny")
    assert line.startswith('arch.name = "small/tiny" (--set): ')
    assert "takes no variant" in line


def test_a_plugin_that_does_not_load_is_named_with_its_package():
    (line,) = problems("loss.name=broken")
    assert "bad-package 0.3" in line
    assert "no_such_module_at_all" in line


def test_the_layer_of_a_wrong_value_is_its_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[noise]\nsigma = -1\nsigmo = 1\n", encoding="utf-8")
    assert problems(config_file=file) == [
        f"noise.sigma = -1 ({file}): must be greater than 0",
        f"noise.sigmo = 1 ({file}): unknown key. Did you mean 'noise.sigma'?",
    ]


def test_everything_that_is_missing_is_listed_with_what_to_write():
    assert problems(preset=None) == [
        "data.name: must name a plugin; write --set data.name=NAME, one of: digits",
        "arch.name: must name a plugin; write --set arch.name=NAME, one of: small, zoo",
        "noise.sigma: is missing (standard deviation of the noise); write --set noise.sigma=VALUE",
        "loss.name: must name a plugin; write --set loss.name=NAME, one of: broken, consistency, stability",
        "optimizer.lr: is missing (learning rate before the schedule changes it); write --set optimizer.lr=VALUE",
    ]


def test_every_problem_is_said_at_once():
    given = [
        sets for name, (sets, _) in WRONG.items() if name in ("too-small", "plugin-field", "unknown-here", "lr", "no-equals")
    ]
    found = problems(*(text for sets in given for text in sets), "attack.steps=0", "arch.name=smal")
    keys = [line.split(" ")[0] for line in found]
    assert sorted(keys) == sorted(["--set", "epochs", "noise.sigma", "loss.lambd", "optimizer.lr", "attack.steps", "arch.name"])


def test_the_error_counts_its_problems():
    with pytest.raises(ConfigError, match=r"has 2 problems:\n  .*\n  ") as caught:
        resolve("row", sets=["epochs=0", "batch=0"])
    assert caught.value.exit_code == 2


def test_of_thousands_of_problems_the_first_are_told():
    with pytest.raises(ConfigError, match=r"has 500 problems:(\n  .*){25}\n  and 475 more$") as caught:
        resolve("row", sets=[f"a{number}.b=1" for number in range(500)])
    assert len(caught.value.problems) == 500


BROKEN = {
    "toml": ("mine.toml", "epochs = 5\nbatch = = 3\n", "not valid TOML.*line 2"),
    "json": ("mine.json", '{"epochs": 5,\n "batch" 3}', "not valid JSON.*line 2"),
    "twice": ("mine.toml", "epochs = 5\nepochs = 6\n", "not valid TOML.*line 2"),
    "no-table": ("mine.json", "[1, 2]", "holds no table"),
}


@pytest.mark.parametrize(("name", "text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_names_the_line(name, text, message, tmp_path):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        resolve("row", file)
    assert str(file) in caught.value.message


def test_a_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "model.toml"
    file.write_bytes(b"\x80\x81\x82")
    with pytest.raises(InputError, match="not valid TOML"):
        resolve(config_file=file)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="there is no configuration file"):
        resolve(config_file=tmp_path / "absent.toml")
    with pytest.raises(InputError, match="is not a file, so it cannot be a configuration"):
        resolve(config_file=tmp_path)


def test_a_record_that_no_longer_fits_says_so():
    record = resolve("row").as_dict()
    record["loss"]["gone"] = 1
    with pytest.raises(ConfigError, match=r"loss\.gone = 1 \(saved configuration\): unknown key"):
        rebuild(record)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("sigma", "noise.sigma"),
        ("loss.sigma", "noise.sigma"),
        ("lr", "optimizer.lr"),
        ("loss.lambd", "loss.lbd"),
        ("attack.epsilonn", "attack.epsilon"),
        ("schedule.milestone", "schedule.milestones"),
        ("loss.nmae", "loss.name"),
        ("arch.nmae", "arch.name"),
        ("xyzzy", None),
    ],
)
def test_nearest_key(key, expected):
    known = ["epochs", "batch", "noise.sigma", "noise.name", "optimizer.lr", "loss.lbd", "loss.name", "arch.name"]
    assert nearest(key, [*known, "attack.epsilon", "schedule.milestones"]) == expected


# --- steps per epoch ---------------------------------------------------------------------------------------------------------


def test_steps_are_those_of_torch_chunk():
    torch = pytest.importorskip("torch")
    for images in (1, 2, 5, 7, 16, 23, 39):
        for batch in (1, 3, 4, 7, 16, 64):
            for m in (1, 2, 3, 5, 8, 100):
                batches = torch.arange(images).split(batch)
                assert steps_per_epoch(images, batch, m) == sum(len(part.chunk(m)) for part in batches), (images, batch, m)
                smallest = min(len(chunk) for part in batches for chunk in part.chunk(m))
                assert smallest_step(images, batch, m) == smallest, (images, batch, m)


@pytest.mark.parametrize(
    ("images", "batch", "m", "steps"),
    [(60_000, 256, 1, 235), (60_000, 256, 2, 470), (50_000, 256, 2, 392), (50_000, 256, 8, 1568), (1, 256, 4, 1)],
)
def test_steps_of_the_papers_settings(images, batch, m, steps):
    assert steps_per_epoch(images, batch, m) == steps


def test_chunks_never_outnumber_the_images():
    assert [chunk_count(images, 4) for images in (1, 2, 3, 4, 5, 8)] == [1, 2, 3, 4, 3, 4]


# --- the schema -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [TrainConfig, Sgd, Step, PresetHeader, PublishedKey], ids=lambda m: m.__name__)
def test_every_field_has_a_one_line_description(model):
    for name, field in model.model_fields.items():
        assert field.description, name
        assert "\n" not in field.description


def test_numbers_have_units():
    for model in (TrainConfig, Sgd, Step):
        for name, field in model.model_fields.items():
            if field.annotation in (int, float) and name != "seed":
                assert (field.json_schema_extra or {}).get("unit"), name


def test_listing_and_resolving_import_no_torch():
    code = (
        "import sys; from rscli.config import layers, presets; presets.list_presets(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'timm', 'sklearn', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_modules_are_the_ones_under_test():
    assert layers.registry is registry
    assert presets.registry is registry
