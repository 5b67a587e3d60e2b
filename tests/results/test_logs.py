"""Logs as people have them: the field's own, those of other tools, and files that went through an editor or a spreadsheet."""

from __future__ import annotations

import json
import math
import random
from fractions import Fraction
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rscli.cli.app import app
from rscli.errors import InputError
from rscli.report.summary import compare
from rscli.results.protocol import protocol_path
from rscli.results.reader import read_results
from rscli.results.rows import HEADER, Row, format_row
from rscli.results.writer import ResultWriter

COHEN = "idx\tlabel\tpredict\tradius\tcorrect\ttime"
RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)


def cohen_log(path: Path, seed: int) -> tuple[Fraction, list[int], int]:
    """A log as in locuslab/smoothing: radii with three digits, time in seconds. Returns what is known of it, exactly:
    the ACR, the number of right answers certified at each of RADII, and the abstentions."""
    source, scale = random.Random(seed), (0.12, 0.25, 0.5, 1.0)[seed % 4]
    total, counts, abstained, lines = Fraction(0), [0] * len(RADII), 0, [COHEN]
    images = 100 + 40 * seed
    for idx in range(0, images * 20, 20):
        label, lot = source.randrange(10), source.random()
        predict = -1 if lot < 0.1 else label if lot < 0.8 else (label + 1) % 10
        radius = "0.0" if predict == -1 else f"{source.uniform(0, 3.7 * scale):.3}"
        right = predict == label
        lines.append(f"{idx}\t{label}\t{predict}\t{radius}\t{int(right)}\t{source.uniform(1, 200):.3}")
        abstained += predict == -1
        if right:
            total += Fraction(radius)
            counts = [count + (Fraction(radius) >= Fraction(at)) for count, at in zip(counts, RADII, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return total / images, counts, abstained


@pytest.mark.parametrize("seed", range(10))
def test_the_figures_of_a_log_of_cohen_et_al(tmp_path, seed):
    path = tmp_path / f"sigma_{seed}"
    acr, counts, abstained = cohen_log(path, seed)
    (summary,) = compare([read_results(path)], radii=RADII).summaries
    assert summary.images == 100 + 40 * seed
    assert summary.acr == pytest.approx(float(acr), rel=1e-12)
    assert [point.count for point in summary.points] == counts
    assert summary.abstained == abstained
    shown = CliRunner().invoke(app, ["compare", str(path), "--format", "json", "--radii", ",".join(map(str, RADII))])
    assert shown.exit_code == 0, shown.output


ROWS = ["0\t3\t3\t0.42\t1\t15.4", "20\t8\t-1\t0.0\t0\t7.25"]
PLAIN = "\n".join([COHEN, *ROWS]) + "\n"


def drop(text: str, column: int) -> str:
    return "\n".join("\t".join(c for k, c in enumerate(line.split("\t")) if k != column) for line in text.split("\n"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (PLAIN, None),
        (PLAIN.replace("15.4", "0:00:15.4").replace("7.25", "1 day, 2:03:04"), None),
        (PLAIN.replace("15.4", "15").replace("7.25", ""), None),
        (PLAIN.replace("15.4", "1.5e+01"), None),
        (drop(PLAIN, 5), "no column time"),
        (PLAIN.replace("\t1\t15", "\tTrue\t15").replace("\t0\t7", "\tFalse\t7"), "True and False for 1 and 0 (lines: 2)"),
        (PLAIN.replace("0.0\t0", "-1.0\t0"), "a radius of -1 for an abstention (lines: 1)"),
        (PLAIN.replace("0.0\t0", "-1\t0").replace("\t-1\t", "\t2\t", 1), "a radius of -1 for an abstention (lines: 1)"),
        (PLAIN.replace("\n", "\r\n"), "Windows line endings (CRLF)"),
        (PLAIN.replace("\n", "\r"), "CR line endings"),
        ("\ufeff" + PLAIN, "byte order mark"),
        (PLAIN.encode("utf-16"), "UTF-16"),
        ("\ufeff" + PLAIN.replace("\n", "\r\n"), "byte order mark and has Windows line endings"),
        ("\n".join("\t".join(f'"{c}"' for c in line.split("\t")) for line in PLAIN.strip().split("\n")), "quotation marks"),
        (PLAIN.replace(".", ","), "decimal commas (lines: 2)"),
        (PLAIN.replace(".", ",").replace("\t", ";"), "columns separated by semicolons; decimal commas"),
        (PLAIN.replace("\t", ","), "columns separated by commas"),
        (PLAIN.replace("\t", "  "), "columns separated by spaces"),
        (PLAIN.replace("\n", "\t\t \n") + "\t\t\n\n", None),
        (PLAIN.replace("0\t3\t3\t", "0.0\t3.0\t3.0\t"), "whole numbers with a decimal point (lines: 1)"),
        (PLAIN.replace("\t3\t3\t", "\ttensor(3)\ttensor(3, device='cuda:0')\t"), "tensor(...) around numbers (lines: 1)"),
        (PLAIN.replace(COHEN, COHEN.title()), "a header in capital letters"),
        ("# sigma 0.25\n" + PLAIN, None),
        (PLAIN.replace(ROWS[1], f"# again\n{COHEN}\n{ROWS[1]}"), "headers between the rows"),
    ],
    ids=range(24),
)
def test_what_is_unambiguous_is_read_and_said(tmp_path, content, said):
    path = tmp_path / "log"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = read_results(path)
    assert (found.idx.tolist(), found.label.tolist(), found.predict.tolist()) == ([0, 20], [3, 8], [3, -1])
    assert (found.radius.tolist(), found.correct.tolist()) == ([0.42, 0.0], [True, False])
    if said is None:
        assert found.notes == ()
    else:
        assert said in " ".join(found.notes)
        assert str(path) in found.notes[0]
    seconds = compare([found]).summaries[0].seconds
    assert seconds is None or math.isfinite(seconds)
    for form in ("table", "json", "csv", "markdown", "latex"):
        shown = CliRunner().invoke(app, ["compare", str(path), "--format", form])
        assert shown.exit_code == 0, shown.output
        assert "NaN" not in shown.stdout


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (drop(PLAIN, 3), "log", "is a log of predictions (predict.py"),
        (drop(PLAIN, 3).replace("\t", ","), "log", "is a log of predictions (predict.py"),
        ("0.0 0.83\n0.25 0.61\n", "test_acc", "is a table of accuracies (an _acc file)"),
        ("radius\tacc\n0.0\t0.83\n", "table.tsv", "is a table of accuracies (an _acc file)"),
        ("epoch\tlr\ttrain loss\ttrain acc\n0\t0.1\t2.3\t0.1\n", "log.txt", "is a training log"),
        (PLAIN.replace("\t1\t15.4", "\tTrue\t15.4").replace("\t3\t3\t", "\t3\t4\t"), "log", "line 2: correct is"),
        (PLAIN.replace("0.42", "-1"), "log", "line 2: radius is -1"),
        (PLAIN.replace("0.42", "1,000.5"), "log", "line 2: radius is '1,000.5'"),
        (PLAIN.replace("15.4", "soon"), "log", "line 2: time is 'soon'"),
        (PLAIN.replace("15.4", "-3"), "log", "line 2: time is '-3'"),
        (PLAIN + "ACR: 0.42\n", "log", "line 4: it has 1 columns"),
    ],
    ids=range(11),
)
def test_what_is_no_log_or_not_clear_is_named(tmp_path, content, name, said):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_results(path)
    assert said in caught.value.message
    assert CliRunner().invoke(app, ["compare", str(path)]).exit_code == 2


# --- our own files, edited ---

PROTOCOL = {"format": 1, "n": 1000, "certifier": {"name": "none-of-ours"}, "info": {}}
OURS = [
    Row(0, 3, 3, 0.125, True, 0.25, 100, 1000, 991, 9, "n-reached", False),
    Row(5, 5, -1, 0.0, False, 1.0, 9, 9, 4, 5, "x", False),
]


def ours(path: Path, change) -> bytes:
    """A finished file of ours that went through `change`; what it was is returned."""
    with ResultWriter.create(path, PROTOCOL) as writer:
        for row in OURS:
            writer.append(row)
        writer.finish()
    before = path.read_bytes()
    assert before.decode() == HEADER + "".join(map(format_row, OURS))
    path.write_bytes(change(before))
    return before


REPAIRED = {
    "crlf": lambda text: text.replace(b"\n", b"\r\n"),
    "bom": lambda text: b"\xef\xbb\xbf" + text,
    "bom-and-crlf": lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"),
    "cr": lambda text: text.replace(b"\n", b"\r"),
    "utf-16": lambda text: text.decode().encode("utf-16"),
}


@pytest.mark.parametrize("change", REPAIRED.values(), ids=REPAIRED)
def test_line_ends_and_marks_are_read_and_repaired(tmp_path, change):
    before = ours(path := tmp_path / "r.tsv", change)
    found = read_results(path)
    assert found.idx.tolist() == [0, 5]
    assert "read as such" in found.notes[0]
    with ResultWriter.resume(path, PROTOCOL) as writer:
        assert "this is repaired" in writer.notes[-1]
        assert writer.rows == OURS
    assert path.read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["r.tsv", "r.tsv.protocol.json"]


@pytest.mark.parametrize("change", REPAIRED.values(), ids=REPAIRED)
def test_nothing_is_repaired_under_another_protocol(tmp_path, change):
    ours(path := tmp_path / "r.tsv", change)
    before = path.read_bytes()
    with pytest.raises(InputError, match="started under another protocol"):
        ResultWriter.resume(path, {**PROTOCOL, "n": 2000})
    assert path.read_bytes() == before


UNREPAIRED = {
    "quoted": (lambda text: b"\n".join(b'"' + line.replace(b"\t", b'"\t"') + b'"' for line in text.split(b"\n")[:-1]) + b"\n",
               "its cells are in quotation marks", "quotation marks"),
    "commas": (lambda text: text.replace(b"0.125", b"0,125"), "line 2: radius is '0,125'", "decimal commas"),
    "semicolons": (lambda text: text.replace(b"\t", b";"), "its columns are not separated by tabs", "separated by semicolons"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "why", "note"), UNREPAIRED.values(), ids=UNREPAIRED)
def test_what_is_not_repaired_says_why_and_is_compared_all_the_same(tmp_path, change, why, note):
    ours(path := tmp_path / "r.tsv", change)
    before = path.read_bytes()
    with pytest.raises(InputError) as caught:
        ResultWriter.resume(path, PROTOCOL)
    assert why in caught.value.message
    assert path.read_bytes() == before
    found = read_results(path)
    assert found.radius.tolist() == [0.125, 0.0]
    assert note in " ".join(found.notes)


@pytest.mark.parametrize("cell", ["True", "1.0"])
def test_what_rscli_never_writes_is_not_read_into_a_file_of_ours(tmp_path, cell):
    ours(path := tmp_path / "r.tsv", lambda text: text.replace(b"\t1\t0:00", f"\t{cell}\t0:00".encode()))
    with pytest.raises(InputError, match="line 2: correct is"):
        read_results(path)


def test_a_protocol_with_a_byte_order_mark_is_read(tmp_path):
    ours(path := tmp_path / "r.tsv", lambda text: text)
    beside = protocol_path(path)
    beside.write_bytes(b"\xef\xbb\xbf" + beside.read_bytes().replace(b"\n", b"\r\n"))
    assert read_results(path).protocol == json.loads(beside.read_text(encoding="utf-8-sig"))
    ResultWriter.resume(path, PROTOCOL).close()
