"""Rows held against their protocol: what a run wrote passes, and what no run can have written is refused with its line."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rscli.errors import InputError
from rscli.models.smoothed import Smoothed
from rscli.registry import installed
from rscli.results.check import check_rows
from rscli.results.protocol import protocol_path, read_protocol
from rscli.results.reader import read_results
from rscli.results.rows import HEADER, Row, format_row, parse_row
from rscli.results.writer import ResultWriter
from rscli.runtime.progress import Silent
from rscli.sampling.options import SamplingOptions
from rscli.sampling.requests import CertifierRequest
from rscli.smoothing.certify import CertifyOptions, certify
from rscli.smoothing.radii import decided_radii
from rscli.smoothing.task import CertificationTask, row_of

CERTIFIERS = {
    "cohen": {"name": "cohen", "n": 100, "n0": 20, "alpha": 0.01},
    "early": {"name": "cohen", "n": 400, "n0": 20, "alpha": 0.01, "early_abstain": True},
    "two-sided": {"name": "two-sided", "n": 100, "n0": 20, "alpha": 0.01},
    "two-stage": {"name": "two-stage", "n": 300, "n0": 50, "alpha": 0.01},
    "sequential": {"name": "sequential", "n": 400, "n0": 20, "alpha": 0.01},
    "labels": {"name": "cohen", "n": 100, "n0": 20, "alpha": 0.01},
    "sequential-labels": {"name": "sequential", "n": 400, "n0": 20, "alpha": 0.01},
}
IMAGES = 30


@pytest.fixture(scope="module", params=CERTIFIERS)
def run(request, model, tmp_path_factory) -> Path:
    """A finished run of one certifier."""
    out = tmp_path_factory.mktemp(request.param) / "r.tsv"
    chosen = CertifyOptions(
        model, out, out.parent, CERTIFIERS[request.param], skip=11, max=IMAGES, labels="labels" in request.param,
        sampling=SamplingOptions("cpu", 64),
    )  # fmt: skip
    certify(chosen, Silent())
    return out


def read(path: Path) -> None:
    read_results(path)


def resume(path: Path) -> None:
    protocol = read_protocol(path)
    assert protocol is not None
    ResultWriter.resume(path, protocol).close()


def impossible(row: Row, protocol: dict) -> list[Row]:
    """Rows that differ from `row` in one cell, as no run under the protocol can have written them.

    With a grid of radii, an earlier look, which no row tells, may have reached a radius that the last counts no longer show.
    """
    n, count, runner_up = row.n or 0, row.count or 0, row.runner_up or 0
    certified, grid = row.predict != -1, protocol["radii"] is not None
    found = [
        replace(row, idx=10**6),
        replace(row, label=10, correct=False),
        replace(row, label=-1, correct=row.predict == -1),
        replace(row, n=protocol["n"] + 1),
        replace(row, n=n + 1),
        replace(row, n=count + runner_up - 1),
        replace(row, n0=(row.n0 or 0) + 1),
        replace(row, count=n + 1),
        replace(row, count=n - runner_up + 1),
        replace(row, runner_up=n - count + 1),
        replace(row, reason="because"),
        replace(row, reason=None),
        replace(row, saturated=not row.saturated),
        replace(row, n=None),
        replace(row, count=None),
        replace(row, runner_up=None),
        replace(row, n0=None),
        replace(row, saturated=None),
    ]
    if not certified and not grid:
        found.append(replace(row, predict=row.label, correct=True))
    if certified:
        found += [
            replace(row, predict=10, correct=False),
            replace(row, radius=row.radius + 0.01),
            replace(row, radius=row.radius * 1.0001 + 1e-6),
            replace(row, predict=-1, radius=0.0, correct=row.label == -1),
        ]
        found += [replace(row, radius=0.0)] if row.radius > 0 and not grid else []
    if runner_up and n - count > runner_up:
        found.append(replace(row, runner_up=(n - count) // 9 - 1 if (n - count) // 9 > 1 else 0))
    return found


def test_what_a_run_wrote_passes_and_what_it_cannot_have_written_is_refused(run, tmp_path):
    protocol = read_protocol(run)
    rows = [parse_row(line) for line in run.read_text().splitlines()[1:]]
    assert read_results(run).notes == ()
    assert len(rows) == IMAGES
    path = tmp_path / "r.tsv"
    protocol_path(path).write_bytes(protocol_path(run).read_bytes())
    path.write_bytes(run.read_bytes())
    resume(path)
    refused, source = 0, random.Random(0)
    for place in sorted(source.sample(range(len(rows)), 14)):
        for wrong in impossible(rows[place], protocol):
            path.write_text(
                HEADER + "".join(map(format_row, [*rows[:place], wrong, *rows[place + 1 :], replace(rows[0], idx=1)]))
            )
            before = path.read_bytes()
            for use in (read, resume):
                with pytest.raises(InputError) as caught:
                    use(path)
                assert f"r.tsv, line {place + 2}: " in caught.value.message, (wrong, rows[place], caught.value.message)
            assert path.read_bytes() == before
            refused += 1
    print(f"{refused} impossible rows refused by resume and by read_results")
    assert refused >= 14 * 18


@pytest.mark.parametrize("name", CERTIFIERS)
@pytest.mark.parametrize(("n", "classes"), [(100, 10), (2000, 3), (10_000, 2), (100_000, 1000)])
def test_whatever_the_counts_are_a_row_of_the_engine_passes(name, n, classes):
    """Rows as the engine makes them of simulated counts: of images from hopeless to certain, and near every boundary."""
    section = {**CERTIFIERS[name], "n": n}
    certifier = installed().build("certifiers", section)
    noise = installed().build("noises", {"name": "gaussian", "sigma": 0.5})
    radii = decided_radii(certifier, noise, ())
    for known in (True, False):
        protocol = {
            "format": 2, "noise": {"name": "gaussian", "sigma": 0.5}, "n": n, "radii": list(radii) or None,
            "certifier": {**json.loads(certifier.model_dump_json()), "name": section["name"], "package": "rscli"},
            "labels": "labels" in name, "info": {"classes": classes} if known else {},
        }  # fmt: skip
        source = np.random.default_rng(n + classes)
        model = Smoothed(torch.nn.Identity(), noise, tuple(map(str, range(classes))))
        labels: dict[int, int] = {}
        images = CertificationTask(
            model, certifier, lambda index: None, radii, labels.__getitem__ if "labels" in name else None
        )
        rows = []
        for idx in range(60):
            share = source.choice([source.uniform(), source.uniform(0.4, 0.6), source.uniform(0.97, 1), 1.0, 0.0])
            rest = source.dirichlet(np.full(classes - 1, 0.3))
            probabilities = np.concatenate([[share], (1 - share) * rest])
            probabilities /= probabilities.sum()
            label = int(source.integers(0, classes)) if source.uniform() < 0.3 else 0
            labels[idx] = label
            request = CertifierRequest(certifier, images.question(idx), idx, lambda: None)
            counts, drawn = np.zeros(classes, np.int64), 0
            while True:
                wanted = request.wanted - request.n0 if request.plan else request.n0
                counts = counts + source.multinomial(wanted - drawn, probabilities)
                drawn = wanted
                if request.receive(counts.copy()):
                    break
                if request.fresh:
                    counts, drawn = np.zeros(classes, np.int64), 0
            rows.append(row_of(images.certificate(request), label, 1.0))
        check_rows(Path("r.tsv"), rows, range(2, 62), protocol)


def test_the_message_says_what_the_row_says_and_what_it_must_be():
    protocol = {
        "format": 2, "noise": {"name": "gaussian", "sigma": 0.5}, "n": 1000,
        "certifier": {"name": "cohen", "package": "rscli", "n": 1000, "n0": 100, "alpha": 0.001}, "info": {"classes": 10},
    }  # fmt: skip
    bound = installed().build("certifiers", {"name": "cohen", "n": 1000}).decide
    assert bound is not None
    right = Row(0, 3, 3, 0.0, True, 1.0, 100, 1000, 480, 470, "below-half", False)
    with pytest.raises(InputError) as caught:
        check_rows(Path("r.tsv"), [right], [2], protocol)
    said = "r.tsv, line 2: predict is a class, but 480 of 1000 samples (runner-up 470) give an abstention under this protocol"
    assert caught.value.message == said
    right = replace(right, predict=-1, correct=False)
    check_rows(Path("r.tsv"), [right], [2], protocol)
    for wrong, text in (
        (replace(right, reason="n-reached"), "reason is 'n-reached', but"),
        (replace(right, n0=0), "n0 is 0, but under this protocol 100 samples select the class"),
        (replace(right, n=500, count=240, runner_up=230), "n is 500, but the certifier cohen does not look at so many samples"),
        (replace(right, runner_up=1), "runner_up is 1, but of 10 classes one other has at least 58 samples"),
        (replace(right, label=10), "label is 10, but the model has the classes 0 to 9"),
    ):
        with pytest.raises(InputError) as caught:
            check_rows(Path("r.tsv"), [wrong], [7], protocol)
        assert text in caught.value.message
        assert "line 7" in caught.value.message


@pytest.mark.parametrize(
    ("certifier", "why"),
    [
        ({"name": "cohen", "package": "elsewhere"}, "no installed package provides"),
        ({"name": "cohen", "package": "rscli", "unheard-of": 3}, "the fields do not fit"),
    ],
    ids=["not-installed", "other-fields"],
)
def test_without_the_certifier_arithmetic_is_left_and_a_note_says_so(tmp_path, certifier, why):
    protocol = {
        "format": 1,
        "noise": {"name": "gaussian", "sigma": 0.5},
        "n": 1000,
        "certifier": certifier,
        "info": {"classes": 5},
    }
    row = Row(0, 3, 3, 0.7, True, 1.0, 100, 1000, 900, 50, "x", False)
    with ResultWriter.create(path := tmp_path / "r.tsv", protocol) as writer:
        writer.append(row)
    assert why in read_results(path).notes[0]
    for wrong in (replace(row, n=1001), replace(row, count=951), replace(row, label=5, correct=False), replace(row, n=None)):
        path.write_text(HEADER + format_row(wrong))
        with pytest.raises(InputError, match="line 2"):
            read(path)


@pytest.mark.parametrize("change", ["alpha", "n", "seed", "sigma", "info", "sha256", "none"])
def test_an_edited_protocol_is_refused_and_one_in_another_layout_is_not(run, tmp_path, change):
    path = tmp_path / "r.tsv"
    path.write_bytes(run.read_bytes())
    protocol = json.loads(protocol_path(run).read_text())
    if change == "none":
        protocol_path(path).write_text("\ufeff" + json.dumps(protocol, sort_keys=True).replace(", ", ",\r\n"), newline="")
        read(path)
        resume(path)
        return
    if change == "sha256":
        del protocol["sha256"]
    elif change == "info":
        protocol["info"]["train_seed"] = 77
    else:
        protocol[change] = (
            math.nextafter(protocol[change], 0.3) if isinstance(protocol[change], float) else protocol[change] + 1
        )
    protocol_path(path).write_text(json.dumps(protocol))
    for use in (read, lambda path: ResultWriter.resume(path, protocol)):
        with pytest.raises(InputError, match="was changed after it was written"):
            use(path)
