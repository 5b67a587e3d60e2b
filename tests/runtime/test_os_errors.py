"""What the operating system refuses: every error at every command is one message; files are written through links."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rscli.cli.commands import app
from rscli.config.files import read_settings
from rscli.data.transforms import read_image
from rscli.errors import InputError, RscliError
from rscli.models.modelfile import read_card
from rscli.results.reader import read_results
from rscli.results.writer import ResultWriter
from rscli.runtime.files import FULL, _token, explained, read_json, replacing, write_answer, write_text
from rscli.runtime.guard import calling, described
from rscli.training.run_folder import RunFolder
from rscli_core.datasets.imagefolder import ImageFolder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links, pipes and modes as POSIX has them")

NUMBERS = [
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE, errno.ENOTDIR, errno.EIO, errno.EROFS),
    *(errno.EMFILE, errno.ENOSPC, errno.EDQUOT, errno.EISDIR, errno.ETIMEDOUT, errno.ENODEV),
]
COMMANDS = {
    "predict": ["predict", "PATH", "x.png"],
    "predict images": ["predict", "model.safetensors", "PATH"],
    "certify": ["certify", "PATH"],
    "compare": ["compare", "PATH"],
    "import": ["import", "PATH", "--dataset", "digits", "--sigma", "0.5"],
    "config": ["train", "--preset", "digits-gaussian-0.25", "--config", "PATH", "--dry-run"],
    "train out": ["train", "--preset", "digits-gaussian-0.25", "--out", "PATH"],
}
ROWS = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t0\t0\t0.5\t1\t0:00:01\n"


def refusing(monkeypatch, name, number):
    """Whatever asks the system for a path called `name` is answered with an error (we may be root: modes refuse nothing)."""
    for function in ("stat", "open"):
        real = getattr(Path, function)

        def refuse(path, *args, _real=real, **options):
            if name in path.parts:
                raise OSError(number, os.strerror(number), str(path))
            return _real(path, *args, **options)

        monkeypatch.setattr(Path, function, refuse)


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_refusal_is_one_message(command, number, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refusing(monkeypatch, "refused", number)
    arguments = [each.replace("PATH", "refused") for each in COMMANDS[command]]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code in (1, 2), done.exception
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output
    assert "refused" in done.stderr or "model.safetensors" in done.stderr
    assert not any(files for _, _, files in os.walk(tmp_path))


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
def test_an_error_names_path_reason_and_a_way_out(number):
    error = explained(OSError(number, os.strerror(number), "some/path"))
    assert "some/path" in error.message
    assert os.strerror(number) in error.message
    assert error.hint
    assert error.exit_code == (1 if number in FULL else 2)
    assert isinstance(error, InputError) != (number in FULL)


@pytest.mark.parametrize(
    "read", [read_results, read_settings, read_card, lambda p: read_json(p, "file"), lambda p: read_image(p, 3)]
)
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_only_files_are_read(read, kind, tmp_path):
    """A pipe that nobody writes to would be waited for without end."""
    path = tmp_path / "x.png"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(InputError):
        read(path)


def test_an_unreadable_checkpoint_is_not_to_be_removed(monkeypatch, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"x")
    refusing(monkeypatch, "checkpoint.pt", errno.EACCES)
    with pytest.raises(InputError, match="Permission denied") as found:
        RunFolder(tmp_path).load()
    assert "emove" not in str(found.value)


# --- writing ---


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_file_is_written(there, tmp_path):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk/t", tmp_path / "t"
    if there:
        target.write_text("old")
    link.symlink_to("disk/t")
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "t", "t"]


def test_a_result_is_begun_through_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "r.tsv").symlink_to("disk/r.tsv")
    with ResultWriter.create(tmp_path / "r.tsv", {"format": 1}) as writer:
        writer.finish()
    assert (tmp_path / "r.tsv").is_symlink()
    assert (tmp_path / "disk/r.tsv").is_file()


def test_no_empty_result_stays_behind(monkeypatch, tmp_path):
    monkeypatch.setattr("rscli.results.protocol.write_text", lambda *_: (_ for _ in ()).throw(InputError("refused")))
    with pytest.raises(InputError, match="refused"):
        ResultWriter.create(tmp_path / "r.tsv", {"format": 1})
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027])
def test_modes_follow_the_umask_and_replaced_files_keep_theirs(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "new", "x")
        write_text(tmp_path / "old", "x")
        (tmp_path / "old").chmod(0o640)
        write_text(tmp_path / "old", "y")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o640


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EINVAL], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["chmod", "fsync"])
def test_a_file_system_without_modes_is_written_to(call, number, monkeypatch, tmp_path):
    def refuse(*_args, **_options):
        raise OSError(number, os.strerror(number))

    (tmp_path / "t").write_text("old")
    (tmp_path / "t").chmod(0o600)
    monkeypatch.setattr(os, call, refuse)
    write_text(tmp_path / "t", "new")
    with ResultWriter.create(tmp_path / "r.tsv", {"format": 1}) as writer:
        writer.finish()
    assert (tmp_path / "t").read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_disk_that_fails_to_sync_is_an_error(number, monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    (tmp_path / "t").write_text("old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RscliError):
        write_text(tmp_path / "t", "new")
    assert (tmp_path / "t").read_text() == "old"
    assert len([*tmp_path.iterdir()]) == 1


def test_a_device_and_a_pipe_are_written_to_and_never_replaced(tmp_path):
    device = Path("/dev/null").stat().st_mode
    write_answer(Path("/dev/null"), "x")
    assert Path("/dev/null").stat().st_mode == device
    with pytest.raises(InputError, match="is a device"), replacing(Path("/dev/null")):
        pass


@pytest.mark.parametrize("where", ["pipe", "file"])
def test_compare_writes_to_dev_stdout(where, tmp_path):
    (tmp_path / "r.tsv").write_text(ROWS)
    link = Path("/dev/stdout").readlink()
    command = [sys.executable, "-m", "rscli", "compare", "r.tsv", "--format", "csv", "--out", "/dev/stdout"]
    with (tmp_path / "out").open("w") as file:
        done = subprocess.run(command, cwd=tmp_path, stdout=file if where == "file" else subprocess.PIPE, timeout=60)
    text = (tmp_path / "out").read_text() if where == "file" else done.stdout.decode()
    assert done.returncode == 0
    assert text.startswith("name,")
    assert Path("/dev/stdout").readlink() == link


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, live = (tmp_path / f".t.{_token(number)}.part" for number in (ended.pid, os.getppid()))
    other, elsewhere = tmp_path / f".u.{_token(ended.pid)}.part", tmp_path / ".t.zzz00001.part"
    old = tmp_path / ".t.zzz00002.part"
    for path in (dead, live, other, elsewhere, old):
        path.touch()
    os.utime(old, (0, 0))
    write_text(tmp_path / "t", "x")
    assert sorted(tmp_path.iterdir()) == sorted([live, other, elsewhere, tmp_path / "t"])


# --- links in a circle, pipes, long names ---

CIRCLES = {
    "predict": ["predict", "loop", "loop"],
    "predict images": ["predict", "model.safetensors", "loop"],
    "certify": ["certify", "loop"],
    "compare": ["compare", "loop"],
    "compare out": ["compare", "rows.tsv", "--out", "loop"],
    "compare plot": ["compare", "rows.tsv", "--plot", "loop/p.svg"],
    "import": ["import", "loop", "--dataset", "digits", "--sigma", "0.5"],
    "config": ["train", "--preset", "digits-gaussian-0.25", "--config", "loop", "--dry-run"],
    "train out": ["train", "--preset", "digits-gaussian-0.25", "--set", "epochs=1", "--device", "cpu", "--out", "loop"],
}


@pytest.mark.parametrize("command", CIRCLES)
def test_links_in_a_circle_are_one_message(command, monkeypatch, tmp_path):
    """Real links, at every path of every command: what asks `Path.resolve` would raise a RuntimeError."""
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("pool")
    Path("pool").symlink_to("loop")
    Path("rows.tsv").write_text(ROWS)
    done = CliRunner().invoke(app, CIRCLES[command])
    assert (done.exit_code, type(done.exception)) == (2, SystemExit), done.exception
    assert "loop" in done.stderr or "model.safetensors" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "pool", "rows.tsv"]


def test_a_pipe_is_not_waited_for_unless_it_was_given_open(tmp_path):
    os.mkfifo(tmp_path / "pipe.tsv")
    with pytest.raises(InputError, match="is a pipe, not a file"):
        read_results(tmp_path / "pipe.tsv")
    script = f"printf {ROWS!r} | {sys.executable} -m rscli compare /dev/stdin --json"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr


@pytest.mark.parametrize("letter", ["a", "é", "模"])
@pytest.mark.parametrize("size", [239, 240, 241, 254, 255])
def test_the_longest_name_that_the_system_allows_is_written(letter, size, tmp_path):
    """And what a killed writer left beside it is found again, although its name had to be shortened."""
    width = len(letter.encode())
    path = tmp_path / (letter * (size // width) + "a" * (size % width))
    assert len(path.name.encode()) == size
    with pytest.raises(KeyboardInterrupt), replacing(path) as beside:  # noqa: PT012
        left = beside.name
        raise KeyboardInterrupt
    gone = left[: -len("12345678.part")] + _token(2**22 + 1) + ".part"
    (tmp_path / gone).write_text("half")
    write_text(path, "whole")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(path.name, "whole")]


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
def test_what_the_system_refuses_a_plugin_is_no_fault_of_the_plugin(number):
    plugin = ImageFolder()
    with pytest.raises(RscliError) as caught, calling(plugin, "load"):
        raise OSError(number, os.strerror(number), "/data/photos")
    assert caught.value.message == f"{described(plugin)} cannot access /data/photos: {os.strerror(number)}"
    assert caught.value.exit_code == (1 if number in FULL else 2)
    assert "author" not in (caught.value.hint or "")


REACHED = {
    **{command: [each.replace("PATH", "there") for each in arguments] for command, arguments in COMMANDS.items()},
    "compare out": ["compare", "rows.tsv", "--out", "there"],
    "compare plot": ["compare", "rows.tsv", "--plot", "there.svg"],
    "certify out": ["certify", "rows.tsv", "--out", "there"],
    "data": ["train", "--preset", "mnist-gaussian-0.5", "--data-dir", "there", "--dry-run"],
}


@pytest.mark.parametrize("command", REACHED)
def test_no_path_is_refused_before_the_boundary(command, monkeypatch, tmp_path):
    """typer would answer an unreadable path in a box of its own, without the reason and without what to do."""
    monkeypatch.chdir(tmp_path)
    for name in ("there", "there.svg", "rows.tsv"):
        Path(name).write_text(ROWS)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert "is not readable" not in " ".join(CliRunner().invoke(app, REACHED[command]).output.split())
