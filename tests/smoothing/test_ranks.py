"""Several processes, one result: ranks and shards give the file that one process gives, whatever kills them on the way.

Most tests run ranks as threads of this process that share a counter, as torchrun's do; the slow ones start and kill real
processes. Files are compared in all columns but the time.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rscli.api import Certificate
from rscli.cli.app import app
from rscli.errors import InputError
from rscli.registry import installed
from rscli.results.protocol import protocol_path
from rscli.results.reader import read_results
from rscli.results.rows import HEADER, Row
from rscli.results.shards import parts_of
from rscli.results.writer import ResultWriter
from rscli.runtime.progress import Silent
from rscli.runtime.signals import StopRequest
from rscli.sampling.sampler import Sampler
from rscli.smoothing import certify as certifying
from rscli.smoothing.certify import CertifyOptions, SamplingOptions, _Run, certify
from rscli.smoothing.work_queue import Alone, Together, join
from runs import rows
from victims import BEGUN, ROW, STEP_SECONDS, TOGETHER, kill

IMAGES = 40
POSIX = pytest.mark.skipif(
    os.name != "posix" or shutil.which("pgrep") is None, reason="signals and processes as POSIX has them"
)


def options(model: Path, out: Path, **changes) -> CertifyOptions:
    certifier = {"name": "cohen", "n": 100, "n0": 20, "alpha": 0.01}
    made = CertifyOptions(model, out, out.parent, certifier, skip=9, max=IMAGES, sampling=SamplingOptions("cpu", 64))
    return replace(made, **changes)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes when nothing disturbs it."""
    out = tmp_path_factory.mktemp("whole") / "results.tsv"
    certify(options(model, out), Silent())
    return out


def finished_like(out: Path, whole: Path) -> None:
    """One file, no parts, the same rows."""
    assert parts_of(out) == []
    assert rows(out) == rows(whole)


# --- ranks, as threads -------------------------------------------------------------------------------------------------------


class Ended(BaseException):
    """What a process does not survive."""


class Counters:
    """torchrun's key-value store, and torchrun itself: when one rank has died, the others end."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}
        self.lock = threading.Lock()
        self.dead = False

    def add(self, name: str, amount: int) -> int:
        with self.lock:
            if self.dead:
                raise Ended
            self.values[name] = self.values.get(name, 0) + amount
            return self.values[name]


def certify_together(chosen: CertifyOptions, world: int, monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Certifies with `world` ranks, and returns what ended them early."""
    store, errors, mine = Counters(), [], threading.local()
    monkeypatch.setattr(certifying, "join", lambda *_: mine.ranks)

    def work(rank: int) -> None:
        mine.ranks = Alone() if world == 1 else Together(store, rank, world)
        try:
            certify(chosen, Silent())
        except BaseException as error:
            store.dead = True
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return errors


def test_every_image_goes_to_one_rank_and_counters_are_shared():
    store = Counters()
    first, second = (Together(store, rank, 2).hand_out(range(5, 50), lambda: 0) for rank in (0, 1))
    assert sorted([next(first), next(second), *first, *second]) == list(range(5, 50))
    assert [Together(store, 0, 2).add("a", 2), Together(store, 1, 2).add("a", 3)] == [2, 5]


def test_nobody_opens_more_images_than_an_even_share_of_those_left():
    store, mine = Counters(), [list[int](), list[int]()]
    first, second = (Together(store, rank, 2).hand_out(range(30), lambda rank=rank: len(mine[rank])) for rank in (0, 1))
    mine[0] += iter(lambda: next(first), None)
    mine[1] += iter(lambda: next(second), None)
    assert [len(each) for each in mine] == [10, 7]  # 10 of 30 leave 20, and 7 of those 13: no more than half of what is left
    assert (next(first), next(second)) == (None, None)
    mine[1].clear()
    assert next(second) == 17
    mine[0].clear()
    mine[1].clear()
    assert [*first, *second] == list(range(18, 30))  # who has nothing open is never told to wait


class Lockstep:
    """Time, counted in forwards: of the ranks that are not done, the one that has done the fewest goes on."""

    def __init__(self, world: int) -> None:
        self.forwards = dict.fromkeys(range(world), 0)
        self.changed = threading.Condition()

    def forward(self, rank: int, amount: int = 1) -> None:
        with self.changed:
            self.forwards[rank] += amount
            self.changed.notify_all()
            assert self.changed.wait_for(
                lambda: rank == min(self.forwards, key=lambda other: (self.forwards[other], other)), 60
            )

    def done(self, rank: int) -> None:
        with self.changed:
            self.forwards.pop(rank, None)
            self.changed.notify_all()


class Costly:
    """A request that needs 50 samples, and of every eighth image a hundredfold, by lot."""

    image, fresh = staticmethod(lambda: torch.zeros(1, 1, 1)), False

    def __init__(self, key: int) -> None:
        self.key, self.wanted = key, 50
        self.most = 5000 if random.Random(key).random() < 1 / 8 else 50

    def receive(self, counts) -> bool:
        enough, self.wanted = self.wanted == self.most, self.most
        return enough


class Costs:
    """In place of images and of the result file, which is closed when all images are done."""

    request_for, path, rows, done, radii = Costly, Path("r.tsv"), (), frozenset(), ()
    labels = MappingProxyType(dict.fromkeys(range(1000), 0))

    def __init__(self, close: Callable[[], None]) -> None:
        self.close = close

    def certificate(self, request) -> Certificate:
        return Certificate(request.key, 0, 0.0, 0.9, 0.1, 0, 1, np.array([1, 0]), 0, "n-reached")

    def append(self, row: Row) -> None:
        pass


@pytest.mark.parametrize(("world", "batch", "images"), [(2, 4096, 100), (8, 2048, 200)])
def test_samples_are_balanced_though_images_differ_a_hundredfold_and_a_batch_holds_many(world, batch, images):
    store, clock, samples = Counters(), Lockstep(world), [0] * world
    noise = installed().build("noises", {"name": "gaussian", "sigma": 0.5})

    def work(rank: int) -> None:
        def network(images):
            clock.forward(rank)
            return images.reshape(batch, 1).expand(batch, 2)

        sampler = Sampler(network, noise, 2, seed=0, batch=batch, device=torch.device("cpu"))
        costs = Costs(lambda: clock.done(rank))
        try:
            clock.forward(rank, 0)
            run = _Run(costs, costs, sampler, costs, Together(store, rank, world), Silent(), StopRequest())
            run.over(list(range(images)), merge=False)
        finally:
            samples[rank] = sampler.samples
            clock.done(rank)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(samples) == sum(Costly(key).most for key in range(images))
    mean = sum(samples) / world
    assert 0.5 * mean < min(samples)
    assert max(samples) < 1.25 * mean


def test_a_process_that_does_not_share_the_folder_says_so_at_once(model, tmp_path, monkeypatch):
    monkeypatch.setattr(certifying, "SHARED_SECONDS", 0.1)
    store = Counters()
    store.add("meet protocol", 1)  # the first has written it, elsewhere
    monkeypatch.setattr(certifying, "join", lambda *_: Together(store, 1, 2))
    with pytest.raises(InputError, match="which the first process has written, does not appear here"):
        certify(options(model, tmp_path / "r.tsv"), Silent())
    assert list(tmp_path.iterdir()) == []


def test_the_first_process_leaves_last():
    """It may keep the store that the others still ask."""
    store, left = Counters(), []
    first = threading.Thread(target=lambda: (Together(store, 0, 2).leave(), left.append(0)), daemon=True)
    first.start()
    first.join(0.2)
    assert left == []
    Together(store, 1, 2).leave()
    first.join(10)
    assert left == [0]


def test_without_torchrun_there_is_one_rank(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = join(print, StopRequest())
    assert (ranks.rank, ranks.world) == (0, 1)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_write_the_file_of_one(model, whole, tmp_path, monkeypatch, world):
    out = tmp_path / "r.tsv"
    assert certify_together(options(model, out), world, monkeypatch) == []
    finished_like(out, whole)


def test_more_ranks_than_images(model, whole, tmp_path, monkeypatch):
    out = tmp_path / "r.tsv"
    assert certify_together(options(model, out, max=2), 3, monkeypatch) == []
    assert rows(out) == rows(whole)[:2]


def test_ranks_refuse_to_overwrite(model, whole, monkeypatch):
    before = whole.read_bytes()
    errors = certify_together(options(model, whole), 2, monkeypatch)
    assert any(isinstance(error, InputError) and "already exists" in error.message for error in errors)
    assert whole.read_bytes() == before
    assert parts_of(whole) == []


def test_a_finished_run_stays_as_it_is_when_ranks_resume_it(model, whole, tmp_path, monkeypatch):
    out = tmp_path / "r.tsv"
    certify(options(model, out), Silent())
    before = out.read_bytes()
    assert certify_together(options(model, out, resume=True), 2, monkeypatch) == []
    assert out.read_bytes() == before
    assert parts_of(out) == []


# --- killed, in this process -------------------------------------------------------------------------------------------------


class TornFile:
    """A file whose process is killed in the middle of a write, once so many bytes have been written to all such files."""

    def __init__(self, file, left: list[int]) -> None:
        self.file, self.left = file, left

    def write(self, data: bytes) -> int:
        room, self.left[0] = self.left[0], self.left[0] - len(data)
        if room < len(data):
            self.file.write(data[: max(room, 0)])
            raise Ended
        return self.file.write(data)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def kill_after(written: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, whoever writes the byte after the first `written` ones to a result file, or a part of one, dies."""
    begin, left = ResultWriter.__init__, [written]

    def torn(writer: ResultWriter, *arguments) -> None:
        begin(writer, *arguments)
        writer._file = TornFile(writer._file, left)

    monkeypatch.setattr(ResultWriter, "__init__", torn)


def written(out: Path) -> set[tuple[str, ...]]:
    """The whole rows of a result and its parts, without the column `time`."""
    files = [path for path in (out, *parts_of(out)) if path.exists()]
    cells = [line.split("\t") for path in files for line in path.read_text().split("\n")[:-1]]
    where = HEADER.split("\t").index("time")
    return {(*row[:where], *row[where + 1 :]) for row in cells if row[0] != "idx" and not row[0].startswith("# protocol ")}


def decided(out: Path) -> set[str]:
    """The indices of the whole rows of a result and its parts."""
    return {index for index, *_ in written(out)}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_after_one_of_two_ranks_is_killed_any_number_goes_on(model, whole, tmp_path, monkeypatch, world):
    out = tmp_path / "r.tsv"
    with monkeypatch.context() as patch:
        kill_after(whole.stat().st_size // 2, patch)
        assert len(certify_together(options(model, out), 2, patch)) == 2
    assert 5 < len(decided(out)) < IMAGES
    assert len(parts_of(out)) == 2
    assert certify_together(options(model, out, resume=True), world, monkeypatch) == []
    finished_like(out, whole)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_while_it_puts_the_parts_together(model, whole, tmp_path, monkeypatch, world):
    out = tmp_path / "r.tsv"
    unlink = Path.unlink

    def end(path: Path, **named) -> None:
        if ".part-" in path.name:
            raise Ended
        unlink(path, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", end)
        assert len(certify_together(options(model, out), 2, patch)) >= 1
    assert len(parts_of(out)) == 2
    assert certify_together(options(model, out, resume=True), world, monkeypatch) == []
    finished_like(out, whole)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_before_its_protocol_was_written(model, whole, tmp_path, monkeypatch, world):
    out = tmp_path / "r.tsv"
    out.touch()
    assert certify_together(options(model, out, resume=True), world, monkeypatch) == []
    finished_like(out, whole)


@pytest.mark.slow
def test_fifty_writes_torn_at_random_bytes_lose_nothing(model, whole, tmp_path, monkeypatch):
    """A simulation of what real kills hardly ever hit: a write ends at a random byte, and the run with it. 1 to 3 ranks."""
    out, source = tmp_path / "r.tsv", random.Random(4)
    length = {line.split("\t")[0]: len(line) + 1 for line in whole.read_text().splitlines()[1:]}
    for kills in range(50):
        missing = sum(length[index] for index in length.keys() - decided(out)) if out.parent.exists() else 0
        with monkeypatch.context() as patch:
            kill_after(source.randrange(max(1, min(missing, 3 * missing // (50 - kills)))), patch)
            world = source.choice((1, 1, 2, 3))
            assert certify_together(options(model, out, resume=True), world, patch), "it ended before it was killed"
    assert decided(out) != length.keys()
    certify_together(options(model, out, resume=True), 1, monkeypatch)
    finished_like(out, whole)


# --- shards ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)], ids=str)
def test_shards_in_any_order_make_the_same_file(model, whole, tmp_path, order):
    out = tmp_path / "r.tsv"
    for number in order:
        certify(options(model, out, shard=(number, 3)), Silent())
    assert len(parts_of(out)) == 3
    assert not out.exists()
    seen = read_results(out)
    assert [str(index) for index in seen.idx] == [row[0] for row in rows(whole)]
    assert "3 parts" in seen.notes[0]
    assert len(seen.notes) == 1
    assert read_results(parts_of(out)[0]).idx.tolist() == seen.idx.tolist()
    shown = CliRunner().invoke(app, ["compare", str(out), str(whole), "--format", "csv"])
    assert shown.exit_code == 0, shown.output

    tally = certify(options(model, out, resume=True), Silent())
    assert tally.samples == 0
    assert tally.images == IMAGES
    finished_like(out, whole)


def test_a_shard_that_is_missing_is_done_by_whoever_puts_them_together(model, whole, tmp_path, monkeypatch):
    out, warnings = tmp_path / "r.tsv", []
    monkeypatch.setattr(Silent, "warn", lambda progress, text: warnings.append(text))
    certify(options(model, out, shard=(2, 3)), Silent())
    assert warnings == []
    assert "missing shards: 1/3, 3/3; their images are left out" in read_results(out).notes[1]
    assert certify_together(options(model, out, resume=True), 2, monkeypatch) == []
    assert "missing shards: 1/3, 3/3; their images are certified now" in warnings[0]
    finished_like(out, whole)


@pytest.mark.parametrize("world", [1, 2])
def test_parts_whose_protocol_is_lost_are_not_put_together(model, tmp_path, monkeypatch, world):
    out = tmp_path / "r.tsv"
    certify(options(model, out, shard=(1, 2)), Silent())
    protocol_path(out).unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    errors = certify_together(options(model, out, resume=True), world, monkeypatch)
    assert any(isinstance(error, InputError) and "no protocol beside it" in error.message for error in errors)
    errors = certify_together(options(model, out, shard=(2, 2)), world, monkeypatch)
    assert any(isinstance(error, InputError) and "no protocol beside it" in error.message for error in errors)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("world", [1, 2])
def test_a_shard_that_finds_nothing_to_do_leaves_no_part(model, whole, tmp_path, monkeypatch, world):
    out = tmp_path / "r.tsv"
    certify(options(model, out), Silent())
    assert certify_together(options(model, out, shard=(1, 2), resume=True), world, monkeypatch) == []
    finished_like(out, whole)
    assert read_results(out).notes == ()


def test_shards_that_extend_a_result_are_not_missed_where_they_have_nothing_to_do(model, whole, tmp_path):
    out = tmp_path / "r.tsv"
    certify(options(model, out, max=IMAGES - 1), Silent())
    for number in (1, 2):
        certify(options(model, out, shard=(number, 2), resume=True), Silent())
    assert [path.name for path in parts_of(out)] == ["r.tsv.part-shard-2-of-2"]
    seen = read_results(out)
    assert len(seen.idx) == IMAGES
    assert len(seen.notes) == 1
    assert "1 part is not merged yet" in seen.notes[0]
    certify(options(model, out, resume=True), Silent())
    finished_like(out, whole)


def test_a_shard_is_resumed_and_may_have_ranks_of_its_own(model, whole, tmp_path, monkeypatch):
    out = tmp_path / "r.tsv"
    with monkeypatch.context() as patch:
        kill_after(400, patch)
        certify_together(options(model, out, shard=(1, 2)), 2, patch)
    with pytest.raises(InputError, match="already exists"):
        certify(options(model, out, shard=(1, 2)), Silent())
    certify(options(model, out, shard=(1, 2), resume=True), Silent())
    certify(options(model, out, shard=(2, 2)), Silent())
    assert len(decided(out)) == IMAGES
    certify(options(model, out, resume=True), Silent())
    finished_like(out, whole)


def test_a_shard_of_another_protocol_is_refused(model, tmp_path):
    out = tmp_path / "r.tsv"
    certify(options(model, out, shard=(1, 2)), Silent())
    other = {"name": "cohen", "n": 101, "n0": 20, "alpha": 0.01}
    with pytest.raises(InputError, match="n was 100, is now 101"):
        certify(options(model, out, shard=(2, 2), certifier=other), Silent())
    assert len(parts_of(out)) == 1


def test_a_shard_beside_another_with_a_longer_number_begins(model, tmp_path):
    out = tmp_path / "r.tsv"
    certify(options(model, out, shard=(1, 30)), Silent())
    certify(options(model, out, shard=(1, 3)), Silent())
    assert len(parts_of(out)) == 2


@pytest.mark.parametrize(
    ("shard", "said"),
    [
        ("4/3", "--shard is 4/3, but must be from 1/3 to 3/3"),
        ("0/3", "--shard is 0/3, but must be from 1/3 to 3/3"),
        ("x", "--shard is 'x', but must be K/N"),
        ("1/", "--shard is '1/', but must be K/N"),
        ("-1/3", "--shard is '-1/3', but must be K/N"),
        ("5/5", "--shard 5/5 has no image to certify"),
    ],
)
def test_shards_that_cannot_be_are_refused(model, tmp_path, shard, said):
    out = tmp_path / "r.tsv"
    done = CliRunner().invoke(app, ["certify", str(model), "--out", str(out), "--max", "4", f"--shard={shard}", "--n", "100"])
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
    assert list(tmp_path.iterdir()) == []


# --- real processes, really killed -------------------------------------------------------------------------------------------

PATIENCE = 90.0
MANY = {"skip": 3, "max": 120}
LONG = {"certifier": {"name": "cohen", "n": 2000, "n0": 50, "alpha": 0.01}}
CERTIFY = [
    "--n",
    "2000",
    "--n0",
    "50",
    "--alpha",
    "0.01",
    "--skip",
    "9",
    "--max",
    str(IMAGES),
    "--batch",
    "64",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def long(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `whole`, of the run that real processes do."""
    out = tmp_path_factory.mktemp("long") / "results.tsv"
    certify(options(model, out, **LONG), Silent())
    return out


def start(folder: Path, *command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        cwd=folder,
    )


def ranks(world: int) -> list[str]:
    return ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m", "--", "rscli"]


@pytest.fixture
def ends() -> Iterator[Callable[[subprocess.Popen[str]], str]]:
    """Waits for processes and says what they said; in any case they are gone when the test is over."""
    begun: list[subprocess.Popen[str]] = []

    def end(process: subprocess.Popen[str]) -> str:
        begun.append(process)
        end.out, err = process.communicate(timeout=PATIENCE)
        return err

    end.begun = begun
    yield end
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE
    while not ready() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    assert process.poll() is None, f"it ended before it could be killed:\n{process.communicate()[1]}"


@pytest.fixture(scope="module")
def many(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `whole`, of enough images for fifty kills."""
    out = tmp_path_factory.mktemp("many") / "results.tsv"
    certify(options(model, out, **MANY), Silent())
    return out


@POSIX
@pytest.mark.slow
def test_fifty_kills_at_random_moments_lose_nothing(model, many, tmp_path):
    """Runs of one or two processes by lot. Should a run be through before it was killed fifty times, another begins."""
    source, moments, images = random.Random(4), Counter(), MANY["max"]
    out = tmp_path / "0" / "r.tsv"
    while (kills := moments.total()) < 50:
        before = decided(out)
        aim = source.randrange(max(1, min(images - len(before), 2 * (images - len(before)) // (50 - kills))))
        world, store = source.choice((1, 1, 2)), tmp_path / f"store-{kills}-{out.parent.name}"
        chosen = options(model, out, resume=True, **MANY)
        killed = kill(chosen, world, store, source, *((ROW, aim, 0.02) if aim else (BEGUN, 1, 0.2)))
        assert killed.codes == [-signal.SIGKILL] * world
        after = decided(out)
        assert before <= after
        assert killed.rows <= len(after) - len(before) <= killed.rows + world, "a row that was written is lost, or one too many"
        assert written(out) <= written(many)
        if killed.finished:
            finished_like(out, many)
            out = tmp_path / str(kills) / "r.tsv"
        else:
            moments[killed.moment] += 1
    assert moments["before the first row"] > 0
    assert moments["between rows"] > 0
    certify(options(model, out, resume=True, **MANY), Silent())
    finished_like(out, many)


@POSIX
@pytest.mark.slow
def test_kills_while_parts_are_put_together_lose_nothing(model, whole, tmp_path):
    source, hit = random.Random(5), 0
    for number in (1, 2, 3):
        certify(options(model, tmp_path / "parts" / "r.tsv", shard=(number, 3)), Silent())
    for number in range(12):
        out = shutil.copytree(tmp_path / "parts", tmp_path / str(number)) / "r.tsv"
        chosen, world = options(model, out, resume=True), source.choice((1, 2))
        killed = kill(chosen, world, tmp_path / f"store-{number}", source, TOGETHER, 1, 4 * STEP_SECONDS)
        assert killed.codes == [-signal.SIGKILL] * world
        hit += not killed.finished
        assert written(out) == written(whole)
        certify(chosen, Silent())
        finished_like(out, whole)
    assert hit > 0


@POSIX
@pytest.mark.slow
def test_torchrun_writes_the_file_of_one_process_though_a_rank_was_killed(model, long, tmp_path, ends):
    out = tmp_path / "r.tsv"
    run = [*ranks(2), "certify", str(model), *CERTIFY, "--out", str(out)]
    process = start(tmp_path, *run)
    ends.begun.append(process)
    wait_for(lambda: len(decided(out)) >= 8, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], stdout=subprocess.PIPE, text=True).stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    ends(process)
    assert process.returncode != 0
    assert len(parts_of(out)) == 2
    assert 8 <= len(decided(out)) < IMAGES

    process = start(tmp_path, *run, "--resume", "--batch", "48", "--json")
    said = ends(process)
    assert process.returncode == 0, said
    assert said.count("batch was 64, is now 48") == 1, "one process speaks for all"
    assert json.loads(ends.out)["images"] == IMAGES
    finished_like(out, long)


@POSIX
@pytest.mark.slow
def test_torchrun_starts_them_again_after_one_has_died(model, long, tmp_path, ends):
    """The counters of the first attempt are none of the second's, though torchrun's store is the same."""
    out = tmp_path / "r.tsv"
    run = [*ranks(2), "certify", str(model), *CERTIFY, "--out", str(out), "--resume"]
    run.insert(1, "--max-restarts=1")
    process = start(tmp_path, *run)
    ends.begun.append(process)
    wait_for(lambda: len(decided(out)) >= 8, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], stdout=subprocess.PIPE, text=True).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    said = ends(process)
    assert process.returncode == 0, said
    finished_like(out, long)
