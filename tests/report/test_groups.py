"""Runs that differ in their training seed alone: which they are, and their mean and standard deviation."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rscli.config.layers import resolve
from rscli.report.groups import grouped
from rscli.report.render import FORMATS, render
from rscli.report.summary import compare
from rscli.report.tables import tables
from rscli.results.reader import read_results
from rscli.results.rows import Row
from runs import finished

LOSS = {"name": "consistency", "m": 2, "lbd": 5.0, "eta": 0.5, "form": "default"}
RADII = {0: (0.5, 1.0, 0.0, 0.25), 1: (0.6, 1.1, 0.0, 0.0), 2: (0.2, 1.5, 0.4, 0.3)}  # by seed; 0: an abstention


def write(path: Path, trained_with: int | None, *, info: dict | None = None, **protocol) -> Path:
    """A finished result of ours, whose model was trained with that seed."""
    own = {
        "model_sha256": f"model {trained_with}",
        "data_sha256": "00",
        "seed": 0,
        "info": {"model": str(path), "arch": {"name": "lenet"}, "loss": LOSS, "train_seed": trained_with, **(info or {})},
    }
    radii = RADII[(trained_with or 0) % 3]
    rows = [Row(idx, 7, 7 if radius else -1, radius, radius > 0, 1.0) for idx, radius in enumerate(radii)]
    return finished(path, rows, **{**own, **protocol})


def groups_of(*paths: Path, **options):
    return grouped(compare([read_results(path) for path in paths], **options))


@pytest.fixture
def seeds(tmp_path):
    return [write(tmp_path / "cons" / f"seed{seed}" / "results.tsv", seed) for seed in RADII]


def test_mean_and_standard_deviation_over_seeds(seeds):
    (group,) = groups_of(*seeds, radii=(0.3, 1.0)).groups
    acrs = [sum(radii) / 4 for radii in RADII.values()]
    assert (group.acr, group.acr_sd) == (pytest.approx(statistics.mean(acrs)), pytest.approx(statistics.stdev(acrs)))
    assert (group.seeds, group.members) == ((0, 1, 2), ("seed0", "seed1", "seed2"))
    shares = {0.0: [0.75, 0.5, 1.0], 0.3: [0.5, 0.5, 0.75], 1.0: [0.25, 0.25, 0.25]}
    assert {p.radius: (p.accuracy, p.accuracy_sd) for p in group.points} == {
        radius: (pytest.approx(statistics.mean(values)), pytest.approx(statistics.stdev(values)))
        for radius, values in shares.items()
    }


@pytest.mark.parametrize(
    "changed",
    [
        {"n": 10_000},
        {"data_sha256": "11"},
        {"seed": 1},
        {"info": {"loss": {**LOSS, "lbd": 10.0}}},
        {"info": {"attack": {"name": "pgd"}}},
        {"info": {"arch": {"name": "cifar-resnet", "depth": 20}}},
        {"info": {"config": {"epochs": 5, "seed": 1}}},
    ],
    ids=["n", "images", "seed-of-the-noise", "lbd", "attack", "architecture", "epochs"],
)
def test_runs_that_differ_in_more_than_the_seed_are_no_group(tmp_path, changed):
    paths = write(tmp_path / "a.tsv", 0, info={"config": {"epochs": 90, "seed": 0}}), write(tmp_path / "b.tsv", 1, **changed)
    assert groups_of(*paths, allow_different=True).groups == ()


def test_what_is_about_the_machine_may_differ(tmp_path):
    infos = [{"config": {"epochs": 90, "seed": i}, "batch": 2**i, "device": f"cuda:{i}", "max": 4 + i} for i in (0, 1)]
    paths = [write(tmp_path / f"a{i}.tsv", i, info=info) for i, info in enumerate(infos)]
    assert groups_of(*paths).groups[0].members == ("a0", "a1")


def test_a_run_of_before_a_setting_was_there_is_in_the_group(tmp_path):
    """The recorded configuration of an older version lacks settings, whose defaults the newer one records."""
    configs = [resolve("digits-gaussian-0.25", sets=[f"seed={seed}"]).as_dict() for seed in (0, 1)]
    for key in ("clip_norm", "precision", "ramps"):
        del configs[0][key]
    paths = [write(tmp_path / f"{i}.tsv", i, info={"config": config}) for i, config in enumerate(configs)]
    assert len(groups_of(*paths).groups) == 1
    configs[1]["clip_norm"] = 2.0
    assert not groups_of(paths[0], write(tmp_path / "other.tsv", 1, info={"config": configs[1]})).groups


def test_an_unknown_seed_is_in_no_group(tmp_path):
    paths = [write(tmp_path / f"{i}.tsv", None) for i in range(2)]
    (tmp_path / "0.tsv.protocol.json").unlink()
    assert groups_of(*paths).groups == ()


def test_the_same_seed_twice_is_not_averaged(tmp_path):
    comparison = groups_of(*[write(tmp_path / f"{i}.tsv", 4) for i in "ab"])
    assert comparison.groups == ()
    assert "the same training seed: a, b" in comparison.notes[-1]


def test_two_methods_are_two_groups_named_by_what_their_runs_have_in_common(tmp_path):
    other = {"info": {"loss": {"name": "gaussian"}}}
    paths = [write(tmp_path / "cons-0.5" / f"seed{i}" / "results.tsv", i) for i in (0, 1)]
    paths += [write(tmp_path / "gaussian" / f"seed{i}" / "results.tsv", i, **other) for i in (0, 1)]
    found = groups_of(*paths).groups
    assert [(group.name, group.members) for group in found] == [
        ("cons-0.5", ("cons-0.5/seed0", "cons-0.5/seed1")),
        ("gaussian", ("gaussian/seed0", "gaussian/seed1")),
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("cons-0.5/seed9", "cons-0.5/seed10"), "cons-0.5"),
        (("cons_run1", "cons_run2"), "cons"),
        (("A1", "A2"), "A"),
        (("seed0", "seed1"), "folder"),
        (("first", "second"), "folder"),
        (("first", "folder"), "first + folder"),
    ],
    ids=["folders", "runs", "numbers", "nothing-else", "nothing-in-common", "taken"],
)
def test_the_name_of_a_group(tmp_path, names, expected):
    paths = [write(tmp_path / "folder" / f"{i}.tsv", i) for i in range(2)]
    assert groups_of(*paths, names=names).groups[0].name == expected


def test_the_table_has_means_with_deviations(seeds):
    table = tables(groups_of(*seeds, radii=(1.0,)))[1]
    (row,) = table.rows
    assert [(cell.text, cell.detail) for cell in row] == [
        ("cons", ""),
        ("3", "(0, 1, 2)"),
        ("0.4875", "±0.0976"),  # of 0.4375, 0.425 and 0.6
        ("75.0", "±25.0"),
        ("25.0", "±0.0"),
    ]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_has_the_group(seeds, form):
    comparison = groups_of(*seeds)
    with_groups, without = render(comparison, form), render(compare(comparison.runs), form)
    assert "cons" in with_groups.replace(str(seeds[0].parent.parent), "")
    assert "cons" not in without.replace(str(seeds[0].parent.parent), "")


def test_csv_and_json_parse_back(seeds):
    comparison = groups_of(*seeds, radii=(0.5,))
    (group,) = comparison.groups
    lines = list(csv.DictReader(io.StringIO(render(comparison, "csv"))))
    assert [line["seeds"] for line in lines] == ["1"] * 6 + ["3"] * 2
    last = lines[-1]
    assert [float(last[key]) for key in ("acr", "acr_sd", "radius", "accuracy", "accuracy_sd")] == [
        group.acr,
        group.acr_sd,
        0.5,
        group.points[1].accuracy,
        group.points[1].accuracy_sd,
    ]
    assert last["path"] == last["p_value"] == ""
    (found,) = json.loads(render(comparison, "json"))["groups"]
    assert (found["acr_sd"], found["seeds"]) == (group.acr_sd, [0, 1, 2])


def test_csv_has_the_same_columns_with_and_without_groups(seeds):
    headers = {render(comparison, "csv").splitlines()[0] for comparison in (groups_of(*seeds), groups_of(seeds[0]))}
    assert len(headers) == 1


def test_the_command_groups_unless_told_not_to(seeds):
    from rscli.cli.compare import compare as body

    app = typer.Typer()
    app.command()(body)
    folders = [str(path.parent) for path in seeds]
    assert "Mean over training seeds" in CliRunner().invoke(app, folders).stdout
    assert "Mean over training seeds" not in CliRunner().invoke(app, [*folders, "--no-groups"]).stdout
    assert json.loads(CliRunner().invoke(app, [*folders, "--no-groups", "--json"]).stdout)["groups"] == []
