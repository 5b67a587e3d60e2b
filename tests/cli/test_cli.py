"""The command line as its user meets it: help, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rscli.cli.app import app
from support import ROOT

COMMANDS = [
    "train", "runs", "certify", "predict", "compare", "ensemble", "doctor", "import", "plugins", "plugins info", "presets",
    "presets show",
]  # fmt: skip
QUICK = ["--set", "epochs=1", "--set", "batch=64", "--set", "optimizer.lr=0.05", "--device", "cpu", "--workers", "0"]
ANSI = re.compile(r"\x1b\[")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """Every test in an empty folder of its own: a default path must not reach the checkout."""
    monkeypatch.chdir(tmp_path)


def rscli(*arguments: object):
    """In this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def process(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """In a process of its own, both streams piped."""
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    environment |= {"OMP_NUM_THREADS": "1", **options.pop("env", {})}
    command = [sys.executable, "-m", "rscli", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, env=environment, text=True, timeout=120, **options)


def done(result):
    """The result of a command that must have worked."""
    assert result.exit_code == 0, result.output
    return result


def refused(result, *said: str, code: int = 2) -> None:
    """The command said no: with this exit code, on stderr, in words, and without a traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    for text in said:
        assert text in result.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a model and a result file."""
    folder = tmp_path_factory.mktemp("run")
    done(rscli("train", "--preset", "digits-gaussian-0.25", *QUICK, "--out", folder, "--quiet"))
    done(rscli("certify", folder, "--n", 40, "--max", 4, "--device", "cpu", "--quiet"))
    return folder


# --- help and usage ---


def test_the_list_of_commands_is_complete():
    result = done(rscli("--help"))
    shown = {line.split()[1] for line in result.stdout.splitlines() if re.match(r"[│|] [a-z]", line)}
    assert shown == {command.split()[0] for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_examples_of_itself(command):
    text = done(rscli(*command.split(), "--help")).stdout
    after = text.partition("Example")[2]
    assert f"rscli {command}" in " ".join(after.split()), "no example in the help text"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command):
    found = typer.main.get_command(app)
    for name in command.split():
        found = found.commands[name]
    assert [option.name for option in found.params if option.name != "help" and not option.help] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["nonsense"],
        ["train", "--nonsense"],
        ["certify"],
        ["certify", "m", "--n", "0"],
        ["certify", "m", "--n", "x"],
    ],
    ids=" ".join,
)
def test_wrong_usage_answers_2_and_says_nothing_on_stdout(arguments):
    refused(rscli(*arguments))


def test_a_misspelt_option_suggests_the_nearest():
    refused(rscli("train", "--presett", "x"), "--preset")


# --- what is wrong with the input ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--preset", "digits-cons-0.3"], ["no preset 'digits-cons-0.3'", "digits-cons-0.25"]),
        (["train", "--config", "nowhere.toml"], ["no configuration file nowhere.toml"]),
        (["train"], ["data.name", "arch.name", "noise.sigma", "loss.name"]),
        (["train", "--preset", "digits-cons-0.25", "--set", "epochs"], ["KEY=VALUE"]),
        (["train", "--preset", "digits-cons-0.25", "--set", "loss.lambda=3"], ["loss.lambda"]),
        (["train", "--preset", "digits-cons-0.25", "--device", "abacus"], ["abacus", "rscli doctor"]),
        (["certify", "nowhere"], ["no model file nowhere"]),
        (["compare", "nowhere.tsv"], ["no result file nowhere.tsv"]),
        (["presets", "show", "mnist-cons-0.55"], ["mnist-cons-0.5"]),
        (["plugins", "info", "losses", "consistancy"], ["Did you mean 'consistency'?"]),
        (["plugins", "info", "loss", "gaussian"], ["'loss'", "losses"]),
    ],
    ids=lambda value: "-".join(value)[:50] if isinstance(value, list) else None,
)
def test_wrong_input_answers_2_and_says_what_to_do(arguments, said):
    refused(rscli(*arguments), *said)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--certifier", "coen"], ["coen", "Did you mean 'cohen'?"]),
        (["--alpha", "0"], ["alpha = 0.0"]),
        (["--set", "loss.m=3"], ["--set loss.m is not a setting of certify"]),
        (["--set", "data.sise=3"], ["sise"]),
        (["--radii", "0.5,0.25"], ["--radii is '0.5,0.25'"]),
        (["--start", "360"], ["--start is 360"]),
        (["--split", "val"], ["val"]),
        (["--precision", "fp64"], ["fp64", "fp32, tf32, bf16"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) and value[0].startswith("--") else None,
)
def test_wrong_options_of_certify_answer_2_and_write_nothing(run, arguments, said):
    refused(rscli("certify", run, "--n", 40, "--out", "r.tsv", "--device", "cpu", *arguments), *said)
    assert list(Path().iterdir()) == []


def test_missing_mnist_says_where_it_is_looked_for_and_how_it_is_fetched():
    result = rscli("train", "--preset", "mnist-cons-0.5", "--data-dir", "pictures", "--out", "x")
    refused(result, str(Path("pictures", "MNIST")), "train-images-idx3-ubyte", "--download")
    assert not Path("x").exists()


def test_the_data_folder_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("RSCLI_DATA_DIR", "from-the-environment")
    refused(rscli("train", "--preset", "mnist-cons-0.5", "--out", "x"), "from-the-environment")
    refused(rscli("train", "--preset", "mnist-cons-0.5", "--out", "x", "--data-dir", "option"), "option")


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--preset", "digits-gaussian-0.25", *QUICK, "--out", "file/x"],
        ["train", "--preset", "digits-gaussian-0.25", *QUICK, "--out", "file"],
        ["certify", "RUN", "--n", "40", "--max", "2", "--device", "cpu", "--out", "file/x.tsv"],
        ["compare", "RUN", "--out", "file/x.md"],
        ["compare", "RUN", "--plot", "file/x.svg"],
    ],
    ids=["train-inside", "train", "certify-inside", "compare-inside", "plot-inside"],
)
def test_an_out_that_cannot_be_written_is_said_in_words(run, command):
    """A file where a folder is wanted: nobody can write there, root included."""
    Path("file").write_text("")
    refused(rscli(*(run if word == "RUN" else word for word in command)), "file")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs permissions that bind")
@pytest.mark.parametrize("command", ["train", "certify"])
def test_a_folder_without_permission_is_said_in_words(run, command):
    Path("closed").mkdir(mode=0o500)
    what = ["--preset", "digits-gaussian-0.25", *QUICK] if command == "train" else [run, "--n", 40]
    refused(rscli(command, *what, "--out", Path("closed", "x")), "closed", "Permission denied")


def test_a_run_is_not_overwritten(run):
    refused(
        rscli("train", "--preset", "digits-gaussian-0.25", *QUICK, "--out", run), "already holds a training run", "--resume"
    )
    refused(rscli("certify", run, "--n", 40, "--max", 4), "already exists", "--resume")


# --- --json, and stdout for nothing else ---


def test_train_and_certify_answer_with_json_alone():
    result = done(rscli("train", "--preset", "digits-gaussian-0.25", *QUICK, "--out", "run", "--json"))
    assert json.loads(result.stdout) == {"model": str(Path("run", "model.safetensors")), "folder": "run"}
    assert "train " in result.stderr
    result = done(rscli("certify", "run", "--n", 40, "--max", 3, "--device", "cpu", "--json"))
    assert json.loads(result.stdout)["images"] == 3
    assert "certify " in result.stderr
    assert done(rscli("certify", "run", "--n", 40, "--max", 3, "--device", "cpu", "--resume", "--quiet")).output == ""


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["plugins"], {"kind", "name", "package", "version", "description", "error"}),
        (["plugins", "info", "losses", "consistency"], {"kind", "name", "package", "version", "fields"}),
        (["presets"], {"name", "package", "version", "title", "problem"}),
        (["presets", "show", "mnist-cons-0.5"], {"name", "title", "source", "settings", "published"}),
        (["doctor"], {"versions", "devices", "plugins"}),
        (
            ["train", "--preset", "digits-cons-0.25", "--dry-run"],
            {"config", "sources", "parameters", "images", "steps_per_epoch", "chunks", "files"},
        ),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else "",
)
def test_json_answers_parse_and_stand_alone(arguments, keys):
    result = done(rscli(*arguments, "--json"))
    answer = json.loads(result.stdout)
    assert keys <= set(answer[0] if isinstance(answer, list) else answer)
    assert result.stderr == ""


def test_compare_and_predict_answer_with_json(run):
    assert json.loads(done(rscli("compare", run, "--json")).stdout)
    result = done(rscli("predict", run, ROOT / "examples" / "digits", "--n", 30, "--device", "cpu", "--json"))
    assert [json.loads(line)["n"] for line in result.stdout.splitlines()] == [30] * 4


def test_without_json_stdout_of_train_and_certify_is_empty(run):
    result = done(rscli("certify", run, "--n", 40, "--max", 3, "--device", "cpu", "--out", "r.tsv"))
    assert result.stdout == ""
    assert "r.tsv: 3 images" in result.stderr


# --- listings ---


def test_a_plugin_is_shown_with_type_default_bounds_and_meaning():
    text = done(rscli("plugins", "info", "losses", "consistency")).stdout
    (line,) = [line for line in text.splitlines() if line.startswith("lbd")]
    assert "number" in line
    assert ">= 0" in line
    fields = json.loads(done(rscli("plugins", "info", "losses", "consistency", "--json")).stdout)["fields"]
    assert {"m", "lbd", "eta", "form"} <= {field["name"] for field in fields}
    assert all(field["description"] for field in fields)
    sigma = json.loads(done(rscli("plugins", "info", "noises", "gaussian", "--json")).stdout)["fields"][0]
    assert (sigma["name"], sigma["default"], sigma["bounds"], sigma["unit"]) == (
        "sigma",
        "required",
        "> 0 and <= 1000",
        "[0, 1] pixels",
    )


def test_a_preset_is_shown_as_its_file_with_what_it_is_to_reproduce():
    text = done(rscli("presets", "show", "mnist-cons-0.5")).stdout
    assert (ROOT / "presets" / "mnist-cons-0.5.toml").read_text().strip() in text
    assert "published ACR 1.6" in text


def test_the_doctor_says_what_is_missing():
    text = done(rscli("doctor", "--data-dir", "nowhere")).stdout
    assert "there is no folder nowhere" in text
    assert "digits comes with scikit-learn" in text
    assert "cpu: " in text


# --- the dry run and the layers ---


def test_a_dry_run_writes_nothing_and_needs_no_data():
    text = done(rscli("train", "--preset", "imagenet-cons-0.5", "--dry-run", "--set", "loss.lbd=7")).stdout
    said = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "7" in said["loss.lbd"]
    assert "--set" in said["loss.lbd"]
    assert "preset imagenet-cons-0.5" in said["noise.sigma"]
    assert "default" in said["seed"]
    assert "25,557,032" in text, "the parameters of ResNet-50"
    assert "1,281,167" in text
    assert str(Path("runs", "imagenet-cons-0.5-loss.lbd=7", "seed0", "model.safetensors")) in text
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("name", ["[/red].toml", "[red].toml", f"{'long' * 60}.toml"])
def test_a_source_is_shown_as_it_is(name):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("epochs = 3\n")
    text = done(rscli("train", "--preset", "digits-cons-0.25", "--config", name, "--dry-run")).stdout
    assert [line for line in text.splitlines() if line.startswith("epochs ") and line.rstrip().endswith(name)]


def test_settings_are_layered_from_file_to_option():
    Path("mine.toml").write_text('epochs = 7\nbatch = 100\nseed = 3\n[loss]\nname = "consistency"\nlbd = 2.5\n')
    layers = ["--preset", "digits-cons-0.25", "--config", "mine.toml", "--set", "batch=50", "--seed", "9"]
    answer = json.loads(done(rscli("train", *layers, "--dry-run", "--json")).stdout)
    config, sources = answer["config"], answer["sources"]
    assert (config["epochs"], config["batch"], config["seed"]) == (7, 50, 9)
    assert (config["loss"]["lbd"], config["loss"]["eta"]) == (2.5, 0.5)
    assert [sources[key] for key in ("epochs", "batch", "seed", "loss.lbd", "loss.eta", "chunk")] == [
        "mine.toml",
        "--set",
        "--seed",
        "mine.toml",
        "preset digits-cons-0.25",
        "default",
    ]
    assert str(Path("runs", "digits-cons-0.25-epochs=7-batch=50-loss.lbd=2.5", "seed9")) in answer["files"][0]


def test_every_problem_of_a_configuration_is_said_at_once():
    sets = ["--set", "epochs=0", "--set", "noise.sigma=-1", "--set", "loss.lbdd=3"]
    refused(
        rscli("train", "--preset", "digits-cons-0.25", *sets), "3 problems", "epochs", "noise.sigma", "loss.lbdd", "loss.lbd"
    )


# --- pipes, colours, tracebacks: real processes ---


@pytest.mark.parametrize("arguments", [["plugins"], ["presets"], ["presets", "show", "mnist-cons-0.5"]], ids=" ".join)
def test_nothing_is_coloured_in_a_pipe(arguments):
    for environment in ({}, {"NO_COLOR": "1"}, {"TERM": "xterm-256color", "COLORTERM": "truecolor"}):
        result = process(*arguments, env=environment)
        assert result.returncode == 0
        assert not ANSI.search(result.stdout + result.stderr)


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("no_colour", [False, True], ids=["colour", "NO_COLOR"])
def test_a_terminal_gets_colours_unless_it_wants_none(no_colour):
    import pty

    ours, theirs = pty.openpty()
    environment = {"TERM": "xterm-256color", **({"NO_COLOR": "1"} if no_colour else {})}
    result = process("presets", "show", "nothing-like-this", env=environment, stderr=theirs)
    os.close(theirs)
    said = os.read(ours, 100_000).decode()
    os.close(ours)
    assert result.returncode == 2
    assert "there is no preset" in said
    assert ("\x1b[31m" in said or "\x1b[1;31m" in said) != no_colour


@pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
@pytest.mark.parametrize(
    "arguments",
    [["presets"], ["presets", "--json"], ["plugins"], ["plugins", "info", "losses", "gaussian"]],
    ids=" ".join,
)
def test_a_pipe_that_nobody_reads_is_no_error(arguments):
    """What `| head -1` leaves behind, at its worst: closed before the first byte."""
    ours, theirs = os.pipe()
    os.close(ours)
    result = process(*arguments, stdout=theirs)
    os.close(theirs)
    assert result.stderr == ""
    assert result.returncode == 0


@pytest.mark.skipif(os.name != "posix" or shutil.which("head") is None, reason="needs a POSIX shell")
def test_head_takes_a_line_and_nobody_complains():
    command = f"{sys.executable} -m rscli presets --json | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[\n", "")


@pytest.mark.parametrize("how", [["--debug"], []], ids=["--debug", "RSCLI_DEBUG"])
def test_debug_shows_the_traceback(how):
    result = process(*how, "presets", "show", "nothing", env={} if how else {"RSCLI_DEBUG": "1"})
    assert "Traceback" in result.stderr
    assert "there is no preset 'nothing'" in result.stderr
    assert result.returncode != 0


def test_progress_without_a_terminal_is_plain_lines(run):
    result = process("certify", run, "--n", "40", "--max", "3", "--device", "cpu", "--out", "r.tsv")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^certify 3/3 image, abstained \d, ", result.stderr, re.M)
    assert not ANSI.search(result.stderr)
    assert "\r" not in result.stderr
    assert result.stdout == ""
