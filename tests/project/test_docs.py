"""docs/: what the pages name exists, what the code cites exists, and the figures are what the code and the presets say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from rscli.stats import bounds, metrics, sequential
from support import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md")])
CODE = sorted(
    file
    for folder in ("rscli", "plugins", "tests", "bench", "presets", "examples", ".ci")
    for file in (ROOT / folder).rglob("*")
    if file.suffix in (".py", ".toml", "") and file.is_file() and not {"__pycache__"} & set(file.parts)
)
SIGMAS = ("0.25", "0.5", "1.0")

CERTIFICATION = (DOCS / "certification.md").read_text(encoding="utf-8")
METHODS = (DOCS / "methods.md").read_text(encoding="utf-8")


def identify(value: object) -> str:
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else str(value)


def cited_pages(text: str) -> set[str]:
    """Pages that a text cites by name: `docs/x.md`, `x.md`; not patterns, and not parts of a path such as `DOCS / "x.md"`."""
    return set(re.findall(r"(?<![\w/*{])(?<!/ \x22)((?:[\w.-]+/)*\w+\.md)\b", text))


def cited_code(text: str) -> set[tuple[str, str]]:
    """(file, name) for each `rscli/x.py:name` or `plugins/x.py` in a text; the name may be empty."""
    return set(re.findall(r"`((?:rscli|plugins|tests|bench)/[\w/.-]+\.py)(?::(\w+))?`", text))


# --- what is named exists ----------------------------------------------------------------------------------------------------


def test_the_reader_of_citations_sees_every_form():
    text = "see methods.md, docs/methods.md; (../shared/style.md) `*.md` `{name}.md` DOCS / \x22x.md"
    assert cited_pages(text) == {"methods.md", "docs/methods.md", "../shared/style.md"}
    assert cited_code("`rscli/stats/bounds.py:lower`, `plugins/rscli-x/y.py` `rscli/`") == {
        ("rscli/stats/bounds.py", "lower"),
        ("plugins/rscli-x/y.py", ""),
    }
    assert len(CODE) > 150
    assert len(PAGES) >= 10


MADE_UP = {"tests/project/test_docs.py", "tests/cli/test_cli.py"}
"""Tests with pages that they make up."""


@pytest.mark.parametrize("path", [file for file in CODE if identify(file) not in MADE_UP], ids=identify)
def test_code_cites_pages_that_a_clone_has(path):
    cited = cited_pages(path.read_text(encoding="utf-8"))
    assert {page for page in cited if not (ROOT / page).is_file()} == set()


@pytest.mark.parametrize("path", PAGES, ids=identify)
def test_pages_name_code_that_exists(path):
    for file, name in cited_code(path.read_text(encoding="utf-8")):
        assert (ROOT / file).is_file(), file
        defined = re.search(rf"^(?:class|def) {name}\b", (ROOT / file).read_text(encoding="utf-8"), re.M)
        assert not name or defined, f"{file} defines no {name}"


def test_the_site_shows_every_page():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r": (\w+\.md)$", site, re.M)) == sorted(path.name for path in DOCS.glob("*.md"))


# --- figures of docs/certification.md ----------------------------------------------------------------------------------------


def row(label: str) -> list[str]:
    """The cells of the one row of docs/certification.md that begins with `label`."""
    (line,) = re.findall(rf"^\| {re.escape(label)} \|(.+)\|$", CERTIFICATION, re.M)
    return [cell.strip().replace(",", "") for cell in line.split("|")]


def test_the_largest_radii():
    shown = [ndtri(0.001 ** (1 / n)) for n in (10_000, 100_000, 1_000_000)]
    assert row("largest radius") == [f"{radius:.3f} σ" for radius in shown]


@pytest.mark.parametrize(
    ("label", "early"), [("fixed n", None), ("sequential, early = 0.2", 0.2), ("sequential, early = 0.5", 0.5)]
)
def test_hits_needed_at_the_last_look(label, early):
    n, looks = 100_000, sequential.look_schedule(100_000)
    assert f"{len(looks)} looks" in CERTIFICATION
    for r, shown in zip((0, 1, 2, 3, 3.5), row(label), strict=True):
        p0 = float(ndtr(r))
        if early is None:
            assert bounds.lower(int(shown), n, 0.001) > p0 >= bounds.lower(int(shown) - 1, n, 0.001)
        else:
            assert sequential.boundary(p0, looks, 0.001, early)[-1] == int(shown)


MEANS = re.findall(r"^\| (\d)(?: σ)? \| (0\.\d+) \| ([\d,]+) \| ([\d,]+) \|$", CERTIFICATION, re.M)


@pytest.mark.parametrize(("r", "p", "mean", "least"), MEANS)
def test_mean_samples_by_simulation(r, p, mean, least):
    """20,000 simulated images; five standard errors."""
    p0, looks, paths = float(ndtr(float(r))), sequential.look_schedule(100_000), 20_000
    test = sequential.nested_test((p0,), looks, 0.001)
    steps = np.diff(looks, prepend=0)
    hits = np.random.default_rng(0).binomial(steps, float(p), (paths, len(looks))).cumsum(axis=1)
    certified = hits >= test.certify[:, 0]
    stopped = certified | (hits <= test.futility[:, 0])
    assert stopped[:, -1].all()
    first = stopped.argmax(axis=1)
    samples = np.array(looks)[first]
    assert int(mean.replace(",", "")) == pytest.approx(samples.mean(), abs=5 * samples.std() / paths**0.5 + 1)
    power = min(certified[np.arange(paths), first].mean(), 1 - 1e-9)
    bound = kl(power, 0.001) / kl(float(p), p0)
    assert int(least.replace(",", "")) == pytest.approx(bound, abs=1.5)
    assert samples.mean() > bound


def kl(a: float, b: float) -> float:
    return a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))


def test_the_means_were_found():
    assert len(MEANS) == 7


def test_what_must_be_reported():
    wrong = [metrics.wrong_certificates(m, 0.001, 0.001) for m in (500, 10_000)]
    assert "{} of 500 and {} of 10,000".format(*wrong) in CERTIFICATION
    wide = [100 * (high - low) / 2 for low, high in (bounds.interval(m // 2, m) for m in (500, 10_000))]
    assert "±{:.1f} points from 500 images, and to ±{:.1f} from".format(*wide) in CERTIFICATION
    assert bounds.smallest_n_for(0.001) == 11
    assert "no n below 11" in CERTIFICATION
    assert metrics.round_down(1.2361, 2) == 1.23


# --- settings of docs/methods.md ---------------------------------------------------------------------------------------------


def attack_of(preset: dict) -> str:
    attack = preset["attack"]
    assert attack["warmup"] == 10
    return f"{attack['name'].upper()}, T {attack['steps']}, ε {attack['epsilon'] * 256:g}/256"


SETTINGS = {
    "stability": ("lbd", lambda p: f"{p['loss']['lbd']:g}"),
    "cons": ("m, lbd, eta", lambda p: "{m}, {lbd:g}, {eta:g}".format(**p["loss"])),
    "macer": ("m, lbd", lambda p: "{m}, {lbd:g}".format(**p["loss"]) + ", deferred" * p["loss"]["deferred"]),
    "smoothadv": ("attack, m", lambda p: f"{attack_of(p)}, m {p['loss']['m']}"),
    "smoothadv-cons": ("attack; m, lbd, eta", lambda p: attack_of(p) + "; {m}, {lbd:g}, {eta:g}".format(**p["loss"])),
}
"""The method in a preset's name -> the corner of its table in docs/methods.md, and the text of a preset's settings there."""

DATA = {
    "MNIST": ["mnist"],
    "CIFAR-10, ResNet-110": ["cifar10"],
    "CIFAR-10, ResNet-20 and DenseNet-40": ["cifar10-resnet20", "cifar10-densenet40"],
    "ImageNet": ["imagenet"],
}


PACKAGES = {
    "smoothmix": ("m, alpha, steps, eta", "{m}, {alpha:g}, {steps}, {eta:g}"),
    "smoothmix-one-step": ("m, alpha, steps, eta", "{m}, {alpha:g}, {steps}, {eta:g}"),
    "catrs": ("m, epsilon, steps, lbd", "{m}, {epsilon:g}, {steps}, {lbd:g}"),
}
"""The same of presets of other distributions in plugins/."""


@pytest.mark.parametrize("method", PACKAGES)
def test_the_settings_of_packages_are_those_of_their_presets(method):
    corner, text = PACKAGES[method]
    found = {}
    for path in ROOT.glob(f"plugins/*/*/presets/*-{method}-[0-9]*.toml"):
        data, _, sigma = path.stem.rpartition(f"-{method}-")
        loss = tomllib.loads(path.read_text(encoding="utf-8"))["loss"]
        found[data, sigma] = text.format(**loss) + ", one_step" * loss.get("one_step", False)
    labels = {"mnist": "MNIST" + ", one step" * ("one-step" in method), "cifar10": "CIFAR-10, ResNet-110"}
    assert len(found) >= 3
    for (data, sigma), setting in found.items():
        line = re.search(rf"^\| {corner} \|.+\n\|---.+\n(?:\|.+\n)*?\| {labels[data]} \|(.+)\|$", METHODS, re.M)
        assert line[1].split("|")[SIGMAS.index(sigma)].strip() == setting, (data, sigma)


def settings_shown(corner: str) -> dict[tuple[str, str], str]:
    """(data in a preset's name, sigma) -> the cell, of the table with that upper left cell."""
    (table,) = re.findall(rf"^\| {re.escape(corner)} \| σ 0\.25.+\n\|---.+\n((?:\|.+\n)+)", METHODS, re.M)
    shown = {}
    for line in table.splitlines():
        label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for sigma, cell in zip(SIGMAS, cells, strict=True):
            for data in DATA[label.removesuffix(" (our choice, never measured)")]:
                shown[data, sigma] = cells[0] if cell == "the same" else cell
    return {key: cell for key, cell in shown.items() if cell}


@pytest.mark.parametrize("method", SETTINGS)
def test_the_settings_are_those_of_the_presets(method):
    corner, text = SETTINGS[method]
    presets = {}
    for path in (ROOT / "presets").glob(f"*-{method}-[0-9]*.toml"):
        data, _, sigma = path.stem.rpartition(f"-{method}-")
        if data in {name for names in DATA.values() for name in names}:
            presets[data, sigma] = text(tomllib.loads(path.read_text(encoding="utf-8")))
    assert len(presets) >= 9
    assert settings_shown(corner) == presets
