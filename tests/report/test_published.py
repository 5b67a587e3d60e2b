"""Results beside the published figures: the row that is chosen, the errors in the difference, and what is said of it."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from rscli.config.layers import resolve
from rscli.config.presets import list_presets, load_preset, published_for
from rscli.errors import InputError
from rscli.report.comparison import Beside
from rscli.report.groups import grouped
from rscli.report.published import with_published
from rscli.report.recipe import Recipe, recipe, setting_differences
from rscli.report.render import FORMATS, render
from rscli.report.shelf import SUBSETS, read_shelf, read_subsets, row_images, variance_share
from rscli.report.summary import compare
from rscli.report.tables import tables
from rscli.results.reader import read_results
from rscli.results.rows import Row
from runs import finished
from support import ROOT

PRESETS = ROOT / "presets"
ALL = np.arange(10_000)
LENET = {"name": "lenet"}
RESNET = {"name": "cifar-resnet", "depth": 110}
GAUSSIAN = {"name": "gaussian", "m": 1}
CONSISTENCY = {"name": "consistency", "m": 2, "lbd": 5.0, "eta": 0.5, "form": "default"}
STABILITY = {"name": "stability", "m": 1, "lbd": 2.0}
PGD = {"name": "pgd", "epsilon": 255 / 256, "warmup": 10, "steps": 10}


def write(path: Path, rows, *, dataset="mnist", sigma=0.5, arch=LENET, loss=CONSISTENCY, attack=None, info=None, **protocol):
    """A finished result of ours under the published protocol; `rows` are (idx, label, predict, radius)."""
    short = {"consistency": "cons"}.get(loss["name"], loss["name"])
    method = short if attack is None else "smoothadv" if short == "gaussian" else f"smoothadv-{short}"
    about = {
        "arch": arch,
        "loss": loss,
        "attack": attack,
        "train_seed": 0,
        "preset": f"{dataset}-{method}-{sigma}",
        **(info or {}),
    }
    own = {
        "model_sha256": str(path),
        "dataset": dataset,
        "noise": {"name": "gaussian", "sigma": sigma},
        "sigma": sigma,
        "n": 100_000,
        "info": about,
    }
    made = [Row(idx, label, predict, radius, predict == label, 1.0) for idx, label, predict, radius in rows]
    return finished(path, made, **{**own, **protocol})


def constant(images: range, acr: float):
    """Every image is right, with radii acr ± 0.1 in turn: the standard deviation of an image is known."""
    return [(i, 7, 7, acr + (0.1 if place % 2 else -0.1)) for place, i in enumerate(images)]


def beside(*paths: Path, **options) -> Beside:
    """The first published comparison: of the group, if there is one."""
    return published(*paths, **options).published[0]


def published(*paths: Path, **options):
    return with_published(grouped(compare([read_results(path) for path in paths], **options)))


@pytest.fixture(scope="module")
def shelf():
    return read_shelf()


@pytest.fixture(autouse=True)
def _read_once(monkeypatch, shelf):
    """Presets do not change between tests, and there are many."""
    monkeypatch.setattr("rscli.report.published.read_shelf", lambda: shelf)


# --- in the words of the tables ---


REPRODUCING = [info.name for info in list_presets() if not info.problem and load_preset(info.name).header.published]


@pytest.mark.parametrize("name", REPRODUCING)
def test_a_run_of_a_preset_is_held_against_the_row_that_the_preset_names(name, shelf, tmp_path):
    """From the resolved configuration, as a protocol records it; and without a difference in settings or schedule."""
    config, row = resolve(name).as_dict(), published_for(name)
    about = {"info": {"config": config, "preset": name, "overrides": {}}, "sigma": config["noise"]["sigma"]}
    path = write(tmp_path / "a.tsv", [(0, 7, 7, 1.0)], loss=config["loss"], attack=config["attack"], **about)
    ours = recipe(read_results(path))
    found = shelf.nearest(ours, row_images(row))
    assert found == row
    assert setting_differences(ours, found, shelf.schedule(found)) == ()


@pytest.mark.parametrize(
    ("loss", "attack", "chosen", "said"),
    [
        ({**CONSISTENCY, "lbd": 15.0}, None, "m=2;lbd=15.0;eta=0.5", ()),
        ({**CONSISTENCY, "m": 8}, None, "m=8;lbd=5.0;eta=0.5", ()),
        ({**CONSISTENCY, "lbd": 12.0}, None, "m=2;lbd=15.0;eta=0.5", ("lbd 12, not 15.0",)),
        ({**CONSISTENCY, "eta": 0.0}, None, "m=2;lbd=5.0;eta=0.5", ("eta 0, not 0.5",)),
        ({**CONSISTENCY, "form": "kl"}, None, "m=2;lbd=5.0;eta=0.5", ("form kl, not default",)),
        ({**GAUSSIAN, "m": 4}, None, "", ("m 4, not 1",)),
        ({**GAUSSIAN, "m": 4}, PGD, "m=4;attack=PGD;eps=255/256;steps=10;warmup=10", ()),
        (
            {**GAUSSIAN, "m": 4},
            {**PGD, "name": "ddn", "steps": 2},
            "m=4;attack=PGD;eps=255/256;steps=10;warmup=10",
            ("attack ddn, not PGD", "steps 2, not 10"),
        ),
    ],
    ids=["lbd-15", "m-8", "lbd-12", "eta-0", "form-kl", "gaussian-m-4", "smoothadv", "smoothadv-ddn"],
)
def test_the_nearest_setting(tmp_path, loss, attack, chosen, said):
    path = write(tmp_path / "a.tsv", constant(range(0, 10_000, 10), 1.7), sigma=1.0, loss=loss, attack=attack)
    found = beside(path)
    assert (found.row.setting, found.settings) == (chosen, said)
    assert found.row.images == 10_000


def test_a_row_that_tells_no_setting_is_the_last_choice(shelf):
    """Sun et al. 2025 print no setting: the row of the paper, of lbd 10, stays nearer to lbd 40."""
    ours = Recipe("cifar10", "resnet110", "consistency", 0.5, {"m": 2, "lbd": 40.0, "eta": 0.5, "form": "default"})
    assert shelf.nearest(ours, ALL).logs_of == "Jeong & Shin 2020"
    only = Recipe("cifar100", "resnet110", "consistency", 0.5, {"m": 2, "lbd": 40.0, "eta": 0.5})
    row = shelf.nearest(only, ALL)
    assert setting_differences(only, row, {}) == ("setting not published",)


def test_of_two_rows_with_one_setting_the_one_of_more_seeds(shelf):
    setting = {"m": 4, "eta": 1.0, "alpha": 1.0, "T": 8, "mix_step": 0}
    assert shelf.nearest(Recipe("mnist", "lenet", "smoothmix", 1.0, setting), ALL).seeds == 6


def test_one_of_two_published_numbers_is_enough(shelf):
    """The table has `lbd=4 or 6` for MACER on CIFAR-10."""
    for lbd, said in ((4.0, ()), (6.0, ()), (5.0, ("lbd 5, not 4 or 6 (EXPERIMENTS.MD inconsistent)",))):
        ours = Recipe("cifar10", "resnet110", "macer", 0.5, {"m": 16, "lbd": lbd, "beta": 16.0, "gamma": 8.0})
        assert setting_differences(ours, shelf.nearest(ours, ALL), {}) == said


def test_another_schedule_is_said_where_the_result_records_it(tmp_path):
    config = {**load_preset("mnist-cons-0.5").settings, "seed": 3, "epochs": 5}
    found = beside(write(tmp_path / "a.tsv", constant(range(500), 1.6), info={"config": config}))
    assert found.settings == ("epochs 5, not 90",)


# --- which figures ---


def test_first_images_of_mnist_are_held_against_figures_on_these():
    with (PRESETS / SUBSETS).open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    rows = read_subsets(PRESETS / SUBSETS, ())
    assert len(rows) == 2 * len(lines)
    (row,) = [row for row in rows if (row.method, row.sigma, row.images) == ("gaussian", 0.5, 500)]
    assert (row.acr, row.acr_sd, row.seeds, row.stride) == (1.5028, 0.0022, 5, 1)
    assert row.certified[1.5] == 0.6184


def test_the_tables_of_subsets_and_of_all_images_agree(shelf):
    """Two files: the same settings, seeds, and ACR on all images (which one cuts, the other rounds).

    One setting of SmoothMix has two rows in the one table, of 1 and 6 seeds, and a row of 7 in the other.
    """
    with (PRESETS / SUBSETS).open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        key = ("mnist", line["method"], float(line["sigma"]), line["setting"], 10_000)
        rows = [row for row in shelf.rows if (row.dataset, row.method, row.sigma, row.setting, row.images) == key]
        seeds = sum(row.seeds for row in rows)
        assert int(line["seeds"]) == seeds
        assert float(line["acr_all"]) == pytest.approx(sum(row.acr * row.seeds for row in rows) / seeds, abs=1.1e-4)


@pytest.mark.parametrize(
    ("images", "row_images", "acr"),
    [
        (range(10_000), 10_000, 1.6549),
        (range(500), 500, 1.6069),
        (range(1000), 1000, 1.6047),
        (range(500, 1000), 1000, 1.6047),  # half of the first thousand
        (range(0, 10_000, 20), 10_000, 1.6549),
        (range(5000, 5500), 10_000, 1.6549),
    ],
    ids=["all", "first-500", "first-1000", "second-500", "every-20th", "from-5000"],
)
def test_images_pick_the_figures(tmp_path, images, row_images, acr):
    found = beside(write(tmp_path / "a.tsv", constant(images, 1.6)))
    assert (found.row.images, found.row.acr) == (row_images, acr)
    assert (found.images, found.shared) == (len(images), len(images))


def test_a_broken_table_of_subsets_says_so(tmp_path):
    (tmp_path / SUBSETS).write_text("method,sigma\ngaussian,0.5\n")
    with pytest.raises(InputError, match=r"published_mnist_subsets\.csv is broken: KeyError"):
        read_subsets(tmp_path / SUBSETS, ())
    assert read_subsets(tmp_path / "absent.csv", ()) == []


# --- the errors ---


def test_on_the_same_images_the_seeds_alone_decide(tmp_path):
    """One run beside the mean of five: sd sqrt(1 + 1/5), twice."""
    margin = 2 * 0.0012 * math.sqrt(1.2)
    for name, offset, within in (("a", 0.98, True), ("b", 1.02, False), ("c", -0.98, True), ("d", -1.02, False)):
        found = beside(write(tmp_path / f"{name}.tsv", constant(range(10_000), 1.6549 + offset * margin)))
        assert found.sampling == 0
        assert (found.margin, found.within) == (pytest.approx(margin), within)
        assert found.difference == pytest.approx(offset * margin)


def test_a_part_of_the_images_adds_their_sampling_error(tmp_path):
    """400 images spread over the 10,000: v (1/400 - 1/10000), with v = 0.01 * 400/399."""
    found = beside(write(tmp_path / "a.tsv", constant(range(0, 10_000, 25), 1.65)))
    sampling = math.sqrt(0.01 * 400 / 399 * (1 / 400 - 1 / 10_000))
    assert found.sampling == pytest.approx(sampling)
    assert found.margin == pytest.approx(2 * math.hypot(sampling, 0.0012 * math.sqrt(1.2)))


@pytest.mark.parametrize(("ours", "theirs", "shared"), [(30, 30, 30), (10, 30, 10), (30, 10, 10), (20, 20, 5), (10, 20, 0)])
def test_the_share_of_variance_by_simulation(ours, theirs, shared):
    """The difference of means over two sets of images that overlap, drawn many times: its variance, for variance 1."""
    images = np.random.default_rng(0).standard_normal((20_000, ours + theirs - shared))
    difference = images[:, :ours].mean(1) - images[:, ours - shared :].mean(1)
    assert variance_share(ours, theirs, shared) == pytest.approx(difference.var(), rel=0.05, abs=1e-12)


def test_a_group_pools_the_seeds_of_both_sides(tmp_path):
    acrs = [1.650, 1.654, 1.658]
    paths = [
        write(tmp_path / f"seed{i}.tsv", constant(range(10_000), a), info={"train_seed": i}, model_sha256=str(i))
        for i, a in enumerate(acrs)
    ]
    found = beside(*paths)
    variance = (2 * statistics.variance(acrs) + 4 * 0.0012**2) / 6
    assert found.name == tmp_path.name
    assert found.spread == pytest.approx(math.sqrt(variance * (1 / 3 + 1 / 5)))
    assert found.difference == pytest.approx(1.654 - 1.6549)
    assert found.within
    assert len(published(*paths).published) == 4  # the group, then its runs


def test_without_two_seeds_on_either_side_nobody_knows(tmp_path):
    options = {"dataset": "cifar10", "arch": RESNET, "loss": {**CONSISTENCY, "lbd": 10.0}}
    paths = [
        write(tmp_path / f"r{i}.tsv", constant(range(10_000), 0.71 + i / 1000), info={"train_seed": i}, **options)
        for i in range(2)
    ]
    alone = published(paths[0])
    (found,) = alone.published
    assert (found.spread, found.margin, found.within) == (None, 0, None)
    assert any("the spread over seeds is unknown" in note for note in alone.notes)
    together = beside(*paths)
    assert together.spread == pytest.approx(0.001 / math.sqrt(2) * math.sqrt(1 / 2 + 1))
    assert together.within is False  # 0.7105 beside 0.7195
    part = beside(write(tmp_path / "p.tsv", constant(range(0, 10_000, 100), 0.71), **options))
    assert part.within  # within the sampling error alone, so with the seeds' on top as well
    part = beside(write(tmp_path / "q.tsv", constant(range(0, 10_000, 100), 0.65), **options))
    assert part.within is None  # beyond it, but the seeds' spread is missing


def test_a_single_image_has_no_sampling_error_to_tell(tmp_path):
    found = beside(write(tmp_path / "a.tsv", [(0, 7, 7, 1.0)]))
    assert (found.sampling, found.within) == (None, None)


# --- what is said ---


@pytest.mark.parametrize(
    ("protocol", "said"),
    [
        ({"n": 1000}, "n 1000, not 100000"),
        ({"n0": 10}, "n0 10, not 100"),
        ({"alpha": 0.01}, "alpha 0.01, not 0.001"),
        ({"certifier": {"name": "sequential"}}, "certifier sequential, not cohen"),
        ({"labels": True}, "labels given to the certifier"),
        ({"radii": [1.5, 1.7]}, "only given radii decided"),
    ],
    ids=["n", "n0", "alpha", "certifier", "labels", "radii"],
)
def test_another_protocol_is_never_within(tmp_path, protocol, said):
    comparison = published(write(tmp_path / "a.tsv", [(i, 7, 7, (1.5, 1.7)[i % 2]) for i in range(500)], **protocol))
    (found,) = comparison.published
    assert (found.protocol, found.within) == ((said,), None)
    assert any(said in note for note in comparison.notes)
    (row,) = next(table for table in tables(comparison) if table.title == "Comparison with the published figures").rows
    assert (row[4].text, row[4].detail) == ("other protocol", said)
    assert row[1].text.startswith("≥") == (said == "only given radii decided")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"sigma": 0.3, "info": {"preset": "mnist-cons-0.25"}}, "none for mnist, lenet, consistency, sigma 0.3"),
        (
            {"info": {"overrides": {"attack.name": "pgd", "epochs": 3}}},
            "it departs from the preset mnist-cons-0.5 in attack.name",
        ),
        ({"info": {"overrides": {"loss.name": "stability"}}}, "it departs from the preset mnist-cons-0.5 in loss.name"),
        (
            {"info": {"overrides": {"data.root": "x", "arch.depth": 3}}},
            "it departs from the preset mnist-cons-0.5 in arch.depth, data.root",
        ),
        ({"info": {"preset": "theirs"}}, "the preset that it records is unavailable: there is no preset 'theirs'"),
        ({"info": {"preset": "digits-cons-0.25"}}, "the preset digits-cons-0.25 reproduces no published row"),
        ({"split": "train"}, "they are for the split test, and this is train"),
        ({"info": {"overrides": {"noise.name": "uniform"}}}, "it departs from the preset mnist-cons-0.5 in noise.name"),
        (
            {"info": {"preset": None, "loss": None}},
            "it does not record a preset; --reproduces PRESET names the one to compare it with",
        ),
    ],
    ids=["sigma", "attack", "loss", "network", "no-preset", "no-row", "split", "noise", "imported"],
)
def test_no_row_is_said_with_its_reason(tmp_path, changed, why):
    comparison = published(write(tmp_path / "a.tsv", constant(range(20), 1.0), **changed))
    assert comparison.published == ()
    assert comparison.notes == (f"a: no published figures: {why}",)


def test_a_file_without_protocol_has_no_row(tmp_path):
    path = write(tmp_path / "a.tsv", constant(range(20), 1.0))
    path.with_name("a.tsv.protocol.json").unlink()
    assert recipe(read_results(path)) == "there is no protocol beside the file"


def test_other_images_are_said_in_the_row_and_in_a_note(tmp_path):
    paths = [write(tmp_path / f"{name}.tsv", constant(range(200), 1.6), loss=loss) for name, loss in METHODS.items()]
    comparison = published(*paths)
    rows = next(table for table in tables(comparison) if table.title == "Comparison with the published figures").rows
    assert [(row[5].text, row[5].detail) for row in rows] == [("200", "200 of their 500")] * 2
    (note,) = comparison.notes
    assert note.startswith("a, b: 200 images, but the published figures are on 500 (200 shared)")


METHODS = {"a": GAUSSIAN, "b": CONSISTENCY}


def test_certified_accuracy_stands_beside_the_published_one_where_there_is_one(tmp_path):
    found = beside(write(tmp_path / "a.tsv", constant(range(500), 1.6)), radii=(1.0, 1.1, 1.6))
    assert [(p.radius, p.accuracy, p.difference) for p in found.points] == [
        (0.0, 0.9912, pytest.approx(1 - 0.9912)),
        (1.0, 0.9136, pytest.approx(1 - 0.9136)),
    ]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_has_the_published_figures(tmp_path, form):
    text = render(published(write(tmp_path / "a.tsv", constant(range(500), 1.61))), form)
    assert "1.6069" in text
    assert "Jeong" in text
    assert "1.6069" not in render(compare([read_results(tmp_path / "a.tsv")]), form)


def test_csv_and_json_parse_back(tmp_path):
    comparison = published(write(tmp_path / "a.tsv", constant(range(500), 1.61)), radii=(1.0,))
    (found,) = comparison.published
    lines = list(csv.DictReader(io.StringIO(render(comparison, "csv"))))
    assert [float(lines[1][f"published_{key}"]) for key in ("acr", "difference", "margin", "accuracy")] == [
        1.6069,
        found.difference,
        found.margin,
        0.9136,
    ]
    assert lines[1]["published_within"] == "True"
    (parsed,) = json.loads(render(comparison, "json"))["published"]
    assert (parsed["row"]["acr"], parsed["within"], parsed["margin"]) == (1.6069, True, found.margin)


# --- real results ---


@pytest.mark.parametrize("images", [10_000, 1000, 500])
@pytest.mark.parametrize("method", ["gaussian", "consistency"])
def test_three_of_the_five_published_runs_are_within(shared, tmp_path, method, images):
    """The authors' own logs, as if they were ours: they must agree with the figures that were computed from them."""
    loss = {"gaussian": GAUSSIAN, "consistency": CONSISTENCY}[method]
    paths = []
    for seed in (1, 2, 3):
        log = read_results(shared / "logs" / f"mnist-lenet-{method}-0.5-run{seed}.tsv")
        rows = list(zip(*(c[:images].tolist() for c in (log.idx, log.label, log.predict, log.radius)), strict=True))
        paths.append(write(tmp_path / method / f"seed{seed}.tsv", rows, loss=loss, info={"train_seed": seed}))
    found = published(*paths, radii=(0.5, 1.0)).published
    assert [entry.name for entry in found] == [method, "seed1", "seed2", "seed3"]
    for entry in found:
        assert (entry.row.images, entry.row.seeds, entry.sampling) == (images, 5, 0)
        assert entry.within
    assert all(abs(point.difference) < 0.005 for point in found[0].points)
    assert abs(found[0].difference) < 0.0016


# --- the command ---


def test_the_command(tmp_path):
    from rscli.cli.compare import compare as body

    app = typer.Typer()
    app.command()(body)
    path = str(write(tmp_path / "a.tsv", constant(range(200), 1.6)))
    answer = CliRunner().invoke(app, [path, "--published"])
    assert answer.exit_code == 0
    assert "Comparison with the published figures" in answer.stdout
    assert "200 images, but the published figures are on 500" in " ".join(answer.stderr.split())
    assert "published" not in CliRunner().invoke(app, [path]).stdout
