"""Result files: rows that read back to the same bits, repair after a crash at any byte, refusals, and other tools' files."""

from __future__ import annotations

import json
import math
import random
import struct
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rscli.errors import InputError, RscliError
from rscli.results import rows
from rscli.results.protocol import FORMAT, digest, protocol_path
from rscli.results.reader import read_results
from rscli.results.rows import Row, format_row, parse_row
from rscli.results.writer import ResultWriter

PROTOCOL = {
    "format": 1,
    "model_sha256": "ab12",
    "certifier": {"name": "cohen", "n": 1000, "alpha": 0.001},
    "sigma": 0.5,
    "radii": None,
    "info": {"versions": {"torch": "2.6"}, "max": 500},
}
ROWS = [
    Row(7, 3, 3, 0.1 + 0.2, True, 0.25, 100, 1000, 991, 9, "n-reached", False),
    Row(0, 5, -1, 0.0, False, 61.000001, 100, 1000, 480, 470, "below-half", False),
    Row(3, 2, 8, 5e-324, False, 3599.999999, 100, 1000, 1000, 0, "n-reached für immer", True),
    Row(11, 1, 1, math.nextafter(2.0, 0), True, 90_061.5, 100, 50, 50, 0, "x", True),
]
FOREIGN = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"


def signed(protocol: dict) -> dict:
    """A protocol as it is written: in today's format, with its digest."""
    now = {**protocol, "format": FORMAT}
    return {**now, "sha256": digest(now)}


def written(path: Path, rows: list[Row] = ROWS) -> bytes:
    """A file of `rows`, not yet finished."""
    with ResultWriter.create(path, PROTOCOL) as writer:
        for row in rows:
            writer.append(row)
    return path.read_bytes()


# --- rows ---


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"image-{row.idx}")
def test_a_row_reads_back_as_it_was(row):
    assert parse_row(format_row(row)) == row


def test_any_radius_reads_back_to_the_same_bits():
    source = random.Random(0)
    for _ in range(2000):
        radius = abs(struct.unpack("d", source.randbytes(8))[0])
        if radius <= rows.LARGEST_RADIUS:  # false for NaN too; half of all bit patterns are left
            assert parse_row(format_row(Row(0, 1, 1, radius, True, 0.0))).radius == radius


def test_numpy_values_are_written_as_plain_numbers():
    row = Row(
        np.int64(1), np.int64(2), np.int64(2), np.float64(0.25), np.bool_(True), np.float64(1.5), saturated=np.bool_(False)
    )
    assert format_row(row) == "1\t2\t2\t0.25\t1\t0:00:01.500000\t\t\t\t\t\t0\n"


def test_a_reason_cannot_break_the_line():
    line = format_row(replace(ROWS[0], reason="two\tcolumns\r\nand a line"))
    assert line.count("\n") == 1
    assert parse_row(line).reason == "two columns and a line"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:00:16.301146", 16.301146),
        ("0:01:05", 65),
        ("1 day, 2:03:04", 93_784),
        ("12 days, 0:00:00.5", 1_036_800.5),
        ("30:00:00", 108_000),
    ],
)
def test_times_as_the_fields_tools_write_them(text, seconds):
    assert parse_row(f"0\t1\t1\t0.5\t1\t{text}", rows.FIELD_COLUMNS).seconds == pytest.approx(seconds, abs=1e-9)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0\t1\t1\tnan\t1\t0:00:01", "radius is nan"),
        ("0\t1\t1\t-0.5\t1\t0:00:01", "radius is -0.5"),
        ("0\t1\t1\tinf\t1\t0:00:01", "radius is inf"),
        ("0\t1\t1\twide\t1\t0:00:01", "radius is 'wide'"),
        ("0\t1\t1\t1e300\t1\t0:00:01", "radius is 1e+300, but no radius in pixels of [0, 1] is above 1000"),
        (f"1{22 * '0'}\t1\t1\t0.1\t1\t0:00:01", f"idx is 1{22 * '0'}, but must be at most 1,000,000,000,000"),
        ("1e22\t1\t1\t0.1\t1\t0:00:01", "idx is '1e22', but must be a whole number"),
        (f"{5000 * '9'}\t1\t1\t0.1\t1\t0:00:01", "must be a whole number"),
        (f"0\t{22 * '7'}\t{22 * '7'}\t0.1\t1\t0:00:01", "label is 7777777777"),
        ("0\t1\t-2\t0\t0\t0:00:01", "predict is -2"),
        (f"0\t1\t1\t0.1\t1\t{400 * '9'}:00:01", "but must be H:MM:SS"),
        ("0.5\t1\t1\t0.1\t1\t0:00:01", "idx is '0.5'"),
        ("-1\t1\t1\t0.1\t1\t0:00:01", "idx is -1"),
        ("0\t1\t1\t0.1\tyes\t0:00:01", "correct is 'yes'"),
        ("0\t1\t2\t0.1\t1\t0:00:01", "predict is 2 and label is 1"),
        ("0\t1\t-1\t0.1\t0\t0:00:01", "an abstention"),
        ("0\t1\t1\t0.1\t1\tlong", "time is 'long'"),
        ("0\t1\t1\t0.1\t1", "5 columns, not 6"),
        ("0\t1\t1\t0.1\t1\t0:00:01\t9", "7 columns, not 6"),
    ],
)
def test_a_broken_line_is_an_error_that_names_file_line_and_rule(tmp_path, line, said):
    path = tmp_path / "a.tsv"
    path.write_text(FOREIGN + "5\t0\t0\t1.0\t1\t0:00:01\n" + line + "\n")
    with pytest.raises(InputError, match=r"a\.tsv, line 3") as caught:
        read_results(path)
    assert said in caught.value.message


@pytest.mark.parametrize("name", ["n0", "n", "count", "runner_up"])
@pytest.mark.parametrize(("text", "rule"), [(f"1{30 * '0'}", "at most 1,000,000,000,000"), ("-5", "never fewer than 0")])
def test_no_number_of_samples_is_absurd(name, text, rule):
    cells = dict(zip(rows.COLUMNS, format_row(ROWS[0]).rstrip("\n").split("\t"), strict=True))
    with pytest.raises(ValueError, match=f"{name} is {text}, but .*{rule}"):
        parse_row("\t".join({**cells, name: text}.values()))


def test_the_largest_numbers_are_read_and_add_up(tmp_path):
    largest = replace(ROWS[0], radius=1000.0, n0=10**12, n=10**12, count=10**12, runner_up=0, predict=1, label=1, correct=True)
    written(tmp_path / "r.tsv", [replace(largest, idx=10**12 - k) for k in range(3)])
    assert int(read_results(tmp_path / "r.tsv").n.sum()) == 3 * 10**12


# --- writing ---


def test_a_finished_file_is_sorted_and_has_its_protocol(tmp_path):
    path = tmp_path / "new" / "results.tsv"
    with ResultWriter.create(path, PROTOCOL) as writer:
        for row in ROWS:
            writer.append(row)
        assert writer.done == {0, 3, 7, 11}
        writer.finish()
    found = read_results(path)
    assert found.idx.tolist() == [0, 3, 7, 11]
    assert found.radius.tolist() == [0.0, 5e-324, 0.1 + 0.2, math.nextafter(2.0, 0)]
    assert found.n.tolist() == [1000, 1000, 1000, 50]
    assert found.saturated.tolist() == [False, True, False, True]
    assert found.reason == ("below-half", "n-reached für immer", "n-reached", "x")
    assert (found.protocol, found.name, found.notes) == (signed(PROTOCOL), "new", ())
    assert sorted(p.name for p in path.parent.iterdir()) == ["results.tsv", "results.tsv.protocol.json"]


def test_a_row_is_in_the_file_as_soon_as_it_is_appended(tmp_path):
    path = tmp_path / "r.tsv"
    with ResultWriter.create(path, PROTOCOL) as writer:
        writer.append(ROWS[0])
        assert path.read_text().endswith(format_row(ROWS[0]))


def test_an_existing_file_is_not_overwritten(tmp_path):
    before = written(path := tmp_path / "r.tsv")
    protocol = protocol_path(path).read_bytes()
    with pytest.raises(InputError, match="already exists") as caught:
        ResultWriter.create(path, {**PROTOCOL, "sigma": 9.0})
    assert "--resume" in caught.value.hint
    assert "--out" in caught.value.hint
    assert path.read_bytes() == before
    assert protocol_path(path).read_bytes() == protocol


def test_cut_off_at_any_byte_it_resumes_with_whole_rows_and_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)  # 300 runs need not wait for the disk
    whole = written(path := tmp_path / "r.tsv")
    with ResultWriter.resume(path, PROTOCOL) as writer:
        writer.finish()
    finished = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        kept = max(whole[:size].count(b"\n") - 1, 0)
        with ResultWriter.resume(path, PROTOCOL) as writer:
            assert writer.rows == ROWS[:kept], size
            assert path.read_text() == rows.HEADER + "".join(map(format_row, ROWS[:kept])), size
            for row in ROWS:
                if row.idx not in writer.done:
                    writer.append(row)
            writer.finish()
        assert path.read_bytes() == finished, size


@pytest.mark.parametrize("tail", [b"\0" * 40, b"\0" * 40 + b"\n", b"garbage\n", b"\xff\xfe\n"], ids=repr)
def test_a_last_line_that_does_not_parse_is_cut_off(tmp_path, tail):
    whole = written(path := tmp_path / "r.tsv")
    path.write_bytes(whole + tail)
    with ResultWriter.resume(path, PROTOCOL) as writer:
        assert writer.rows == ROWS
    assert path.read_bytes() == whole


def test_a_broken_line_before_the_last_is_not_repaired(tmp_path):
    whole = written(path := tmp_path / "r.tsv")
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"garbage\n", *lines[2:]]))
    before = path.read_bytes()
    with pytest.raises(InputError, match="line 3"):
        ResultWriter.resume(path, PROTOCOL)
    assert path.read_bytes() == before


def test_an_image_twice_is_an_error_on_resume(tmp_path):
    whole = written(path := tmp_path / "r.tsv")
    path.write_bytes(whole + format_row(ROWS[1]).encode())
    with pytest.raises(InputError, match="line 6: image 0 is already on an earlier line"):
        ResultWriter.resume(path, PROTOCOL)


def test_another_protocol_is_refused_with_every_difference(tmp_path):
    before = written(path := tmp_path / "r.tsv")
    path.write_bytes(before + b"torn")
    other = {**PROTOCOL, "certifier": {"name": "cohen", "n": 5000, "alpha": 0.001}, "seed": 3}
    del other["radii"]
    with pytest.raises(InputError) as caught:
        ResultWriter.resume(path, other)
    for said in ("certifier.n was 1000, is now 5000", "seed was absent, is now 3", "radii was null, is now absent"):
        assert said in caught.value.message
    assert "alpha" not in caught.value.message
    assert path.read_bytes() == before + b"torn"  # refused before anything is repaired


def test_what_differs_in_info_is_only_noted(tmp_path):
    written(path := tmp_path / "r.tsv")
    with ResultWriter.resume(path, {**PROTOCOL, "info": {"versions": {"torch": "2.7"}, "max": 500}}) as writer:
        assert writer.notes == ['r.tsv, since it was started: versions.torch was "2.6", is now "2.7"']
    assert json.loads(protocol_path(path).read_text()) == signed(PROTOCOL)


def test_tuples_in_a_protocol_are_what_json_makes_of_them(tmp_path):
    path = tmp_path / "r.tsv"
    ResultWriter.create(path, {**PROTOCOL, "radii": (0.25, 0.5)}).close()
    with ResultWriter.resume(path, {**PROTOCOL, "radii": [0.25, 0.5]}) as writer:
        assert writer.notes == []


def test_rows_without_a_protocol_are_not_continued(tmp_path):
    written(path := tmp_path / "r.tsv")
    protocol_path(path).unlink()
    with pytest.raises(InputError, match="no protocol"):
        ResultWriter.resume(path, PROTOCOL)


def test_a_foreign_file_is_not_continued(tmp_path):
    path = tmp_path / "r.tsv"
    path.write_text(FOREIGN + "0\t1\t1\t0.1\t1\t0:00:01\n")
    with pytest.raises(InputError, match="cannot be continued"):
        ResultWriter.resume(path, PROTOCOL)


def test_a_run_killed_before_its_protocol_was_written_begins_anew(tmp_path):
    path = tmp_path / "r.tsv"
    path.touch()
    with ResultWriter.resume(path, PROTOCOL) as writer:
        writer.append(ROWS[0])
    assert read_results(path).protocol == signed(PROTOCOL)


def test_resuming_a_finished_file_changes_nothing(tmp_path):
    written(path := tmp_path / "r.tsv")
    with ResultWriter.resume(path, PROTOCOL) as writer:
        writer.finish()
    before, when = path.read_bytes(), path.stat().st_mtime_ns
    with ResultWriter.resume(path, PROTOCOL) as writer:
        writer.finish()
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, when)


def test_a_finished_result_leaves_nothing_that_kills_left_beside_it(tmp_path):
    for name in ("r.tsv", "r.tsv.protocol.json", "r.tsv.old"):
        tempfile.mkstemp(prefix=f".{name}.", suffix=".part", dir=tmp_path)  # as `replacing` names them
    assert len(list(tmp_path.iterdir())) == 3
    with ResultWriter.create(tmp_path / "r.tsv", PROTOCOL) as writer:
        writer.append(ROWS[0])
        writer.finish()
    assert {path.name[:-14] for path in tmp_path.glob(".*")} == {".r.tsv.old"}


def test_a_second_process_on_the_same_file_is_noticed(tmp_path):
    path = tmp_path / "r.tsv"
    with ResultWriter.create(path, PROTOCOL) as first, ResultWriter.resume(path, PROTOCOL) as second:
        first.append(ROWS[0])
        with pytest.raises(RscliError, match="was changed while"):
            second.append(ROWS[0])
        first.append(ROWS[1])
        first.finish()
        with pytest.raises(RscliError, match="was changed while"):
            second.finish()
    assert read_results(path).idx.tolist() == [0, 7]


def test_the_same_image_is_not_appended_twice(tmp_path):
    with ResultWriter.create(tmp_path / "r.tsv", PROTOCOL) as writer:
        writer.append(ROWS[0])
        with pytest.raises(ValueError, match="image 7"):
            writer.append(ROWS[0])


def test_a_row_that_could_not_be_read_is_not_written(tmp_path):
    with ResultWriter.create(tmp_path / "r.tsv", PROTOCOL) as writer:
        with pytest.raises(ValueError, match="radius is nan"):
            writer.append(replace(ROWS[0], radius=float("nan")))
        assert (writer.done, writer.rows, writer.path.read_text()) == (set(), [], rows.HEADER)


def test_a_full_disk_is_an_error_that_says_how_to_go_on(tmp_path, monkeypatch):
    with ResultWriter.create(tmp_path / "r.tsv", PROTOCOL) as writer:

        class Full:
            closed = True

            def write(self, _):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(writer, "_file", Full())
        with pytest.raises(RscliError, match="No space left") as caught:
            writer.append(ROWS[0])
    assert "--resume" in caught.value.hint


# --- reading ---


def test_a_run_that_goes_on_is_read_without_its_torn_line(tmp_path):
    whole = written(path := tmp_path / "r.tsv")
    path.write_bytes(whole[:-2])
    found = read_results(path)
    assert found.idx.tolist() == [7, 0, 3]
    assert "incomplete" in found.notes[0]


@pytest.mark.parametrize(
    "text",
    [
        FOREIGN + "0\t1\t1\t0.25\t1\t0:00:01\n4\t2\t-1\t0.0\t0\t0:00:02.5\n",
        FOREIGN + "0\t1\t1\t0.25\t1\t0:00:01\n4\t2\t-1\t0.0\t0\t0:00:02.5",
        (FOREIGN + "0\t1\t1\t0.25\t1\t0:00:01\n4\t2\t-1\t0.0\t0\t0:00:02.5\n\n").replace("\n", "\r\n"),
        FOREIGN.replace("\n", "  \n") + "0\t1\t1\t0.25\t1\t0:00:01 \t\n4\t2\t-1\t0.0\t0\t0:00:02.5  \n \n",
        "\ufeff" + FOREIGN + "0\t1\t1\t0.25\t1\t0:00:01\n4\t2\t-1\t0.0\t0\t0:00:02.5\n",
        "label\tidx\tradius\tpredict\ttime\tcorrect\tmore\n1\t0\t0.25\t1\t0:00:01\t1\ta\n2\t4\t0\t-1\t0:00:02.5\t0\tb\n",
    ],
    ids=["plain", "no-last-line-feed", "crlf", "trailing-blanks", "byte-order-mark", "other-order-and-columns"],
)
def test_files_of_other_tools(tmp_path, text):
    path = tmp_path / "theirs.tsv"
    path.write_bytes(text.encode())
    found = read_results(path)
    assert (found.idx.tolist(), found.label.tolist(), found.predict.tolist()) == ([0, 4], [1, 2], [1, -1])
    assert (found.radius.tolist(), found.correct.tolist(), found.seconds.tolist()) == ([0.25, 0.0], [True, False], [1.0, 2.5])
    assert (found.n, found.reason, found.saturated, found.protocol, found.name) == (None, None, None, None, "theirs")


def test_an_image_twice_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "r.tsv"
    path.write_text(FOREIGN + 2 * "31\t1\t1\t0.25\t1\t0:00:01\n")
    with pytest.raises(InputError, match="line 3: image 31"):
        read_results(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"idx\tlabel\tpredict\tradius\n", "no column correct"),
        (b"epoch,loss\n1,2\n", "first line is 'epoch,loss'"),
        (b"\x80\x00\xff" * 30, "not text"),
        (b"", "an empty line"),
        (FOREIGN.encode(), "has no rows"),
        (FOREIGN.replace("time", "time\tidx").encode(), "two columns"),
    ],
    ids=["columns-missing", "csv", "binary", "empty", "no-rows", "column-twice"],
)
def test_what_is_no_result_file_says_what_was_found(tmp_path, content, said):
    path = tmp_path / "r.tsv"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_results(path)
    assert said in caught.value.message


def test_a_missing_file_and_a_folder_without_results(tmp_path):
    for path in (tmp_path / "none.tsv", tmp_path):
        with pytest.raises(InputError, match="there is no result file"):
            read_results(path)


def test_a_protocol_from_the_future_is_refused(tmp_path):
    written(path := tmp_path / "r.tsv")
    protocol_path(path).write_text('{"format": 3}')
    with pytest.raises(InputError, match="format 3"):
        read_results(path)


def test_every_published_log_reads(shared):
    for path in sorted((shared / "logs").glob("*.tsv")):
        found = read_results(path)
        assert found.idx.size == (500 if "imagenet" in path.name else 10_000)
        assert found.radius[found.predict == -1].max(initial=0) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alpha": "small"}, 'alpha = "small" must be a valid number'),
        ({"alpha": 1.5}, "alpha = 1.5 must be less than 1"),
        ({"sigma": -1}, "sigma = -1 must be greater than 0"),
        ({"sigma": math.nan}, "sigma = NaN must be a finite number"),
        ({"n": 1.5}, "n = 1.5 must be a valid integer"),
        ({"n0": True}, "n0 = true must be a valid integer"),
        ({"radii": 0.5}, "radii = 0.5 must be a valid list"),
        ({"radii": [0.5, "x"]}, 'radii.1 = "x" must be a valid number'),
        ({"labels": "no"}, 'labels = "no" must be a valid boolean'),
        ({"certifier": 3}, "certifier = 3 "),
        ({"certifier": {"name": 3}}, "certifier.name = 3 must be a valid string"),
        ({"certifier": {}}, "certifier.name is missing"),
        ({"noise": "gaussian"}, 'noise = "gaussian" '),
        ({"info": []}, "info "),
        ({"info": {"batch": "x"}}, 'info.batch = "x" must be a valid integer'),
        ({"info": {"batch": 0}}, "info.batch = 0 must be greater than or equal to 1"),
        ({"info": {"lanes": -1}}, "info.lanes = -1 must be"),
        ({"info": {"threads": "4"}}, 'info.threads = "4" must be a valid integer'),
        ({"info": {"channels_last": 3}}, "info.channels_last = 3 must be a valid boolean"),
        ({"info": {"train_seed": "x"}}, 'info.train_seed = "x" must be a valid integer'),
        ({"info": {"loss": {}}}, "info.loss.name is missing"),
        ({"info": {"config": 3}}, "info.config = 3 must be a valid dictionary"),
        ({"n": 1.5, "alpha": 2}, "n = 1.5 must be a valid integer; alpha = 2 must be less than 1"),
    ],
    ids=str,
)
def test_a_protocol_that_somebody_edited_is_refused_in_one_message(tmp_path, change, said):
    path = tmp_path / "r.tsv"
    written(path)
    protocol_path(path).write_text(json.dumps({**PROTOCOL, **change}))
    for read in (read_results, lambda path: ResultWriter.resume(path, PROTOCOL)):
        with pytest.raises(InputError, match=r"r\.tsv\.protocol\.json is broken: ") as caught:
            read(path)
        assert said in caught.value.message
        assert "\n" not in caught.value.message
