"""Streams that are closed, full, or read by nobody; disks without room; signals before a run has begun."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rscli.errors import InputError, RscliError
from rscli.results.shards import whole_rows
from rscli.runtime.files import replacing, writing
from rscli.runtime.signals import STOPPING

pytestmark = pytest.mark.skipif(os.name != "posix", reason="streams and signals as POSIX has them")
needs_full = pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")

QUICK = ["train", "--preset", "digits-gaussian-0.25", "--set", "epochs=1", "--device", "cpu", "--workers", "0"]
ANSWERS = [["presets"], ["presets", "--json"], ["presets", "show", "mnist-cons-0.5"], ["plugins"], ["--help"], ["--version"]]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def shell(arguments: list[str], streams: str, **options) -> subprocess.CompletedProcess[str]:
    """rscli with its standard streams as a shell would redirect them."""
    command = ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, "-m", "rscli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, **options)


# --- answers that cannot be written ---


@needs_full
@pytest.mark.parametrize("arguments", ANSWERS, ids=" ".join)
@pytest.mark.parametrize(("streams", "reason"), [(">&-", "it is closed"), (">/dev/full", "No space left on device")])
def test_an_answer_that_cannot_be_written_is_an_error_said_once(arguments, streams, reason):
    done = shell(arguments, streams)
    assert done.stderr.splitlines() == [
        f"error: cannot write the answer to stdout: {reason}",
        "Redirect stdout to a place that can be written to.",
    ]
    assert done.returncode == 1


@pytest.mark.parametrize("arguments", ANSWERS, ids=" ".join)
def test_a_reader_who_has_gone_is_no_error(arguments):
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [sys.executable, "-m", "rscli", *arguments], stdout=theirs, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=60
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("streams", ["2>&-", pytest.param("2>/dev/full", marks=needs_full)])
@pytest.mark.parametrize(("arguments", "code"), [(["presets", "show", "nope"], 2), (["presets", "--wrong"], 2)])
def test_an_error_that_cannot_be_said_keeps_its_exit_code_and_stays_off_stdout(streams, arguments, code):
    done = shell(arguments, streams)
    assert (done.returncode, done.stdout) == (code, "")


@needs_full
def test_a_run_outlives_its_log(tmp_path):
    """Progress on a full disk; and with all streams closed, what a library prints must not land in the run's files."""
    full = shell([*QUICK, "--json", "--out", "full"], "2>/dev/full", cwd=tmp_path)
    assert full.returncode == 0
    assert json.loads(full.stdout)["folder"] == "full"
    assert shell([*QUICK, "--out", "closed"], "<&- >&- 2>&-", cwd=tmp_path).returncode == 0
    assert (tmp_path / "closed/model.safetensors").read_bytes() == (tmp_path / "full/model.safetensors").read_bytes()


# --- disks without room ---


def test_a_checkpoint_without_room_is_one_message_and_nothing_half_written(tmp_path):
    """A limit on the size of files, which is a full disk that needs no mount: below a checkpoint, above the small files."""

    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = shell([*QUICK, "--quiet", "--out", "run"], "", cwd=tmp_path, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: cannot write run/checkpoint.pt: File too large",
        "Make room, and run the same command again; a run that has begun goes on with --resume.",
    ]
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "config.json",
        "environment.json",
        "failed.txt",
        "metrics.jsonl",
    ]
    assert shell([*QUICK, "--quiet", "--resume", "--out", "run"], "", cwd=tmp_path).returncode == 0
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1


@needs_full
def test_appending_to_a_full_disk_is_said_in_words():
    with pytest.raises(RscliError, match="cannot write /dev/full: No space left") as caught, writing(Path("/dev/full")):
        Path("/dev/full").write_text("x")
    assert caught.value.exit_code == 1


def test_what_was_there_before_is_kept(tmp_path):
    file = tmp_path / "file"
    file.write_text("before")
    with pytest.raises(RscliError, match="No space left"), replacing(file) as beside:  # noqa: PT012
        beside.write_text("half of it")
        raise OSError(28, "No space left on device")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "before")]


def test_a_device_is_not_replaced_and_not_read_to_its_end(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a pipe, not a file"), replacing(tmp_path / "pipe"):
        pass
    with pytest.raises(InputError, match="is not a file"):
        whole_rows(tmp_path / "pipe")
    assert [stat.S_ISFIFO(file.stat().st_mode) for file in tmp_path.iterdir()] == [True]


# --- signals before a run has begun ---

WAITING = """
import os, time
os.write(1, b"ready\\n")  # not by print: what modules print goes to stderr
time.sleep(60)
"""
SWALLOWING = """
import os, time
try:
    os.write(1, b"ready\\n")
    time.sleep(60)
except BaseException:  # as numpy and scipy do in places
    pass
"""


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), *((number, 75, "stopped: run") for number in STOPPING if number != signal.SIGINT)],
)
@pytest.mark.parametrize("module", [WAITING, SWALLOWING], ids=["waiting", "swallowing"])
def test_a_signal_while_modules_are_read_is_said_in_a_line(tmp_path, number, code, said, module):
    """`rich.table` stands for any module that takes its time: `rscli presets` reads it."""
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich/__init__.py").write_text("")
    (tmp_path / "rich/table.py").write_text(module)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", "from rscli.cli.app import main; main()", "presets"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, len(err.splitlines())) == (code, 1)
    assert err.startswith(said)


@pytest.mark.parametrize("number", [number for number in STOPPING if number != signal.SIGINT])
def test_a_signal_outside_a_run_and_outside_an_import_unwinds(tmp_path, number):
    """The file that is being written is removed, and the exit code says that the command can be given again."""
    code = f"""
import sys, time
from pathlib import Path
from rscli.cli import interrupts
from rscli.runtime.files import replacing
with interrupts.heard(), replacing(Path({str(tmp_path / "file")!r})) as beside:
    beside.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert err.startswith("stopped: run the same command")
    assert list(tmp_path.iterdir()) == []


def test_signals_that_are_ignored_stay_ignored():
    """As nohup and a shell's & have it."""
    code = """
import os, signal
from rscli.cli import interrupts
from rscli.runtime.signals import STOPPING, stop_requests
for number in STOPPING:
    signal.signal(number, signal.SIG_IGN)
with interrupts.heard():
    for number in STOPPING:
        os.kill(os.getpid(), number)
    with stop_requests() as stop:
        for number in set(STOPPING) - {signal.SIGINT, signal.SIGTERM}:
            os.kill(os.getpid(), number)
        assert not stop.requested
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_stopped_is_said_once(monkeypatch):
    from rscli.cli.app import app
    from rscli.config import presets
    from rscli.errors import Stopped

    def stop() -> None:
        raise Stopped("stopped as asked, at once", "--resume", exit_code=75)

    monkeypatch.setattr(presets, "list_presets", stop)
    done = CliRunner().invoke(app, ["presets"])
    assert (done.exit_code, done.stderr) == (75, "stopped as asked, at once\n--resume\n")
