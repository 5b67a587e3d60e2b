"""The protocol of a result belongs to the process that wrote it first, and every part tells under which it was written."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import pytest

from racers import race
from rscli.errors import InputError
from rscli.results.protocol import claim, digest, protocol_path, read_protocol
from rscli.results.reader import read_results
from rscli.results.rows import HEADER, Row, format_row
from rscli.results.shards import parts_of
from rscli.results.writer import ResultWriter

PROTOCOL = {"format": 1, "n": 10, "alpha": 0.001, "seed": 0, "certifier": {"name": "none-of-ours"}, "info": {}}
OTHER = {"n": 11, "alpha": 0.01, "seed": 1}
ROUNDS = 120


@pytest.mark.parametrize("links", [True, False], ids=["hard-links", "no-hard-links"])
def test_of_two_processes_with_other_options_exactly_one_begins(tmp_path, links):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    changed = [tuple(OTHER)[place % len(OTHER)] for place in range(ROUNDS)]
    protocols = [[PROTOCOL] * ROUNDS, [{**PROTOCOL, key: OTHER[key]} for key in changed]]
    ears, runners = [], []
    for number in (1, 2):
        ear, mouth = context.Pipe(duplex=False)
        runner = context.Process(
            target=race, args=(tmp_path, number, protocols[number - 1], links, barrier, mouth), daemon=True
        )
        runner.start()
        mouth.close()
        ears.append(ear)
        runners.append(runner)
    won = [0, 0]
    for place, key in enumerate(changed):
        said = []
        for ear in ears:
            assert ear.poll(60)
            said.append(ear.recv())
        assert said.count("") == 1, said
        winner = said.index("")
        assert f"started under another protocol:\n  {key} was " in said[1 - winner]
        path = tmp_path / f"{place}.tsv"
        assert read_protocol(path)[key] == protocols[winner][place][key]
        assert read_results(path).idx.tolist() == [winner + 1]
        assert len(parts_of(path)) + path.exists() == 1
        won[winner] += 1
    for runner in runners:
        runner.join(60)
        assert runner.exitcode == 0
    assert not list(tmp_path.glob(".*"))
    assert sum(won) == ROUNDS
    print(f"won: {won}")


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Two shards of a result."""
    path = tmp_path / "r.tsv"
    for number in (1, 2):
        with ResultWriter.join(path, PROTOCOL, f"shard-{number}-of-2") as writer:
            writer.append(Row(number, 1, 1, 0.5, True, 1.0, 10, 10, 9, 1, "x", False))
    return path


def test_a_part_of_another_protocol_is_put_into_no_file(parts, tmp_path):
    other = tmp_path / "other" / "r.tsv"
    with ResultWriter.join(other, {**PROTOCOL, "seed": 1}, "shard-2-of-2") as writer:
        writer.append(Row(7, 1, 1, 0.5, True, 1.0, 10, 10, 9, 1, "x", False))
    assert read_results(parts).idx.tolist() == [1, 2]
    shutil.copy(parts_of(other)[0], parts_of(parts)[1])
    before = {path: path.read_bytes() for path in tmp_path.glob("r.tsv*")}
    uses = (
        read_results,
        lambda path: ResultWriter.resume(path, PROTOCOL),
        lambda path: ResultWriter.join(path, PROTOCOL, "rank-0-of-2"),
    )
    for use in uses:
        with pytest.raises(InputError) as caught:
            use(parts)
        assert f"{parts}.part-shard-2-of-2 was written under another protocol" in caught.value.message
        for one in (digest(read_protocol(parts)), digest(read_protocol(other))):
            assert one in caught.value.message
    assert {path: path.read_bytes() for path in tmp_path.glob("r.tsv*")} == before


def test_a_protocol_exchanged_for_another_whole_one_is_noticed_by_the_parts(parts, tmp_path):
    claim(tmp_path / "o.tsv", {**PROTOCOL, "alpha": 0.5})
    shutil.copy(protocol_path(tmp_path / "o.tsv"), protocol_path(parts))
    with pytest.raises(InputError, match="was written under another protocol"):
        read_results(parts)


def test_a_part_without_digest_is_read_only_beside_an_older_protocol(parts):
    for part in parts_of(parts):
        part.write_text("".join(part.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match="does not say under which protocol"):
        read_results(parts)
    protocol_path(parts).write_text(
        '{"format": 1, "n": 10, "alpha": 0.001, "seed": 0, "certifier": {"name": "none-of-ours"}, "info": {}}'
    )
    assert read_results(parts).idx.tolist() == [1, 2]
    with ResultWriter.resume(parts, PROTOCOL) as writer:
        writer.finish()
    assert parts.read_text().startswith(HEADER)
    assert read_results(parts).idx.tolist() == [1, 2]


def test_a_part_cut_off_at_any_byte_goes_on(tmp_path):
    path, row = tmp_path / "r.tsv", Row(1, 1, 1, 0.5, True, 1.0, 10, 10, 9, 1, "x", False)
    with ResultWriter.join(path, PROTOCOL, "shard-1-of-2") as writer:
        writer.append(row)
    (part,) = parts_of(path)
    whole = part.read_bytes()
    for size in range(len(whole) + 1):
        part.write_bytes(whole[:size])
        with ResultWriter.join(path, PROTOCOL, "shard-1-of-2") as writer:
            assert writer.rows == [row] * (size == len(whole)), size
            if not writer.rows:
                writer.append(row)
        assert part.read_bytes() == whole, size


def test_the_finished_file_is_what_the_fields_tools_read(parts):
    with ResultWriter.resume(parts, PROTOCOL) as writer:
        writer.finish()
    assert parts.read_text() == HEADER + "".join(
        format_row(Row(number, 1, 1, 0.5, True, 1.0, 10, 10, 9, 1, "x", False)) for number in (1, 2)
    )


def test_a_protocol_left_without_results_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "r.tsv"
    claim(path, PROTOCOL)
    ResultWriter.create(path, PROTOCOL).close()
    path.unlink()
    with pytest.raises(InputError, match="n was 10, is now 12") as caught:
        ResultWriter.create(path, {**PROTOCOL, "n": 12})
    assert f"remove {protocol_path(path)}" in caught.value.hint
    assert not path.exists()
    protocol_path(path).unlink()
    ResultWriter.create(path, {**PROTOCOL, "n": 12}).close()
