"""Comparisons: published figures, paired tests against brute force, refusals, and formats that parse back."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from rscli.errors import InputError
from rscli.report.groups import grouped
from rscli.report.plot import curve, draw, save_plot
from rscli.report.published import with_published
from rscli.report.render import FORMATS, latex_text, print_tables, render
from rscli.report.summary import compare
from rscli.report.tables import radius_text, tables
from rscli.results.reader import read_results
from rscli.results.rows import Row
from runs import finished

A = [(3, 0, 0, 0.6), (1, 1, 1, 0.25), (4, 2, -1, 0.0), (5, 3, 7, 1.1), (2, 4, 4, 1.25)]  # idx, label, predict, radius
B = [(3, 0, 0, 0.5), (1, 1, 1, 0.75), (4, 2, 2, 0.1), (5, 3, 3, 1.0), (2, 4, -1, 0.0)]


def write(path: Path, rows=A, **protocol) -> Path:
    """A finished result file of ours; every image used 1,000 samples, and the last one of the list is saturated."""
    made = [
        Row(idx, label, predict, radius, predict == label, 2.0, 100, 1000, 900, 50, "n-reached", position == len(rows))
        for position, (idx, label, predict, radius) in enumerate(rows, start=1)
    ]
    return finished(path, made, **{"data_sha256": "00", "radii": None, "precision": "fp32", **protocol})


def foreign(path: Path, rows=A) -> Path:
    """The same as another tool writes it: no protocol, no columns of ours."""
    lines = [f"{i}\t{label}\t{p}\t{r:.3g}\t{int(p == label)}\t0:00:02" for i, label, p, r in rows]
    path.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n" + "\n".join(lines) + "\n")
    return path


def compared(*paths: Path, **options):
    return compare([read_results(path) for path in paths], **options)


@pytest.fixture
def pair(tmp_path):
    return write(tmp_path / "a.tsv"), write(tmp_path / "b.tsv", B, sigma=0.25)


# --- figures ---


def test_the_figures_of_one_run(pair):
    comparison = compared(pair[0])
    (summary,) = comparison.summaries
    assert comparison.radii == (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)  # up to the largest radius of a right answer
    assert summary.acr == pytest.approx((0.6 + 0.25 + 1.25) / 5)
    assert [point.count for point in summary.points] == [3, 3, 2, 1, 1, 1]
    assert summary.points[2].accuracy == 0.4
    assert (summary.images, summary.abstained, summary.saturated, summary.samples) == (5, 1, 1, 5500)
    assert (summary.seconds, summary.largest, summary.lower_bound) == (10.0, 1.25, False)
    assert (summary.sigma, summary.n0, summary.n, summary.alpha, summary.certifier) == (0.5, 100, 1000, 0.001, "cohen")
    assert comparison.notes == ()
    assert comparison.differences == ()


def test_clopper_pearson_intervals_are_exact(pair):
    """Tails of the binomial distribution in exact arithmetic: 2.5 % at either end of the interval."""
    for point in compared(pair[0]).summaries[0].points:

        def at_most(k, p):
            p = Fraction(p)
            return float(sum(math.comb(5, i) * p**i * (1 - p) ** (5 - i) for i in range(k + 1)))

        assert at_most(point.count, point.high) == pytest.approx(0.025)
        assert 1 - at_most(point.count - 1, point.low) == pytest.approx(0.025)


def test_how_many_certificates_may_be_wrong(tmp_path):
    """docs/certification.md: of 500 at alpha .001, 4 at confidence .999."""
    path = write(tmp_path / "a.tsv", [(i, 0, 0, 1.0) for i in range(500)])
    assert compared(path).summaries[0].may_be_wrong == 4


def test_radii_are_those_asked_for_and_0(pair):
    assert compared(pair[0], radii=(0.1, 2.0)).radii == (0.0, 0.1, 2.0)


def test_nothing_certified_still_makes_a_table(tmp_path):
    comparison = compared(write(tmp_path / "a.tsv", [(0, 1, -1, 0.0), (1, 2, 3, 0.4)]))
    assert comparison.radii == (0.0,)
    assert comparison.summaries[0].acr == 0
    for form in FORMATS:
        assert render(comparison, form)


def test_differences_are_paired_and_match_brute_force(pair):
    comparison = compared(*pair)
    (difference,) = comparison.differences
    a, b = ({i: r if p == label else -1 for i, label, p, r in rows} for rows in (A, B))
    gains = [max(b[i], 0) - max(a[i], 0) for i in sorted(a)]
    assert (difference.name, difference.baseline) == ("b", "a")
    assert difference.acr.difference == pytest.approx(sum(gains) / 5)
    p_values = []
    for radius, test in zip(comparison.radii, difference.tests, strict=True):
        only_b = sum(b[i] >= radius > a[i] for i in a)
        only_a = sum(a[i] >= radius > b[i] for i in a)
        assert (test.radius, test.only_first, test.only_second) == (radius, only_b, only_a)
        signs = [
            sum(signs) for signs in itertools.product((-1, 1), repeat=only_a + only_b)
        ]  # every assignment of the discordant
        p_values.append(sum(abs(s) >= abs(only_a - only_b) for s in signs) / len(signs))
        assert test.p_value == pytest.approx(p_values[-1])
    ordered = sorted(p_values)
    for test, p in zip(difference.tests, p_values, strict=True):
        steps = [min(1, q * (len(ordered) - i)) for i, q in enumerate(ordered) if q <= p]
        assert test.adjusted == pytest.approx(max(steps))


def test_the_bootstrap_interval_covers_every_resample_that_it_should(pair):
    """All 5^5 resamples of five images: the exact bootstrap distribution."""
    a, b = ({i: r * (p == label) for i, label, p, r in rows} for rows in (A, B))
    gains = [b[i] - a[i] for i in a]
    exact = np.quantile([sum(draw) / 5 for draw in itertools.product(gains, repeat=5)], [0.025, 0.975])
    acr = compared(*pair).differences[0].acr
    assert (acr.low, acr.high) == pytest.approx(exact, abs=0.03)


# --- published logs ---


# Logs of one run, and the setting of their row. The MNIST logs are three of the five runs that their rows average.
PUBLISHED = {
    "cifar10-resnet110-consistency-0.25": "m=2;lbd=20.0;eta=0.5",
    "cifar10-resnet110-consistency-0.5": "m=2;lbd=10.0;eta=0.5",
    "cifar10-resnet20-gaussian-0.5": "",
    "imagenet-resnet50-consistency-0.5": "m=2;lbd=5.0;eta=0.5",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures_from_the_published_log(shared, name):
    key = dict(zip(("dataset", "arch", "method", "sigma"), name.split("-"), strict=True))
    key |= {"setting": PUBLISHED[name], "logs_of": "Jeong & Shin 2020"}
    with (shared / "published.csv").open(encoding="utf-8") as file:
        (row,) = [row for row in csv.DictReader(file) if all(row[column] == value for column, value in key.items())]
    assert row["seeds"] == "1"
    published = {float(column[3:]): float(value) for column, value in row.items() if column.startswith("ca_")}
    (summary,) = compared(shared / "logs" / f"{name}.tsv", radii=tuple(published)).summaries
    assert summary.images == int(row["images"])
    assert 0 <= summary.acr - float(row["acr"]) < 1e-4  # the table cuts off after four digits (.551851 is .5518 there)
    assert {point.radius: round(point.accuracy, 4) for point in summary.points} == published


def test_consistency_beats_gaussian_on_published_mnist_logs(shared):
    paths = [shared / "logs" / f"mnist-lenet-{method}-0.5-run1.tsv" for method in ("gaussian", "consistency")]
    (difference,) = compared(*paths, radii=(1.5,)).differences
    assert 0.09 < difference.acr.low < difference.acr.difference < difference.acr.high < 0.11
    assert difference.tests[-1].adjusted < 1e-6


# --- alignment and refusals ---


def test_only_common_images_count_and_a_note_says_so(tmp_path):
    first, second = write(tmp_path / "a.tsv"), write(tmp_path / "b.tsv", [*B[:3], (9, 9, 9, 1.0)])
    comparison = compared(first, second)
    assert [run.idx.tolist() for run in comparison.runs] == [[1, 3, 4]] * 2
    assert comparison.runs[0].radius.tolist() == [0.25, 0.6, 0.0]
    assert comparison.summaries[0].acr == pytest.approx(0.85 / 3)
    (note,) = comparison.notes
    assert "5 (a), 4 (b)" in note
    assert "the 3 that all share" in note


def test_the_order_of_lines_does_not_matter(tmp_path):
    paths = [foreign(tmp_path / "a.tsv"), foreign(tmp_path / "b.tsv", A[::-1])]
    (difference,) = compared(*paths).differences
    assert (difference.acr.difference, difference.acr.low, difference.acr.high) == (0, 0, 0)


def test_no_common_image(tmp_path):
    with pytest.raises(InputError, match="no image in common"):
        compared(write(tmp_path / "a.tsv"), write(tmp_path / "b.tsv", [(99, 0, 0, 1.0)]))


def test_labels_that_disagree_are_different_data(tmp_path):
    with pytest.raises(InputError, match=r"image 5 has the label 3 in a and 6 in b \(1 of 5"):
        compared(write(tmp_path / "a.tsv"), write(tmp_path / "b.tsv", [*B[:3], (5, 6, 6, 1.0), B[4]]))


GRID = [(i, label, p, math.floor(r / 0.5) * 0.5) for i, label, p, r in B]


@pytest.mark.parametrize(
    ("rows", "protocol", "said"),
    [
        (B, {"n": 10_000}, "n: 1000 (a); 10000 (b)"),
        (B, {"alpha": 0.01}, "alpha: 0.001 (a); 0.01 (b)"),
        (GRID, {"radii": [0.5, 1.0]}, "radii decided: as large as possible (a); (0.5, 1.0) (b)"),
        (GRID, {"certifier": {"name": "sequential", "radii": [0.5, 1.0]}}, "radii decided: as large as possible (a)"),
        (B, {"labels": True}, "labels given to the certifier: None (a); True (b)"),
        (B, {"noise": {"name": "uniform"}}, "noise: gaussian (a); uniform (b)"),
    ],
    ids=["n", "alpha", "radii", "radii-of-the-certifier", "labels", "noise"],
)
def test_protocols_that_must_not_be_mixed(tmp_path, rows, protocol, said):
    paths = write(tmp_path / "a.tsv"), write(tmp_path / "b.tsv", rows, **protocol)
    with pytest.raises(InputError) as caught:
        compared(*paths)
    assert said in caught.value.message
    assert "--allow-different" in caught.value.hint
    assert any(said in note for note in compared(*paths, allow_different=True).notes)


@pytest.mark.parametrize(
    ("protocol", "said"),
    [
        ({"certifier": {"name": "adaptive"}}, "certifier: cohen (a); adaptive (b)"),
        ({"precision": "bf16"}, "precision: fp32 (a); bf16 (b)"),
        ({"data_sha256": "11"}, "fingerprint of the images: 00 (a); 11 (b)"),
    ],
    ids=["certifier", "precision", "images"],
)
def test_protocols_that_differ_with_a_note(tmp_path, protocol, said):
    assert compared(write(tmp_path / "a.tsv"), write(tmp_path / "b.tsv", B, **protocol)).notes == (said,)


def test_another_sigma_is_what_one_compares(pair):
    comparison = compared(*pair)
    assert comparison.notes == ()
    assert [summary.sigma for summary in comparison.summaries] == [0.5, 0.25]


def test_files_without_a_protocol_count_as_unknown(tmp_path):
    comparison = compared(write(tmp_path / "a.tsv"), foreign(tmp_path / "b.tsv", B))
    assert [note.split(":")[0] for note in comparison.notes] == [
        "n and alpha are unknown for files without a protocol",
        "radii are rounded to three digits, some of them up, in b",
    ]
    theirs = comparison.summaries[1]
    assert (theirs.n, theirs.alpha, theirs.samples, theirs.saturated, theirs.may_be_wrong) == (None,) * 5


def test_decided_radii_make_acr_a_lower_bound_that_is_rounded_down(tmp_path):
    rows = [(0, 0, 0, 0.5), (1, 0, 0, 0.5), (2, 0, 1, 0.5)]
    comparison = compared(write(tmp_path / "a.tsv", rows, radii=[0.5, 0.7]), radii=(0.25, 0.5))
    assert comparison.summaries[0].lower_bound
    assert tables(comparison)[0].rows[0][1].text == "≥ 0.3333"
    assert "a did not decide the radius 0.0, 0.25: its certified accuracy there is a lower bound" in comparison.notes[0]
    rows = [(0, 0, 0, 0.5), (1, 0, 0, 0.5), (2, 0, 0, 1.0)]
    comparison = compared(write(tmp_path / "b.tsv", rows, radii=[0.5, 1.0]))
    assert comparison.radii == (0.0, 0.5, 1.0)
    assert tables(comparison)[0].rows[0][1].text == "≥ 0.6666"


def test_radii_that_the_certifier_did_not_heed_do_not_count(tmp_path):
    comparison = compared(write(tmp_path / "a.tsv"), write(tmp_path / "b.tsv", B, radii=[0.5, 1.0]))
    assert not comparison.summaries[1].lower_bound


# --- lower bounds ---


ASKED = [(0, 0, 0, 0.5), (1, 0, 0, 1.0), (2, 0, -1, 0.0)]
"""Of three images, two are certified at 0.5 and one at 1; of the third, nobody knows whether it is right at 0."""


def cells(table) -> dict[str, str]:
    """The first row of a table, by column."""
    return dict(zip(table.header, (cell.text for cell in table.rows[0]), strict=True))


@pytest.mark.parametrize(
    ("asked", "at_0", "abstained", "notes"),
    [
        (
            [0.5, 1.0],
            "≥ 66.6",
            "≤ 1 (33.4 %)",
            (
                "a did not decide the radius 0.0: its certified accuracy there is a lower bound, "
                "and its abstentions are an upper bound",
            ),
        ),
        ([0.0, 0.5, 1.0], "66.7", "1 (33.3 %)", ()),
    ],
    ids=["not-asked", "asked"],
)
def test_radius_0_is_a_lower_bound_unless_it_was_asked_for(tmp_path, asked, at_0, abstained, notes):
    comparison = compared(write(tmp_path / "a.tsv", ASKED, radii=asked))
    accuracy, protocol = tables(comparison)
    assert cells(accuracy) == {"model": "a", "ACR": "≥ 0.5000", "0.00": at_0, "0.50": "66.7", "1.00": "33.3"}
    assert cells(protocol)["abstained"] == abstained
    assert comparison.notes == notes
    bounds = [bool(notes), False, False]
    (result,) = json.loads(render(comparison, "json"))["results"]
    assert [point["lower_bound"] for point in result["points"]] == bounds
    assert (result["lower_bound"], result["abstained_upper_bound"]) == (True, bool(notes))
    lines = list(csv.DictReader(io.StringIO(render(comparison, "csv"))))
    assert [line["accuracy_lower_bound"] for line in lines] == list(map(str, bounds))
    assert [(line["lower_bound"], line["abstained_upper_bound"]) for line in lines] == [("True", str(bool(notes)))] * 3


def test_every_table_for_people_marks_the_bound(tmp_path):
    comparison = compared(write(tmp_path / "a.tsv", ASKED, radii=[0.5, 1.0]))
    for form, marked in {"table": "≥ 66.6", "markdown": "≥ 66.6", "latex": r"$\ge$ 66.6"}.items():
        text = " ".join(render(comparison, form).split())
        assert marked in text
        assert "marks a lower bound" in text


def test_only_radii_that_both_decided_are_tested(tmp_path):
    """Three images against none: p = 2 / 2^3. A second test, of a radius that nobody decided, would double it."""
    first = write(tmp_path / "a.tsv", [(i, 0, -1, 0.0) for i in range(3)], radii=[0.5])
    second = write(tmp_path / "b.tsv", [(i, 0, 0, 0.5) for i in range(3)], radii=[0.5])
    comparison = compared(first, second)
    (test,) = comparison.differences[0].tests
    assert (test.radius, test.only_first, test.only_second, test.adjusted) == (0.5, 3, 0, 0.25)
    assert cells(tables(comparison)[1]) == {"model": "b", "ACR": "+0.5000", "0.00": "–", "0.50": "+100.0"}
    lines = list(csv.DictReader(io.StringIO(render(comparison, "csv"))))
    assert [(line["name"], line["radius"], line["p_adjusted"]) for line in lines[2:]] == [
        ("b", "0.0", ""),
        ("b", "0.5", "0.25"),
    ]


def test_given_radii_beside_all_radii(tmp_path):
    paths = write(tmp_path / "a.tsv", ASKED), write(tmp_path / "b.tsv", ASKED, radii=[0.5, 1.0])
    comparison = compared(*paths, allow_different=True, radii=(0.25, 0.5))
    assert [[point.lower_bound for point in s.points] for s in comparison.summaries] == [[False] * 3, [True, True, False]]
    assert [test.radius for test in comparison.differences[0].tests] == [0.5]
    assert compared(*paths, allow_different=True, radii=(0.25,)).differences[0].tests == ()


def test_a_mean_of_lower_bounds_is_one(tmp_path):
    """At 0.5, each is right on 1/3 of the images; at 0.75 the mean of 1/3 and 0, 16.67 %, is rounded down."""
    rows = [[(0, 0, 0, radius), (1, 0, -1, 0.0), (2, 0, 1, 1.0)] for radius in (1.0, 0.5)]
    infos = [{"train_seed": seed} for seed in (0, 1)]
    paths = [write(tmp_path / f"s{i}.tsv", rows[i], radii=[0.5, 1.0], info=infos[i]) for i in (0, 1)]
    comparison = grouped(compared(*paths, radii=(0.5, 0.75)))
    (group,) = comparison.groups
    assert [point.lower_bound for point in group.points] == [True, False, True]
    assert cells(tables(comparison)[1])["0.75"] == "≥ 16.6"
    assert cells(tables(comparison)[1])["0.50"] == "33.3"
    lines = list(csv.DictReader(io.StringIO(render(comparison, "csv"))))
    assert [line["accuracy_lower_bound"] for line in lines[-3:]] == ["True", "False", "True"]


def test_beside_a_published_figure_the_difference_is_a_bound_too(tmp_path):
    """All of the first 500 are right with 1.0. Published: ACR 1.6069, and 99.12 and 91.36 % at 0 and 1."""
    loss = {"name": "consistency", "m": 2, "lbd": 5.0, "eta": 0.5, "form": "default"}
    about = {"dataset": "mnist", "n": 100_000, "info": {"arch": {"name": "lenet"}, "loss": loss, "preset": "mnist-cons-0.5"}}
    comparison = with_published(compared(write(tmp_path / "a.tsv", [(i, 7, 7, 1.0) for i in range(500)], radii=[1.0], **about)))
    figures, accuracies = tables(comparison)[1:3]
    assert cells(figures)["difference"] == "≥ −0.6069"
    assert [(cell.text, cell.detail) for cell in accuracies.rows[0][1:]] == [("99.1", "≥ +0.8"), ("91.4", "+8.6")]
    (found,) = json.loads(render(comparison, "json"))["published"]
    assert [point["lower_bound"] for point in found["points"]] == [True, False]


def test_a_plot_says_that_between_given_radii_it_shows_a_bound(tmp_path):
    def said(**protocol) -> str:
        path = write(tmp_path / f"{len(protocol)}.tsv", ASKED, **protocol)
        return " ".join(text.get_text() for text in draw(compared(path)).axes[0].texts)

    assert "the curve is a lower bound" in said(radii=[0.5, 1.0])
    assert "bound" not in said()


# --- settings of certifiers ---


@pytest.mark.parametrize(
    ("name", "key", "ours", "theirs", "decisive"),
    [
        ("two-stage", "radius_tolerance", 0.05, 0.5, True),
        ("two-sided", "alpha_split", 0.9, 0.5, True),
        ("sequential", "early", 0.2, 0.0, True),
        ("sequential", "futility", 0.001, 0.5, False),
        ("cohen", "early_abstain", False, True, False),
        ("of-another-package", "loss", 1, 2, False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_of_one_certifier_that_differ(tmp_path, name, key, ours, theirs, decisive):
    paths = [write(tmp_path / f"{i}.tsv", certifier={"name": name, key: x}) for i, x in (("a", ours), ("b", theirs))]
    said = f"{key} of {name}: {ours} (a); {theirs} (b)"
    if not decisive:
        assert compared(*paths).notes == (said,)
        return
    with pytest.raises(InputError) as caught:
        compared(*paths)
    assert said in caught.value.message
    assert compared(*paths, allow_different=True).notes == (f"figures are not comparable: {said}",)


def test_the_same_certifier_of_another_package_is_told_and_its_rows_are_not_recomputed(tmp_path):
    paths = [write(tmp_path / f"{i}.tsv", certifier={"name": "cohen", "package": i}) for i in ("first", "second")]
    notes = compared(*paths).notes
    assert notes[-1] == "package of cohen: first (first); second (second)"
    assert all(
        "its rows are not checked by recomputing them" in note and "no installed package provides" in note
        for note in notes[:-1]
    )
    assert len(notes) == 3


def test_settings_that_an_older_protocol_lacks_are_unknown(tmp_path):
    sections = [{"name": "two-stage"}, {"name": "two-stage", "loss": 0.05}]
    assert compared(*[write(tmp_path / f"{i}.tsv", certifier=one) for i, one in enumerate(sections)]).notes == ()


def test_settings_are_compared_among_runs_of_one_certifier(tmp_path):
    sections = [{"name": "mine", "loss": 0.1}, {"name": "two-stage", "loss": 0.2}, {"name": "two-stage", "loss": 0.3}]
    paths = [write(tmp_path / f"{i}.tsv", certifier=one) for i, one in enumerate(sections)]
    assert compared(*paths[:2]).notes == ("certifier: mine (0); two-stage (1)",)
    with pytest.raises(InputError) as caught:
        compared(*paths)
    assert caught.value.message.splitlines()[1:] == ["  radius_tolerance of two-stage: 0.2 (1); 0.3 (2)"]


def test_what_a_protocol_tells_of_the_certifier_twice_is_compared_once(tmp_path):
    paths = [
        write(tmp_path / f"{n}.tsv", n=n, certifier={"name": "cohen", "n": n, "n0": n, "alpha": 0.1}) for n in (1000, 2000)
    ]
    assert compared(*paths, allow_different=True).notes == ("figures are not comparable: n: 1000 (1000); 2000 (2000)",)


# --- names ---


def test_names_come_from_the_folders_that_tell_runs_apart(tmp_path):
    paths = [write(tmp_path / method / "seed0" / "results.tsv") for method in ("gaussian", "cons")]
    assert [s.name for s in compared(*paths).summaries] == ["gaussian/seed0", "cons/seed0"]
    assert [s.name for s in compared(*[path.parent for path in paths], names=("A", "B")).summaries] == ["A", "B"]
    assert compared(paths[0].parent).summaries[0].name == "seed0"


@pytest.mark.parametrize(("count", "names"), [(2, ("A",)), (2, ("A", "A")), (1, ("A", "B"))])
def test_names_must_be_as_many_as_files_and_different(tmp_path, count, names):
    with pytest.raises(InputError, match=r"names for|two results are called"):
        compared(*[write(tmp_path / f"{i}.tsv") for i in range(count)], names=names)


def test_the_same_file_twice(pair):
    with pytest.raises(InputError, match="two results are called"):
        compared(pair[0], pair[0])


# --- formats ---


def test_json_parses_back_to_every_figure(pair):
    comparison = compared(*pair, radii=(0.5,))
    found = json.loads(render(comparison, "json"))
    assert found["schema"] == 1
    assert found["radii"] == [0.0, 0.5]
    assert found["results"][0]["acr"] == comparison.summaries[0].acr
    assert found["results"][1]["points"][1] == {
        "radius": 0.5,
        "count": 3,
        "accuracy": 0.6,
        "low": comparison.summaries[1].points[1].low,
        "high": comparison.summaries[1].points[1].high,
        "lower_bound": False,
    }
    assert found["differences"][0]["acr"]["low"] == comparison.differences[0].acr.low
    assert found["differences"][0]["tests"][1]["adjusted"] == comparison.differences[0].tests[1].adjusted


def test_csv_parses_back_to_every_figure(pair):
    comparison = compared(*pair, names=("a, b", 'c"d'))
    lines = list(csv.DictReader(io.StringIO(render(comparison, "csv"))))
    assert len(lines) == 2 * len(comparison.radii)
    for line, (summary, place) in zip(
        lines, itertools.product(comparison.summaries, range(len(comparison.radii))), strict=True
    ):
        point = summary.points[place]
        assert (line["name"], float(line["acr"]), int(line["n"])) == (summary.name, summary.acr, 1000)
        assert [float(line[key]) for key in ("radius", "accuracy", "low", "high")] == [
            point.radius,
            point.accuracy,
            point.low,
            point.high,
        ]
    assert lines[0]["p_value"] == lines[0]["baseline"] == ""
    assert float(lines[-1]["p_adjusted"]) == comparison.differences[0].tests[-1].adjusted
    assert lines[-1]["baseline"] == "a, b"


def test_csv_has_the_same_columns_whatever_is_compared(pair, tmp_path):
    headers = {render(compared(*paths), "csv").splitlines()[0] for paths in (pair, pair[:1], [foreign(tmp_path / "f.tsv")])}
    assert len(headers) == 1


def test_markdown_tables_are_rectangular_and_escaped(pair):
    text = render(compared(*pair, names=("a|b_c", "<b>")), "markdown")
    assert r"a\|b\_c" in text
    assert r"\<b\>" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


@pytest.mark.parametrize(
    ("text", "typeset"),
    [
        ("lenet_5 & 50%", r"lenet\_5 \& 50\%"),
        ("a\\b{c}", r"a\textbackslash{}b\{c\}"),
        ("~^#$", r"\textasciitilde{}\textasciicircum{}\#\$"),
        ("p <0.001 ±1 ≥ −2", r"p $<$0.001 $\pm$1 $\ge$ $-$2"),
    ],
    ids=["cells", "backslash-and-braces", "others", "signs"],
)
def test_latex_escapes(text, typeset):
    assert latex_text(text) == typeset


def test_latex_is_booktabs_with_as_many_cells_as_columns(pair):
    text = render(compared(*pair, names=("a_b & c", "d")), "latex")
    assert r"a\_b \& c" in text
    assert text.isascii()
    tabulars = re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(tabulars) == 3
    for columns, body in tabulars:
        assert [body.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
        for line in re.findall(r"(.*) \\\\", body):
            assert len(re.findall(r"(?<!\\)&", line)) + 1 == len(columns)


@pytest.mark.parametrize("width", [60, 100, 200])
def test_a_terminal_of_any_width_shows_every_figure(pair, width):
    comparison = compared(*pair)
    page = io.StringIO()
    print_tables(comparison, Console(file=page, width=width, color_system=None))
    for table in tables(comparison):
        for row in table.rows:
            assert all(cell.text in page.getvalue() and cell.detail in page.getvalue() for cell in row)


def test_names_are_not_markup(pair):
    assert "[red]a[/red]" in render(compared(pair[0], names=("[red]a[/red]",)), "table")


def test_accuracies_are_rounded_to_nearest_and_radii_are_cut(tmp_path):
    rows = [(0, 0, 0, 1.2369), (1, 0, 0, 1.0), (2, 0, 1, 0.2)]
    found = tables(compared(write(tmp_path / "a.tsv", rows)))
    assert found[0].rows[0][1].text == "0.7456"  # 2.2369 / 3 = .74563
    assert found[0].rows[0][2].text == "66.7"
    protocol = dict(zip(found[1].header, (cell.text for cell in found[1].rows[0]), strict=True))
    assert protocol["largest radius"] == "1.236"
    assert protocol["samples"] == "3,300"
    assert protocol["false certificates"] == "≤ 1"


@pytest.mark.parametrize(("radius", "text"), [(0.25, "0.25"), (1.0, "1.00"), (0.3333, "0.3333"), (0.125, "0.125")])
def test_radii_that_were_asked_for_are_shown_in_full(radius, text):
    assert radius_text(radius) == text


# --- plots ---


def test_the_curve_is_certified_accuracy_at_every_radius(tmp_path):
    rows = [(i, i % 3, 0, radius) for i, radius in enumerate([0.0, 0.4, 0.4, 1.9, 0.0, 0.7, 1.9, 1.2, 1.9, 1.9, 0.7])]
    comparison = compared(write(tmp_path / "a.tsv", rows))
    for run in comparison.runs:
        radii, counts = curve(run)
        for radius in np.linspace(0.001, 2, 777):
            place = np.searchsorted(radii, radius, side="left") - 1
            assert counts[place] == sum(run.correct & (run.radius >= radius))
        assert counts[-1] == 0


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG\r\n"), (".svg", b"<?xml"), (".PDF", b"%PDF-")])
def test_plots_are_what_their_suffix_says_and_the_same_each_time(pair, tmp_path, suffix, magic):
    comparison = compared(*pair, names=("$x_1", "b"))
    paths = [tmp_path / "plots" / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        save_plot(comparison, path)
    first, second = (path.read_bytes() for path in paths)
    assert first.startswith(magic)
    assert first == second
    assert sorted(path.name for path in paths[0].parent.iterdir()) == [path.name for path in paths]  # nothing left beside


def test_a_plot_has_a_curve_and_a_name_for_each_run(pair):
    comparison = compared(*pair, names=("one", "two"))
    figure = draw(comparison)
    (axes,) = figure.axes
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one  (ACR 0.4200)", "two  (ACR 0.4700)"]
    assert len(axes.lines) == 2
    assert axes.lines[0].get_ydata()[0] == 60
    assert axes.get_xlabel()
    assert axes.get_ylabel()


def test_another_suffix_is_refused(pair, tmp_path):
    with pytest.raises(InputError, match=r"must end in \.png, \.svg or \.pdf"):
        save_plot(compared(pair[0]), tmp_path / "a.jpg")
    assert not (tmp_path / "a.jpg").exists()


# --- the command ---


@pytest.fixture
def command():
    import typer

    from rscli.cli.compare import compare as body

    app = typer.Typer()
    app.command()(body)
    return lambda *words: CliRunner().invoke(app, list(map(str, words)))


def test_the_command_answers_on_stdout_and_warns_on_stderr(command, tmp_path):
    paths = foreign(tmp_path / "a.tsv"), foreign(tmp_path / "b.tsv", B)
    answer = command(*paths, "--json", "--radii", "0.5,1", "--names", "A,B")
    assert answer.exit_code == 0
    assert json.loads(answer.stdout)["radii"] == [0.0, 0.5, 1.0]
    assert "warning: n and alpha are unknown" in answer.stderr
    assert "Certified accuracy" in command(*paths).stdout


def test_the_command_writes_files(command, pair, tmp_path):
    answer = command(*pair, "--format", "latex", "--out", tmp_path / "t.tex", "--plot", tmp_path / "p.svg")
    assert (answer.exit_code, answer.stdout) == (0, "")
    assert "\\toprule" in (tmp_path / "t.tex").read_text()
    assert (tmp_path / "p.svg").exists()


def test_the_command_does_not_overwrite_a_result(command, pair):
    before = pair[0].read_bytes()
    answer = command(*pair, "--out", pair[1])
    assert isinstance(answer.exception, InputError)
    answer = command(pair[0], "--out", f"{pair[0]}.protocol.json")
    assert isinstance(answer.exception, InputError)
    assert pair[0].read_bytes() == before


def test_importing_the_command_loads_nothing_heavy():
    import subprocess

    code = "import sys, rscli.cli.compare; print([m for m in ('torch', 'scipy', 'matplotlib', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
