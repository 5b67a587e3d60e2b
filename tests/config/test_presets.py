"""The shipped presets against the papers' settings, typed here from docs/methods.md; and how anybody's presets are found."""

from __future__ import annotations

import csv
import tomllib

import pytest
from typer.testing import CliRunner

from rscli import registry
from rscli.api import Augmentation
from rscli.cli.app import app
from rscli.config import presets
from rscli.config.layers import rebuild, resolve
from rscli.config.presets import list_presets, load_preset, published_for, published_rows, show
from rscli.errors import InputError, RscliError
from rscli.registry import Entry, Registry
from rscli.training.train import TrainOptions, outlook
from support import ROOT

SHIPPED = ROOT / "presets"
NAMES = sorted(path.stem for path in SHIPPED.glob("*.toml"))
SIGMAS = ("0.25", "0.5", "1.0")
METHODS = ("gaussian", "stability", "smoothadv", "macer", "cons", "smoothadv-cons")

MNIST = {"epochs": 90, "batch": 256, "lr": 0.01, "milestones": [31, 61], "arch": {"name": "lenet"}}
CIFAR = {"epochs": 150, "batch": 256, "lr": 0.1, "milestones": [51, 101], "arch": {"name": "cifar-resnet", "depth": 110}}
IMAGENET = {"epochs": 90, "batch": 256, "lr": 0.1, "milestones": [31, 61], "arch": {"name": "timm/resnet50"}}
COHEN = {"epochs": 90, "batch": 400, "milestones": [30, 60]}
RUNS = {"mnist": MNIST, "cifar10": CIFAR, "imagenet": IMAGENET}


def gaussian(m):
    return {"name": "gaussian", "m": m}


def consistency(m, lbd, eta=0.5):
    return {"name": "consistency", "m": m, "lbd": lbd, "eta": eta}


def macer(lbd, deferred, m=16):
    return {"name": "macer", "m": m, "lbd": lbd, "beta": 16, "gamma": 8, "deferred": deferred}


def stability(lbd):
    return {"name": "stability", "lbd": lbd}


def pgd(epsilon, steps=10):
    return {"name": "pgd", "epsilon": epsilon / 256, "steps": steps, "warmup": 10}


def jeong_pgd(epsilon):
    """As Jeong & Shin's code has it: clamped after the projection."""
    return {**pgd(epsilon), "clamp": "after-projection"}


DDN = {"name": "ddn", "epsilon": 255 / 256, "steps": 2, "warmup": 10}

# (data set, method) -> for sigma 0.25, 0.5, 1.0: loss, attack
TABLE = {
    ("mnist", "gaussian"): [(gaussian(1), None)] * 3,
    ("mnist", "stability"): [(stability(2), None)] * 3,
    ("mnist", "smoothadv"): [(gaussian(4), jeong_pgd(255))] * 3,
    ("mnist", "macer"): [(macer(16, True), None), (macer(16, True), None), (macer(6, True), None)],
    ("mnist", "cons"): [(consistency(2, 10), None), (consistency(2, 5), None), (consistency(2, 5), None)],
    ("mnist", "smoothadv-cons"): [(consistency(4, 1), jeong_pgd(255))] * 3,
    ("cifar10", "gaussian"): [(gaussian(1), None)] * 3,
    ("cifar10", "stability"): [(stability(2), None), (stability(2), None), (stability(1), None)],
    ("cifar10", "smoothadv"): [(gaussian(8), pgd(255)), (gaussian(2), pgd(512)), (gaussian(2), pgd(512))],
    ("cifar10", "macer"): [(macer(12, False), None), (macer(4, False), None), (macer(12, True), None)],
    ("cifar10", "cons"): [(consistency(2, 20), None), (consistency(2, 10), None), (consistency(2, 10), None)],
    ("cifar10", "smoothadv-cons"): [
        (consistency(4, 2), jeong_pgd(255)),
        (consistency(2, 1), jeong_pgd(512)),
        (consistency(2, 1), jeong_pgd(512)),
    ],
    ("imagenet", "gaussian"): [(gaussian(1), None)] * 3,
    ("imagenet", "cons"): [(consistency(2, 10), None), (consistency(2, 5), None), (consistency(2, 5, eta=0.1), None)],
    ("imagenet", "smoothadv"): [(gaussian(1), DDN), (gaussian(1), pgd(255, 1)), (gaussian(1), pgd(512, 1))],
    # our own choices: we know of no published run with these settings, nor of logs of the ImageNet rows in MACER's paper
    ("imagenet", "stability"): [(stability(2), None), (stability(2), None), (stability(1), None)],
    ("imagenet", "macer"): [(macer(12, True, m=2), None), (macer(4, True, m=2), None), (macer(12, True, m=2), None)],
    ("imagenet", "smoothadv-cons"): [
        (consistency(2, 1), DDN),
        (consistency(2, 0.5), pgd(255, 1)),
        (consistency(2, 0.5, eta=0.1), pgd(512, 1)),
    ],
}
OWN_CHOICES = {("imagenet", "stability"), ("imagenet", "macer"), ("imagenet", "smoothadv-cons")}

# preset -> ACR, typed from the tables of docs/reproduce.md (four digits at most, rounded there)
ACR = {
    ("mnist", "gaussian"): (0.9108, 1.5581, 1.6184),
    ("mnist", "stability"): (0.9152, 1.5719, 1.6341),
    ("mnist", "smoothadv"): (0.9322, 1.6872, 1.7786),
    ("mnist", "macer"): (0.9201, 1.5899, 1.5950),
    ("mnist", "cons"): (0.9282, 1.6549, 1.7377),
    ("mnist", "smoothadv-cons"): (0.9323, 1.6957, 1.8163),
    ("cifar10", "gaussian"): (0.4240, 0.5251, 0.5105),
    ("cifar10", "stability"): (0.4199, 0.5312, 0.5145),
    ("cifar10", "smoothadv"): (0.5512, 0.7173, 0.7896),
    ("cifar10", "macer"): (0.5313, 0.6910, 0.7441),
    ("cifar10", "cons"): (0.5518, 0.7195, 0.7563),
    ("cifar10", "smoothadv-cons"): (0.5484, 0.7259, 0.8160),
    ("imagenet", "gaussian"): (0.4765, 0.7325, 0.8752),  # 0.25: 427 images, in published.csv alone
    ("imagenet", "cons"): (None, 0.8215, 0.9823),
}
SMALL = {
    "cifar10-resnet20-gaussian-0.5": (gaussian(1), None, 0.5242),
    "cifar10-resnet20-stability-0.5": (stability(2), None, 0.4992),
    "cifar10-resnet20-macer-0.5": (macer(4, False), None, 0.6607),
    "cifar10-resnet20-smoothadv-0.5": (gaussian(8), jeong_pgd(255), 0.6924),
    "cifar10-resnet20-cons-0.5": (consistency(2, 10), None, 0.6864),
    "cifar10-densenet40-gaussian-0.5": (gaussian(1), None, 0.4937),
    "cifar10-densenet40-stability-0.5": (stability(2), None, 0.4967),
    "cifar10-densenet40-macer-0.5": (macer(4, False), None, 0.6413),
    "cifar10-densenet40-smoothadv-0.5": (gaussian(8), jeong_pgd(255), 0.6709),
    "cifar10-densenet40-cons-0.5": (consistency(2, 10), None, 0.6609),
}
ROWS = [
    (f"{data}-{method}-{sigma}", data, method, float(sigma), *TABLE[data, method][place])
    for data, method in TABLE
    for place, sigma in enumerate(SIGMAS)
]
DEMO = ["digits-cons-0.25", "digits-gaussian-0.25"]


def check_run(settings, run, sigma, loss, attack):
    assert settings["epochs"] == run["epochs"]
    assert settings["batch"] == run["batch"]
    assert settings["optimizer"] == {"lr": run["lr"], "momentum": 0.9, "weight_decay": 1e-4}
    assert settings["schedule"] == {"milestones": run["milestones"], "gamma": 0.1}
    assert settings["arch"] == run["arch"]
    assert settings["noise"] == {"name": "gaussian", "sigma": sigma}
    assert settings["loss"] == loss
    assert settings.get("attack") == attack
    assert "chunk" not in settings  # the loss knows


def test_there_is_a_preset_for_every_row_and_no_other():
    assert sorted([row[0] for row in ROWS] + list(SMALL) + DEMO) == NAMES


@pytest.mark.parametrize(("name", "data", "method", "sigma", "loss", "attack"), ROWS, ids=[row[0] for row in ROWS])
def test_settings_are_those_of_the_paper(name, data, method, sigma, loss, attack):
    settings = load_preset(name).settings
    cohens_own = method == "gaussian" and data != "mnist"
    check_run(settings, RUNS[data] | (COHEN if cohens_own else {}), sigma, loss, attack)
    assert settings["data"] == {"name": data}


@pytest.mark.parametrize("name", SMALL)
def test_settings_of_the_small_networks(name):
    loss, attack, acr = SMALL[name]
    network = (
        {"name": "cifar-resnet", "depth": 20} if "resnet20" in name else {"name": "cifar-densenet", "depth": 40, "growth": 12}
    )
    check_run(load_preset(name).settings, CIFAR | {"arch": network}, 0.5, loss, attack)
    assert published_for(name).acr == pytest.approx(acr, abs=5e-5)


# data set -> normalisation (mean, std) and augmentation of training images
IMAGES = {
    "mnist": (None, None, {}),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), {"padding": 4, "flip": True}),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), {"resized_crop": True, "flip": True}),
}
PARAMETERS = {"mnist": 431_080, "resnet110": 1_730_714, "resnet20": 272_474, "densenet40": 211_978, "imagenet": 25_557_032}
BATCHES = {("mnist", 256): 235, ("cifar10", 256): 196, ("cifar10", 400): 125, ("imagenet", 256): 5005, ("imagenet", 400): 3203}
"""Batches per epoch: of 60,000, 50,000 and 1,281,167 images."""


@pytest.mark.parametrize("name", [*(row[0] for row in ROWS), *SMALL])
def test_a_dry_run_is_of_the_paper_s_training(name, tmp_path):
    """Through the resolver, so with every default: network, steps per epoch, optimiser, normalisation, augmentation."""
    found = resolve(name)
    plan = outlook(found, TrainOptions(out=tmp_path / "run", data_dir=tmp_path))
    data, method = name.partition("-")[0], name.rpartition("-")[0].partition("-")[2]
    network = {"cifar10": method.partition("-")[0] if name in SMALL else "resnet110"}.get(data, data)
    loss, attack = SMALL[name][:2] if name in SMALL else next(row[4:] for row in ROWS if row[0] == name)
    chunks = loss["m"] if loss["name"] in ("gaussian", "consistency") else 1
    assert plan.parameters == PARAMETERS[network]
    assert (plan.chunks, plan.steps_per_epoch) == (chunks, chunks * BATCHES[data, found.config.batch])
    assert found.config.optimizer["nesterov"] is False
    assert loss.items() <= found.config.loss.items()
    assert (attack or {}).items() <= (found.config.attack or {}).items()
    assert (found.attack is None) is (attack is None)
    assert found.config.loss.get("form", "default") == "default"
    assert (found.config.attack or {}).get("gamma", 0.05) == 0.05
    spec = found.dataset.spec(tmp_path)
    mean, std, augmentation = IMAGES[data]
    assert (spec.mean, spec.std) == (mean, std)
    assert spec.augmentation == Augmentation(**augmentation)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "data", "method", "sigma"), [row[:4] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_preset_finds_its_published_row(name, data, method, sigma):
    row = published_for(name)
    expected = ACR.get((data, method), (None,) * 3)[SIGMAS.index(str(sigma))]
    if expected is None:
        assert row is None
        return
    assert row.acr == pytest.approx(expected, abs=5e-5)
    assert (row.dataset, row.sigma) == (data, sigma)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mnist-cons-0.5", "published ACR 1.6549 (standard deviation 0.0012 over 5 seeds), 10,000 images"),
        ("cifar10-smoothadv-1.0", "published ACR 0.7896, 10,000 images"),
        ("imagenet-smoothadv-0.5", "no published figures to compare with"),
        ("imagenet-smoothadv-cons-0.5", "no published figures to compare with"),
    ],
)
def test_show_tells_the_published_figures_or_that_there_are_none(name, said):
    shown = CliRunner().invoke(app, ["presets", "show", name]).stdout
    assert shown.startswith(f"# rscli train --preset {name}\n")
    assert said in shown.splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_how_to_launch_and_where_it_comes_from(name):
    text = show(name)
    comment = text[: text.index("\n\n")]
    assert comment.startswith(f"# rscli train --preset {name}\n")
    assert all(line.startswith("#") for line in comment.splitlines())
    assert "Schedule: " in comment
    header = load_preset(name).header
    assert header.title.endswith(f"sigma {name.rpartition('-')[2]}")
    own = any(name.startswith(f"{data}-{method}-{sigma}") for data, method in OWN_CHOICES for sigma in SIGMAS)
    assert ("reasoned choice" in comment) is own
    assert (header.note is not None) is own


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_resolves(name):
    settings = load_preset(name).settings
    kinds = {"data": "datasets", "arch": "architectures", "noise": "noises", "loss": "losses", "attack": "attacks"}
    for section, kind in kinds.items():
        if section in settings:
            try:
                registry.installed().find(kind, settings[section]["name"])
            except RscliError as missing:
                pytest.skip(missing.message)
    found = resolve(name)
    assert rebuild(found.as_dict()).as_dict() == found.as_dict()
    assert found.optimizer.lr == settings["optimizer"]["lr"]
    assert found.sources["noise.sigma"] == f"preset {name}"


# --- published figures ------------------------------------------------------------------------------------------------------


def test_published_rows_are_the_table():
    with (SHIPPED / "published.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    rows = published_rows()
    assert len(rows) == len(table) == 183
    for row, line in zip(rows, table, strict=True):
        assert f"{row.acr:.4f}" == line["acr"]
        assert [f"{value:.4f}" for value in row.certified.values()] == [v for k, v in line.items() if k.startswith("ca_")]
        assert (row.acr_sd is None) == (line["acr_sd"] == "")


def test_a_published_row_in_full():
    row = published_for("mnist-cons-0.5")
    assert (row.arch, row.method, row.seeds, row.acr, row.acr_sd) == ("lenet", "consistency", 5, 1.6549, 0.0012)
    assert (row.images, row.stride, row.setting) == (10_000, 1, "m=2;lbd=5.0;eta=0.5")
    assert (row.certified[0.0], row.certified[1.75], row.certified[2.0]) == (0.9915, 0.6044, 0.0)
    assert (row.logs_of, row.repository) == ("Jeong & Shin 2020", "jh-jeong/smoothing-consistency")


# --- finding presets --------------------------------------------------------------------------------------------------------

FINE = '[preset]\ntitle = "a row"\nsource = "a paper"\n[noise]\nsigma = 0.5\n'


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Makes packages of presets out of {package: {file: text}}, announced as distributions of the same name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(contents, missing=()):
        for package, files in contents.items():
            (tmp_path / package).mkdir()
            (tmp_path / package / "__init__.py").write_text("raise SystemExit('never imported')", encoding="utf-8")
            for name, text in files.items():
                (tmp_path / package / name).write_text(text, encoding="utf-8")
        entries = [Entry("presets", name, f"dist-{name}", "2.0", name) for name in (*contents, *missing)]
        fake = Registry(entries)
        monkeypatch.setattr(registry, "installed", lambda: fake)
        return tmp_path

    return make


def test_presets_of_every_package_are_listed(packages):
    packages({"pa": {"one.toml": FINE, "notes.txt": "no preset"}, "pb": {"two.toml": FINE}})
    listed = [(info.name, info.package, info.version, info.title, info.problem) for info in list_presets()]
    assert listed == [("one", "dist-pa", "2.0", "a row", None), ("two", "dist-pb", "2.0", "a row", None)]
    assert load_preset("one").settings == {"noise": {"sigma": 0.5}}
    assert show("two") == FINE


def test_a_name_that_two_packages_ship_needs_its_package(packages):
    packages({"pa": {"one.toml": FINE, "other.toml": FINE}, "pb": {"one.toml": FINE}})
    assert [info.name for info in list_presets()] == ["dist-pa:one", "dist-pb:one", "other"]
    with pytest.raises(InputError, match="2 packages ship a preset 'one'") as caught:
        load_preset("one")
    assert caught.value.hint == "Write dist-pa:one or dist-pb:one."
    assert load_preset("dist-pb:one").package == "dist-pb"
    assert load_preset("dist-pa:other").name == "other"


def test_what_is_broken_is_marked_and_harms_nothing_else(packages):
    files = {
        "fine.toml": FINE,
        "torn.toml": "epochs = = 3",
        "bare.toml": "epochs = 3",
        "odd.toml": FINE.replace("title", "titel"),
    }
    packages({"pa": files}, missing=["gone", "gone_too.presets"])
    info = {info.name: info for info in list_presets()}
    assert info["fine"].problem is None
    assert "not valid TOML" in info["torn"].problem
    assert "line 1" in info["torn"].problem
    assert "preset.title" in info["bare"].problem
    assert "preset.tit" in info["odd"].problem
    assert "gone" in info["gone"].problem
    assert "gone_too" in info["gone_too.presets"].problem
    assert load_preset("fine").header.title == "a row"
    for name in ("torn", "bare", "odd", "gone"):
        with pytest.raises(RscliError):
            load_preset(name)


def test_a_parent_package_that_exits_breaks_only_its_own_presets(packages):
    folder = packages({"pa": {"one.toml": FINE}}, missing=["exits.presets"])
    (folder / "exits").mkdir()
    (folder / "exits" / "__init__.py").write_text("raise SystemExit(3)", encoding="utf-8")
    info = {info.name: info for info in list_presets()}
    assert "exits.presets" in info["exits.presets"].problem  # said without importing it
    assert info["one"].problem is None


@pytest.mark.parametrize(
    ("name", "hint"), [("mnist-con-0.5", "Did you mean 'mnist-cons-0.5'?"), ("qqqqqq", "`rscli presets` lists them.")]
)
def test_an_unknown_preset_names_the_nearest(name, hint):
    with pytest.raises(InputError, match=f"there is no preset '{name}'") as caught:
        resolve(name)
    assert caught.value.hint.startswith(hint)


def test_a_preset_that_names_no_row_says_so(packages):
    key = '[preset.published]\ndataset = "mnist"\narch = "lenet"\nmethod = "magic"\nsigma = 0.5\nsetting = ""\n'
    packages({"pa": {"one.toml": FINE.replace("[noise]", f"{key}[noise]")}})
    with pytest.raises(InputError, match="are in no table"):
        published_for("one")


def test_a_broken_table_is_marked_and_harms_no_other(packages):
    table = (SHIPPED / "published.csv").read_text(encoding="utf-8")
    packages(
        {
            "pa": {"one.toml": FINE, "published.csv": "dataset,arch\nmnist,lenet\n"},
            "pb": {"two.toml": FINE, "published.csv": table},
        }
    )
    assert [(info.name, info.package) for info in list_presets() if info.problem] == [("published.csv", "dist-pa")]
    assert "published.csv is broken: KeyError: 'method'" in list_presets()[-1].problem
    assert len(published_rows()) == 183


def test_shipped_files_are_plain_toml_without_trailing_space():
    for name in NAMES:
        text = (SHIPPED / f"{name}.toml").read_text(encoding="utf-8")
        assert tomllib.loads(text)
        assert all(line == line.rstrip() for line in text.splitlines())
        assert text.endswith("\n")


def test_the_listing_has_every_shipped_file_and_nothing_broken():
    listed = [info for info in presets.list_presets() if info.package == "rscli"]
    assert [info.name for info in listed] == NAMES
    assert [info for info in listed if info.problem] == []
