"""Certification: rows against a plain recount, which images are taken, and that nothing but the protocol changes a row."""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import beta, norm

from rscli.api import ABSTAIN
from rscli.data.splits import Split, open_split
from rscli.errors import ConfigError, InputError, Stopped
from rscli.models.modelfile import load_model
from rscli.models.smoothed import Smoothed
from rscli.registry import installed
from rscli.results.protocol import protocol_path
from rscli.results.rows import Row, parse_row
from rscli.results.writer import ResultWriter
from rscli.runtime.progress import Silent
from rscli.runtime.seeds import block_generator
from rscli.sampling.blocks import BLOCK
from rscli.sampling.options import SamplingOptions
from rscli.smoothing.certify import CertifyOptions, certify
from rscli.smoothing.summary import Score, Tally
from runs import COLUMNS, SIGMA, Listening, rows, trained

N0, N, ALPHA = 20, 100, 0.01
TAKEN = {"skip": 5, "max": 20}


def options(model: Path, out: Path, *, sampling: SamplingOptions | None = None, **changes) -> CertifyOptions:
    statistics = {"name": "cohen", "n": N, "n0": N0, "alpha": ALPHA}
    statistics |= {key: changes.pop(key) for key in ("n", "n0", "alpha") if key in changes}
    sampling = sampling or SamplingOptions(device="cpu")
    return CertifyOptions(model=model, out=out, data_dir=out.parent, certifier=statistics, sampling=sampling, **changes)


def indices(path: Path) -> list[int]:
    return [int(row[0]) for row in rows(path)]


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fifth of the first hundred images, uninterrupted."""
    out = tmp_path_factory.mktemp("whole") / "results.tsv"
    certify(options(model, out, **TAKEN), Silent())
    return out


class Interrupting(Silent):
    """Sends the process a signal when the work begins."""

    def __init__(self, number: int) -> None:
        self.number = number

    def start(self, task: str, total: int, done: int, unit: str) -> None:
        os.kill(os.getpid(), self.number)


def interrupt_after(rows: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends the process a signal when so many rows are written."""
    append = ResultWriter.append

    def counting(writer: ResultWriter, row: Row) -> None:
        append(writer, row)
        if len(writer.done) == rows:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(ResultWriter, "append", counting)


# --- what a row says ---


@cache
def opened(model: Path) -> tuple[Smoothed, Split]:
    loaded = load_model(model)
    return loaded, open_split(installed().build("datasets", loaded.source.card.data), loaded.source.card.spec, "test", Path())


def recount(model: Path, index: int, seed: int = 0) -> dict[str, float]:
    """CERTIFY in the plainest way: all noise of one image at once, numpy's counts, scipy's quantiles."""
    loaded, split = opened(model)
    blocks = range(-(-(N0 + N) // BLOCK))
    image = split.image(index)
    noise = [
        torch.randn((BLOCK, *image.shape), generator=block_generator(torch.device("cpu"), seed, index, block))
        for block in blocks
    ]
    with torch.inference_mode():
        votes = loaded.network(image + SIGMA * torch.cat(noise)[: N0 + N]).argmax(-1).numpy()
    top = int(np.bincount(votes[:N0], minlength=10).argmax())
    counts = np.bincount(votes[N0:], minlength=10)
    bound = float(beta.ppf(ALPHA, counts[top], N - counts[top] + 1)) if counts[top] else 0.0
    sure = bound >= 0.5
    others = np.delete(counts, top)
    return {
        "idx": index,
        "label": int(split.labels[index]),
        "predict": top if sure else ABSTAIN,
        "radius": float(SIGMA * norm.ppf(bound)) if sure else 0.0,
        "correct": sure and top == split.labels[index],
        "n0": N0,
        "n": N,
        "count": int(counts[top]),
        "runner_up": int(others.max()),
        "saturated": counts[top] == N,
    }


def test_rows_are_those_of_a_plain_recount(model, whole):
    seen = {row.idx: row for row in (parse_row(line) for line in whole.read_text().splitlines()[1:])}
    kinds = {"certified": 0, "abstained": 0, "saturated": 0}
    for index in seen:
        wanted = recount(model, index)
        row = seen[index]
        assert row.radius == pytest.approx(wanted.pop("radius"), rel=1e-9, abs=1e-12)
        assert {key: getattr(row, key) for key in wanted} == wanted
        kinds["abstained"] += row.predict == ABSTAIN
        kinds["certified"] += row.predict != ABSTAIN and not row.saturated
        kinds["saturated"] += bool(row.saturated)
    assert all(kinds.values()), f"the images no longer show every kind of row: {kinds}"


def test_a_row_of_another_seed_is_the_recount_of_that_seed(model, tmp_path):
    out = tmp_path / "r.tsv"
    certify(options(model, out, start=81, max=1, sampling=SamplingOptions(device="cpu", seed=7)), Silent())
    (row,) = [parse_row(line) for line in out.read_text().splitlines()[1:]]
    assert (row.count, row.runner_up) == (recount(model, 81, 7)["count"], recount(model, 81, 7)["runner_up"])
    assert any(recount(model, index, 7) != recount(model, index, 0) for index in range(81, 86))  # one may agree by chance


def test_an_abstention_has_radius_zero_and_is_not_correct(whole):
    abstentions = [line.split("\t") for line in whole.read_text().splitlines()[1:] if line.split("\t")[2] == "-1"]
    assert abstentions
    assert all(float(cells[3]) == 0 and cells[4] == "0" and cells[10] == "below-half" for cells in abstentions)


def test_the_tally_is_that_of_the_rows(model, whole, tmp_path):
    out = tmp_path / "r.tsv"
    tally = certify(options(model, out, **TAKEN), Silent())
    read = [parse_row(line) for line in out.read_text().splitlines()[1:]]
    assert tally.images == len(read) == 20
    assert tally.abstained == sum(row.predict == ABSTAIN for row in read)
    assert tally.certified_accuracy == pytest.approx(sum(row.correct for row in read) / 20)
    assert tally.acr == pytest.approx(sum(row.radius * row.correct for row in read) / 20)
    assert tally.samples == 20 * (N0 + N)
    assert rows(out) == rows(whole)


def five_rows() -> list[Row]:
    """Three that are right, with radii 0.5, 0.5 and 1, a wrong one and an abstention."""
    answers = [(0, 0.5), (0, 0.5), (0, 1.0), (1, 0.5), (ABSTAIN, 0.0)]
    return [Row(idx, 0, predict, radius, predict == 0, 1.0) for idx, (predict, radius) in enumerate(answers)]


@pytest.mark.parametrize(
    ("radii", "at_radius", "lower_bound"),
    [([], 0.0, False), ([0.0, 0.5, 1.0], 0.0, True), ([1.0, 0.5], 0.5, True)],
    ids=["as-large-as-possible", "with-0", "without-0"],
)
def test_a_tally_says_what_its_figures_are_where_given_radii_were_decided(tmp_path, radii, at_radius, lower_bound):
    out = tmp_path / "r.tsv"
    tally = Score(five_rows()).tally(out, radii, 1234, 2.0)
    assert tally == Tally(out, 5, 1, pytest.approx(0.6), at_radius, pytest.approx(0.4), lower_bound, 1234, 2.0)


def test_the_tally_of_a_sequential_run_is_at_the_radius_that_was_asked_for(model, tmp_path):
    out = tmp_path / "r.tsv"
    sequential = {"name": "sequential", "n": N, "n0": N0, "alpha": ALPHA}
    asked = replace(options(model, out, **TAKEN, labels=True, radii=(0.25,)), certifier=sequential)
    tally = certify(asked, Silent())
    read = [parse_row(line) for line in out.read_text().splitlines()[1:]]
    certified = sum(row.radius == 0.25 for row in read)
    assert 0 < certified < 20
    assert (tally.at_radius, tally.lower_bound) == (0.25, True)
    assert tally.certified_accuracy == pytest.approx(certified / 20)
    assert tally.acr == pytest.approx(0.25 * certified / 20)


@pytest.mark.parametrize(
    ("at_radius", "lower_bound", "said"),
    [
        (0.0, False, "certified accuracy 66.67%, ACR 0.6667; "),
        (0.0, True, "certified accuracy 66.67%, ACR ≥ 0.6666; "),
        (0.125, True, "certified accuracy 66.67% (both at radius 0.125), ACR ≥ 0.6666; "),
    ],
    ids=["as-large-as-possible", "with-0", "without-0"],
)
def test_the_command_says_which_figures_are_bounds(monkeypatch, at_radius, lower_bound, said):
    import typer
    from typer.testing import CliRunner

    from rscli.cli.certify import certify as body

    tally = Tally(Path("r.tsv"), 3, 1, 2 / 3, at_radius, 2 / 3, lower_bound, 1234, 2.0)
    monkeypatch.setattr("rscli.smoothing.certify.certify", lambda options, progress, *rest: tally)
    app = typer.Typer()
    app.command()(body)
    answer = CliRunner().invoke(app, ["m.safetensors", "--json"])
    assert answer.stderr == f"r.tsv: 3 images, 1 abstained, {said}1,234 samples in 2.0 s\n"
    found = json.loads(answer.stdout)
    assert (found["acr"], found["lower_bound"], found["at_radius"]) == (2 / 3, lower_bound, at_radius)


# --- which images ---


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        ({"skip": 20, "max": 5}, [0, 20, 40, 60, 80]),
        ({"start": 3, "skip": 100}, [3, 103, 203, 303]),
        ({"start": 357}, [357, 358, 359]),
        ({"start": 358, "max": 50}, [358, 359]),
    ],
    ids=["skip-max", "start-skip", "start", "max-beyond-the-end"],
)
def test_start_skip_and_max_take_the_images_that_they_document(model, tmp_path, chosen, wanted):
    out = tmp_path / "r.tsv"
    assert certify(options(model, out, n=20, n0=5, **chosen), Silent()).images == len(wanted)
    assert indices(out) == wanted


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"start": 360}, r"--start is 360, but the split 'test' has only 360 images"),
        ({"start": -1}, r"--start is -1, but must be at least 0"),
        ({"skip": 0}, r"--skip is 0, but must be at least 1"),
        ({"max": 0}, r"--max is 0, but must be at least 1"),
        ({"split": "val"}, r"val"),
    ],
    ids=["start-behind-the-end", "start", "skip", "max", "split"],
)
def test_a_selection_of_nothing_is_refused_and_nothing_is_written(model, tmp_path, chosen, said):
    with pytest.raises(InputError, match=said):
        certify(options(model, tmp_path / "r.tsv", **chosen), Silent())
    assert list(tmp_path.iterdir()) == []


# --- what changes nothing ---


def test_a_row_does_not_depend_on_the_other_images(model, whole, tmp_path):
    known = {row[0]: row for row in rows(whole)}
    for name, chosen in {"one": {"start": 45, "max": 1}, "others": {"start": 0, "skip": 15, "max": 5}}.items():
        certify(options(model, tmp_path / f"{name}.tsv", **chosen), Silent())
        for row in rows(tmp_path / f"{name}.tsv"):
            assert row == known[row[0]]


def test_batch_and_layout_change_counts_by_ties_at_most(model, whole, tmp_path):
    """The noise is the same; only the last bits of the network's sums differ, which a near tie can feel."""
    count = COLUMNS.index("count")

    def moved(sampling: SamplingOptions) -> int:
        out = tmp_path / f"{sampling.batch}-{sampling.channels_last}-{sampling.seed}.tsv"
        certify(options(model, out, **TAKEN, sampling=sampling), Silent())
        assert indices(out) == indices(whole)
        return sum(abs(int(a[count]) - int(b[count])) for a, b in zip(rows(out), rows(whole), strict=True))

    for batch, channels_last in ((1000, True), (37, True), (256, False)):
        assert moved(SamplingOptions(device="cpu", batch=batch, channels_last=channels_last)) <= 2
    assert moved(SamplingOptions(device="cpu", seed=1)) > 20, "so few ties would be seen with other noise, too"


# --- stopping and going on ---


@pytest.mark.parametrize(
    ("after", "number", "code"),
    [(0, signal.SIGTERM, 75), (1, signal.SIGINT, 130), (11, signal.SIGTERM, 75)],
    ids=["before-the-first-row", "ctrl-c-after-one", "in-the-middle"],
)
def test_a_stopped_run_resumes_to_the_same_rows(model, whole, tmp_path, monkeypatch, after, number, code):
    out, small = tmp_path / "r.tsv", SamplingOptions(device="cpu", batch=64)  # several batches, so that some are never drawn
    interrupt_after(after, number, monkeypatch)
    with pytest.raises(Stopped) as stopped:
        certify(options(model, out, **TAKEN, sampling=small), Interrupting(number) if after == 0 else Silent())
    monkeypatch.undo()
    assert stopped.value.exit_code == code
    assert "--resume" in str(stopped.value)
    before = rows(out)
    assert after <= len(before) < 20
    torch.manual_seed(99)  # whatever the process did in between
    listening = Listening()
    certify(options(model, out, **TAKEN, resume=True), listening)
    assert listening.began == [(20, len(before))]
    assert rows(out) == rows(whole)
    assert set(before) <= set(rows(out))


def test_a_file_that_a_crash_left_at_any_byte_resumes_to_the_same_rows(model, whole, tmp_path):
    source = random.Random(1)
    text = whole.read_bytes()
    lines = text.decode().splitlines(keepends=True)
    shuffled = lines[:1] + source.sample(lines[1:], len(lines) - 1)  # rows come in the order in which images end
    for cut in (0, 10, *(source.randrange(len(text)) for _ in range(2))):
        out = tmp_path / f"{cut}.tsv"
        out.write_bytes("".join(shuffled).encode()[:cut])
        protocol_path(out).write_bytes(protocol_path(whole).read_bytes())
        certify(options(model, out, **TAKEN, resume=True), Silent())
        assert rows(out) == rows(whole), f"cut at byte {cut}"


def test_resume_without_a_file_begins_one(model, whole, tmp_path):
    certify(options(model, tmp_path / "r.tsv", **TAKEN, resume=True), Silent())
    assert rows(tmp_path / "r.tsv") == rows(whole)


def test_a_larger_max_extends_a_run_and_keeps_its_rows(model, whole, tmp_path):
    out = tmp_path / "r.tsv"
    certify(options(model, out, skip=10, max=6), Silent())
    first = rows(out)
    tally = certify(options(model, out, **TAKEN, resume=True), Silent())
    assert rows(out) == rows(whole)
    assert set(first) <= set(rows(out))
    assert tally.images == 20
    assert tally.samples == 14 * (N0 + N)


def test_a_finished_file_is_in_index_order(model, tmp_path):
    out = tmp_path / "r.tsv"
    certify(options(model, out, start=40, skip=5, max=4), Silent())
    certify(options(model, out, start=0, skip=3, max=9, resume=True), Silent())
    assert indices(out) == sorted({*range(40, 60, 5), *range(0, 27, 3)})


def test_a_finished_run_resumes_to_nothing(model, whole, tmp_path):
    before = whole.read_bytes()
    tally = certify(options(model, whole, **TAKEN, resume=True), Silent())
    assert tally.samples == 0
    assert tally.images == 20
    assert whole.read_bytes() == before


# --- what is refused ---


def test_results_are_not_overwritten(model, whole):
    before = whole.read_bytes()
    with pytest.raises(InputError, match="already exists") as error:
        certify(options(model, whole), Silent())
    assert "--resume" in str(error.value)
    assert whole.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n": N + 1}, f"n was {N}, is now {N + 1}"),
        ({"n0": N0 + 1}, f"n0 was {N0}, is now {N0 + 1}"),
        ({"alpha": 0.002}, f"alpha was {ALPHA}, is now 0.002"),
        ({"split": "train"}, 'split was "test", is now "train"'),
        ({"labels": True}, "labels was false, is now true"),
        ({"sampling": SamplingOptions(device="cpu", seed=5)}, "seed was 0, is now 5"),
        ({"sampling": SamplingOptions(device="cpu", precision="bf16")}, 'precision was "fp32", is now "bf16"'),
    ],
    ids=["n", "n0", "alpha", "split", "labels", "seed", "precision"],
)
def test_rows_of_another_protocol_are_refused_by_name(model, whole, changes, named):
    before = whole.read_bytes()
    with pytest.raises(InputError, match="another protocol") as error:
        certify(options(model, whole, resume=True, **changes), Silent())
    assert named in error.value.message
    assert whole.read_bytes() == before


def test_rows_of_another_model_are_refused(whole, tmp_path):
    other = trained(tmp_path / "other", "seed=1")
    with pytest.raises(InputError, match=r"model_sha256 was .*, is now "):
        certify(options(other, whole, resume=True), Silent())


def test_another_batch_size_is_no_other_protocol_but_is_said(model, tmp_path):
    out, listening = tmp_path / "r.tsv", Listening()
    certify(options(model, out, max=2), Silent())
    certify(options(model, out, max=3, resume=True, sampling=SamplingOptions(device="cpu", batch=99)), listening)
    assert any("batch was 256, is now 99" in warning for warning in listening.warnings)
    assert indices(out) == [0, 1, 2]


def test_the_protocol_records_what_the_rows_rest_on(model, whole):
    import hashlib

    protocol = json.loads(protocol_path(whole).read_text())
    known = {"format": 2, "dataset": "digits", "split": "test", "sigma": SIGMA, "n0": N0, "n": N, "alpha": ALPHA, "seed": 0}
    assert {key: protocol[key] for key in known} == known
    assert protocol["model_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert protocol["certifier"]["name"] == "cohen"
    assert protocol["certifier"]["package"] == "rscli"
    assert (protocol["precision"], protocol["noise_device"], protocol["block"]) == ("fp32", "cpu", BLOCK)
    assert {"torch", "numpy", "scipy"} <= set(protocol["info"]["versions"])


def test_data_with_other_classes_are_refused_before_anything_is_written(model, tmp_path):
    from PIL import Image

    for name in ("cat", "dog"):
        folder = tmp_path / "pets" / "test" / name
        folder.mkdir(parents=True)
        Image.new("L", (28, 28)).save(folder / "a.png")
    data = {"name": "imagefolder", "path": "pets", "size": 28}
    with pytest.raises(InputError, match=r"classes cat, dog, but the model was trained on 10 \(0, 1, 2, \.\.\.\)"):
        certify(options(model, tmp_path / "r.tsv", data=data), Silent())
    assert not (tmp_path / "r.tsv").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"alpha": 0.0}, "alpha = 0.0"), ({"alpha": 1.5}, "alpha = 1.5"), ({"n": 0}, "n = 0")],
    ids=["alpha-0", "alpha-above-1", "no-samples"],
)
def test_statistics_that_mean_nothing_are_refused(model, tmp_path, changes, said):
    with pytest.raises(ConfigError) as error:
        certify(options(model, tmp_path / "r.tsv", **changes), Silent())
    assert said in error.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_field_that_the_certifier_lacks_is_named(model, tmp_path):
    wrong = replace(options(model, tmp_path / "r.tsv"), certifier={"name": "cohen", "n": 20, "looks": 3})
    with pytest.raises(ConfigError, match="looks = 3"):
        certify(wrong, Silent())


@pytest.mark.parametrize(
    ("certifier", "said"),
    [
        ({"alpha": 2.0}, "certifier.alpha = 2.0 (as given): must be less than 1"),
        ({"alpha": float("nan")}, "certifier.alpha = NaN (as given): must be a finite number"),
        ({"n": "many"}, 'certifier.n = "many" (as given): must be a valid integer, unable to parse string as an integer'),
        (
            {"early_abstian": True},
            "certifier.early_abstian = true (as given): unknown key. Did you mean 'certifier.early_abstain'?",
        ),
        ({"nmae": "x"}, "certifier.nmae = \"x\" (as given): unknown key. Did you mean 'certifier.name'?"),
        ({"name": "cohan"}, 'certifier.name = "cohan" (as given): no installed package provides the certifiers plugin'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_certifier_is_said_in_the_words_of_a_configuration(certifier, said):
    from rscli.smoothing.certify import build_certifier

    with pytest.raises(ConfigError, match="has 1 problem") as error:
        build_certifier({"name": "cohen", "n": 100, **certifier})
    assert said in error.value.message
    assert "Input should" not in error.value.message


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"size": 3}, "data.size = 3 (--set): unknown key. The keys here are data.name"),
        ({"name": "imagefolder", "size": -1}, "data.size = -1 (--set): must be greater than or equal to 1"),
        ({"name": "digit"}, "data.name = \"digit\" (--set): no installed package provides the datasets plugin 'digit'"),
        ({"name": 3}, "data.name = 3 (--set): must name a plugin"),
    ],
    ids=["unknown", "out-of-bounds", "no-plugin", "no-name"],
)
def test_wrong_data_are_said_in_the_words_of_a_configuration(model, tmp_path, data, said):
    with pytest.raises(ConfigError, match="has 1 problem") as error:
        certify(options(model, tmp_path / "r.tsv", data=data), Silent())
    assert said in error.value.message
    assert list(tmp_path.iterdir()) == []


def test_too_few_samples_to_certify_anything_are_refused():
    from rscli.smoothing.certify import build_certifier

    with pytest.raises(InputError, match="n is 9") as error:
        build_certifier({"name": "cohen", "n": 9, "alpha": 0.001})
    assert "n = 10" in str(error.value)
    assert build_certifier({"name": "cohen", "n": 10, "alpha": 0.001}).n == 10
