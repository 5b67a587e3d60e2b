"""Installed packages that are damaged, end the process, or print: whatever they do, the commands go on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from importlib import metadata
from itertools import product
from pathlib import Path

import pytest

from rscli import distributions, registry
from rscli.errors import PluginError
from rscli.plugin_trial import descriptions
from rscli.registry import Entry, Registry
from support import process

FILES = ("entry_points.txt", "METADATA", "RECORD", "top_level.txt", "")
DAMAGES = ("missing", "empty", "latin-1", "binary", "no-equals", "duplicated", "huge")
NAMES = ("other", "rscli")
CASES = list(product(NAMES, FILES, DAMAGES))
HARMLESS = {"RECORD", "top_level.txt"}
PLUGIN = "[rscli.losses]\nown = theirs:Own\n"

BEHAVIOURS = {
    "exits": ("import os\nos._exit(0)\n", "exit code 0"),
    "dies": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", "SIGKILL"),
    "quits": ("raise SystemExit(3)\n", "SystemExit: 3"),
    "interrupts": ("raise KeyboardInterrupt\n", "KeyboardInterrupt"),
    "base": ("class Mine(BaseException): pass\nraise Mine('no')\n", "Mine: no"),
    "closes": ("raise GeneratorExit\n", "GeneratorExit"),
    "iterates": ("raise StopIteration\n", "StopIteration"),
    "recurses": ("def f(): return f()\nf()\n", "RecursionError"),
    "aborts": ("import os\nos.abort()\n", "SIGABRT"),
    "speechless": ("class Odd(Exception):\n    def __str__(self): return 1 / 0\nraise Odd\n", "Odd"),
    "error": ("raise ValueError('bad')\n", "ValueError: bad"),
    "writes": ("import os\nos.write(1, b'{]\\n')\nraise ValueError('after writing')\n", "after writing"),
}
LOUD = '''
print("on import")
from rscli.api import NoisyLoss, Dataset


class Loud(NoisyLoss):
    """Prints."""

    def terms(self, logits, labels):
        print("in terms")
        from torch.nn.functional import cross_entropy

        return {"loss": cross_entropy(logits[0], labels)}


class Data(Dataset):
    """Prints, too."""

    def check(self, root):
        print("in check")
        return []
'''


def dist(folder: Path, name: str, version: str, points: str = PLUGIN) -> Path:
    """The metadata of an installed package."""
    made = folder / f"{name}-{version}.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (made / "entry_points.txt").write_text(points)
    (made / "RECORD").write_text(f"{made.name}/METADATA,,\n")
    (made / "top_level.txt").write_text(f"{name}\n")
    return made


def damage(made: Path, file: str, kind: str) -> None:
    """Damages one file, or (without a name) all of the folder."""
    content = {
        "empty": b"",
        "latin-1": b"[a]\nb = caf\xe9\n",
        "binary": bytes(range(256)) * 8,
        "no-equals": b"[console_scripts]\nother\n",
        "huge": b"[a]\n" + b"x = y:z\n" * 700_000,
    }
    if file:
        if kind == "missing":
            (made / file).unlink()
        elif kind == "duplicated":
            (made / file).write_bytes((made / file).read_bytes() * 2)
        else:
            (made / file).write_bytes(content[kind])
        return
    if kind == "duplicated":
        twin = made.with_name(made.name.replace("0.0.9", "0.0.8"))
        twin.mkdir()
        for each in made.iterdir():
            (twin / each.name).write_bytes(each.read_bytes().replace(b"0.0.9", b"0.0.8"))
        return
    for each in made.iterdir():
        each.unlink()
    if kind == "empty":
        return
    made.rmdir()
    if kind != "missing":
        made.write_bytes(content[kind])


def copied(folder: Path, name: str) -> Path:
    """The metadata of a foreign package, or of another copy of rscli, in a folder that Python looks into first."""
    points = metadata.distribution("rscli").read_text("entry_points.txt") if name == "rscli" else PLUGIN
    return dist(folder, name, "0.0.9", points or "")


def identify(case: tuple[str, str, str]) -> str:
    return "-".join((case[0], case[1] or "folder", case[2]))


@pytest.mark.parametrize("case", CASES, ids=identify)
def test_a_damaged_package_harms_no_other(case, tmp_path, monkeypatch):
    name, file, kind = case
    damage(copied(tmp_path, name), file, kind)
    whole = dist(tmp_path / "later", "whole", "2.0", "[rscli.losses]\nwhole = whole:Whole\n")
    path = [str(tmp_path), str(whole.parent), *sys.path]
    read = distributions.read(metadata.distributions(path=path))
    monkeypatch.setattr(registry, "environment", lambda: read)
    found = registry.installed.__wrapped__()
    assert found.find("losses", "whole")[0].version == "2.0"
    assert found.find("losses", "gaussian")[0].package == "rscli"
    assert found.default("noises") == "gaussian"
    if file in HARMLESS:
        assert not any("0.0.9" in where for where in read.broken)
    elif file and kind in ("latin-1", "binary", "huge"):
        assert any("0.0.9" in where for where in read.broken)


SLOW = [("other", "entry_points.txt", kind) for kind in ("latin-1", "no-equals")]
SLOW += [("other", "METADATA", "empty"), ("rscli", "", "empty"), ("rscli", "entry_points.txt", "no-equals")]
COMMANDS = (["plugins"], ["presets"], ["doctor"], ["train", "--preset", "digits-gaussian-0.25", "--dry-run"])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=identify)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_commands_go_on_beside_a_damaged_package(case, command, tmp_path):
    made = copied(tmp_path, case[0])
    damage(made, *case[1:])
    done = process(*command, "--json", cwd=tmp_path, path=[tmp_path])
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
    if command[0] in ("plugins", "doctor"):
        assert made.name in done.stdout


@pytest.mark.parametrize("name", ["~scli-0.0.9.dist-info", "~-cli-0.0.9.dist-info"])
def test_what_pip_leaves_behind_is_ignored(name, tmp_path):
    copied(tmp_path, "rscli").rename(tmp_path / name)
    read = distributions.read(metadata.distributions(path=[str(tmp_path)]))
    assert (read.distributions, read.problems) == ((), ())


def test_of_two_copies_in_one_folder_the_recorded_then_the_newest_counts(tmp_path):
    for version in ("1.9", "1.10", "2.0"):
        dist(tmp_path, "Their_Own" if version == "1.9" else "their.own", version)
    (tmp_path / "their.own-2.0.dist-info" / "RECORD").unlink()
    read = distributions.read(metadata.distributions(path=[str(tmp_path)]))
    assert [one.version for one in read.distributions] == ["1.10"]
    assert len(read.problems) == 2
    for problem in read.problems:
        assert Path(problem.where).is_dir()
        assert problem.where in problem.hint


def test_the_advice_for_a_name_that_is_there_twice_can_be_followed():
    def made(package: str, target: str = "a:B") -> Entry:
        return Entry("losses", "good", package, "1", target)

    two = Registry([made("one"), made("two")])
    with pytest.raises(PluginError) as caught:
        two.find("losses", "good")
    choices = caught.value.hint.removeprefix("Write ").removesuffix(".").split(" or ")
    assert {two.find("losses", choice)[0].package for choice in choices} == {"one", "two"}
    with pytest.raises(PluginError) as caught:
        Registry([made("one"), made("One", "c:D")]).find("losses", "good")
    assert "Install one again" in caught.value.hint or "Install One again" in caught.value.hint


def modules(folder: Path, texts: dict[str, str]) -> list[Entry]:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    return [Entry("losses", name, "theirs", "1", f"{name}:Loud") for name in texts]


def test_whatever_an_import_does_the_listing_goes_on(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    texts = {f"trial_{name}": text for name, (text, _) in BEHAVIOURS.items()}
    told = descriptions(modules(tmp_path, {**texts, "trial_good": LOUD}))
    assert len(told) == len(BEHAVIOURS) + 1
    for entry, answer in told.items():
        if entry.name == "trial_good":
            assert answer == "Prints"
        else:
            assert isinstance(answer, PluginError)
            assert BEHAVIOURS[entry.name.removeprefix("trial_")][1] in answer.message
            assert "theirs 1" in answer.message
    assert not any(name.startswith("trial_") for name in sys.modules)


def test_an_import_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    found = modules(tmp_path, {"trial_hangs": "import time\ntime.sleep(60)\n", "trial_fine": LOUD})
    told = {entry.name: answer for entry, answer in descriptions(found, seconds=6).items()}
    assert "more than 6 seconds" in told["trial_hangs"].message
    assert told["trial_fine"] == "Prints"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_a_plugin_leaves_behind_is_not_waited_for(tmp_path, monkeypatch):
    """It holds the pipe of the child open, which has ended long ago."""
    monkeypatch.syspath_prepend(str(tmp_path))
    forking = "import os, time\nif os.fork() == 0:\n    time.sleep(40)\n    os._exit(0)\nos._exit(3)\n"
    began = time.monotonic()
    (answer,) = descriptions(modules(tmp_path, {"trial_forks": forking}), seconds=4).values()
    assert time.monotonic() - began < 30
    assert "exit code 3" in answer.message


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    ["plugins"], ["plugins", "info", "losses", "loud"], ["presets"], ["doctor"],
    ["train", "--preset", "digits-gaussian-0.25", "--set", "loss.name=loud", "--set", "epochs=1", "--out", "run"],
], ids=lambda command: " ".join(command[:2]))  # fmt: skip
def test_what_plugins_print_does_not_reach_an_answer(command, tmp_path):
    modules(tmp_path, {"loud": LOUD})
    dist(tmp_path, "theirs", "1", "[rscli.losses]\nloud = loud:Loud\n[rscli.datasets]\nloud = loud:Data\n")
    done = process(*command, "--json", cwd=tmp_path, path=[tmp_path])
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
    if command[0] == "train":
        assert "in terms" in done.stderr


def test_only_answers_reach_stdout_while_a_command_runs(capsys):
    from rscli.cli.output import emit_json
    from rscli.cli.streams import diverted

    with contextlib.redirect_stderr(io.StringIO()) as messages, diverted():
        print("noise")
        emit_json([1])
    assert json.loads(capsys.readouterr().out) == [1]
    assert messages.getvalue() == "noise\n"
