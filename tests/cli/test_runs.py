"""`rscli runs`: what a run folder says of its run, whatever state it was left in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rscli.cli.app import app
from rscli.cli.train import _picture
from rscli.report.runs import look, read_log
from rscli.runtime.progress import Silent
from rscli.runtime.run_files import RunFiles
from rscli.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rscli(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def listed(*words) -> dict[str, dict]:
    answer = rscli("runs", *words, "--json")
    assert answer.exit_code == 0, answer.output
    return {run["name"]: run for run in json.loads(answer.stdout)["runs"]}


def folder(path: Path, *, lines: int = 2, epochs: int = 5, config: dict | None = None, **files: str) -> Path:
    """A run folder with a log of so many epochs, and `files` by the names that `RunFiles` gives them."""
    path.mkdir(parents=True)
    found = RunFiles(path)
    found.config.write_text(json.dumps({"config": {"epochs": epochs, **(config or {})}, "sources": {}}))
    for name, text in files.items():
        getattr(found, name).write_text(text)
    found.metrics.write_text("".join(json.dumps(line(epoch)) + "\n" for epoch in range(1, lines + 1)))
    return path


def line(epoch: int) -> dict:
    return {"epoch": epoch, "lr": 0.1, "loss": 1 / epoch, "accuracy": 0.5, "images_per_s": 100.0, "seconds": 10.0 * epoch}


def gone() -> int:
    """The number of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


# --- states ------------------------------------------------------------------------------------------------------------------


def test_finished_stopped_and_failed_runs(tmp_path):
    folder(tmp_path / "a", lines=5, model="x", checkpoint="x")
    folder(tmp_path / "b", checkpoint="x")
    folder(tmp_path / "c", lines=0)
    folder(tmp_path / "d", checkpoint="x", failed="the loss is no longer finite at epoch 3\nmore\n")
    folder(tmp_path / "e", checkpoint="x", running=f"Process {gone()} trains here. If it is gone, ...\n")
    found = {name: (run["state"], run["why"], run["epochs"]) for name, run in listed(tmp_path).items()}
    assert found["a"] == ("finished", None, 5)
    assert found["b"] == ("stopped", "--resume goes on", 2)
    assert found["c"] == ("stopped", "nothing is saved yet; --resume begins again", 0)
    assert found["d"] == ("failed", "the loss is no longer finite at epoch 3", 2)
    assert found["e"][0] == "failed"
    assert "killed, or crashed (process" in found["e"][1]
    assert "--resume goes on" in found["e"][1]


def test_a_run_is_running_while_its_process_is(tmp_path):
    path = folder(tmp_path / "a", checkpoint="x")
    with RunFolder(path).at_work(Silent()):
        run = look(path)
        assert (run.state, run.seconds_left) == ("running", 3 * 15.0)  # 3 of 5 epochs, at the mean of 10 and 20 s
        assert str(os.getpid()) in str(run.why)
        long_ago = time.time() - 10 * 86_400
        os.utime(path / "running.txt", (long_ago, long_ago))  # of another process, which had our number before us
        assert look(path).state == "failed"
    assert look(path).state == "stopped"


def test_whether_a_process_on_another_machine_runs_is_not_known(tmp_path):
    run = look(folder(tmp_path / "a", running="Process 1 on elsewhere.example trains here. If it is gone, ..."))
    assert (run.state, run.why) == ("running", "process 1 on elsewhere.example, as far as can be told from here")


def test_why_a_run_failed_is_kept_until_it_goes_on(tmp_path):
    files = RunFolder(folder(tmp_path / "a", checkpoint="x"))
    with pytest.raises(ZeroDivisionError), files.at_work(Silent()):
        1 / 0  # noqa: B018
    assert look(files.path).why == "ZeroDivisionError: division by zero"
    with files.at_work(Silent()):
        pass
    assert look(files.path).state == "stopped"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{not json", "cannot be read"),
        ("[1, 2]", "not the configuration of a run"),
        ('{"config": 3}', "not the configuration of a run"),
        ("\x00\xff" * 100, "cannot be read"),
    ],
)
def test_a_broken_folder_is_a_line(tmp_path, text, said):
    folder(tmp_path / "good")
    bad = folder(tmp_path / "bad", lines=1)
    (bad / "config.json").write_bytes(text.encode("latin-1"))
    found = listed(tmp_path)
    assert (found["bad"]["state"], found["good"]["state"]) == ("broken", "stopped")
    assert said in found["bad"]["why"]
    assert "broken" in rscli("runs", tmp_path).stdout


def test_a_log_without_a_configuration_is_broken_and_other_folders_are_none(tmp_path):
    lost = folder(tmp_path / "lost")
    (lost / "config.json").unlink()
    other = tmp_path / "of-another-library"
    other.mkdir()
    (other / "config.json").write_text('{"architectures": ["Bert"]}')
    (other / "model.safetensors").write_text("x")
    (tmp_path / ".hidden").mkdir()
    folder(tmp_path / ".hidden" / "run")
    assert {name: run["state"] for name, run in listed(tmp_path).items()} == {"lost": "broken"}


# --- figures -----------------------------------------------------------------------------------------------------------------


def test_lines_that_are_none_are_left_out(tmp_path):
    path = folder(tmp_path / "a", lines=0)
    texts = [
        json.dumps(line(1)),
        "{torn",
        "3",
        '{"epoch": "2"}',
        '{"epoch": true}',
        "[" * 5000,
        json.dumps(line(2)),
        '{"epoch": 3, "lo',
    ]
    (path / "metrics.jsonl").write_bytes("\n".join(texts).encode() + b"\xff")
    assert [each["epoch"] for each in read_log(path, {})] == [1, 2]


def test_the_log_is_found_under_the_name_that_the_configuration_gives_it(tmp_path):
    path = folder(
        tmp_path / "a", lines=0, config={"loggers": {"lines": {"file": "mine.jsonl"}, "other": {"file": "../x.jsonl"}}}
    )
    (path / "metrics.jsonl").rename(path / "mine.jsonl")
    (path / "mine.jsonl").write_text(json.dumps(line(4)) + "\n")
    (tmp_path / "x.jsonl").write_text(json.dumps(line(9)) + "\n")
    assert look(path).epochs == 4


def test_the_figures_are_those_of_the_last_epoch_and_of_the_last_probe(tmp_path):
    path = folder(tmp_path / "a", lines=0, checkpoint="x")
    rows = [{**line(1), "certified_0.25": 0.5, "certified_1.0": 0.25}, {**line(2), "certified_0.5": float("nan")}, line(3)]
    rows[0]["certified_10"] = 0.125
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1] + rows[2:]))
    run = listed(tmp_path)["a"]
    assert (run["loss"], run["accuracy"], run["images_per_s"]) == (1 / 3, 0.5, 100)
    assert run["certified"] == {"0.25": 0.5, "1.0": 0.25, "10": 0.125}
    assert list(run["certified"]) == ["0.25", "1.0", "10"]
    assert run["certified_epoch"] == 1
    text = rscli("runs", tmp_path).stdout
    assert "50.0% at 0.25, 25.0% at 1.0, 12.5% at 10" in text
    assert "3/5" in text


def test_order_and_names(tmp_path):
    for seed in (10, 2, 1):
        folder(tmp_path / "runs" / "x" / f"seed{seed}")
    names = [str(Path("x", f"seed{seed}")) for seed in (1, 2, 10)]
    assert list(listed()) == names  # runs is where they are sought
    assert list(listed("runs/x/seed1")) == ["seed1"]
    assert list(listed("runs/x/seed2", "runs/x/seed1")) == [str(Path("runs", "x", f"seed{seed}")) for seed in (1, 2)]


def test_no_runs_and_no_folder(tmp_path):
    answer = rscli("runs", tmp_path)
    assert (answer.exit_code, answer.stdout) == (0, "")
    assert "no runs below" in answer.stderr
    assert rscli("runs", tmp_path, "--json").stdout.split() == ["{", '"runs":', "[]", "}"]
    for name in ("nowhere", "file"):
        (tmp_path / "file").write_text("")
        answer = rscli("runs", name)
        assert answer.exit_code == 2
        assert name in answer.stderr


def test_pictures_of_several_runs(tmp_path):
    folder(tmp_path / "a")
    folder(tmp_path / "b", lines=1)
    folder(tmp_path / "c", lines=0)
    for name in ("x.png", "x.svg"):
        assert rscli("runs", tmp_path, "--plot", name).exit_code == 0
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")
    drawn = Path("x.svg").read_text()
    assert ">a</text>" in drawn
    assert ">b</text>" in drawn
    assert ">c</text>" not in drawn
    answer = rscli("runs", tmp_path / "c", "--plot", "y.png")
    assert answer.exit_code == 2
    assert "nothing to draw" in answer.stderr
    assert rscli("runs", tmp_path, "--plot", "y.gif").exit_code == 2
    assert not Path("y.png").exists()


def test_the_listing_needs_no_torch(tmp_path):
    folder(tmp_path / "a")
    code = "import sys\nfrom rscli.cli.app import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, "runs", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "AssertionError" not in done.stderr


def test_only_the_first_process_draws_a_finished_run(tmp_path, monkeypatch):
    """To another one, on another machine, a file that the first has just written may not be there yet."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    (tmp_path / "curves.png").touch()
    _picture(tmp_path, Silent())
