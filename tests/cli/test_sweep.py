"""`rscli train`: folders named after what was run, seeds, sweeps, and --overwrite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rscli.cli.app import app
from rscli.config.layers import resolve
from rscli.config.run_names import LONGEST, folder_name, name_of, read_seeds, read_sweeps, value_text
from rscli.errors import InputError, RscliError, Stopped

SMALL = ["--preset", "digits-gaussian-0.25", "--device", "cpu", "--workers", "0"]
ONE = ["--set", "epochs=1", "--set", "batch=720"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*words):
    return CliRunner().invoke(app, ["train", *SMALL, *map(str, words)])


@pytest.fixture
def trained(monkeypatch):
    """Instead of training: lbd or lr and seed, and where; `raises` maps a folder's name to what happens there."""
    import rscli.training.train

    def run(resolved, options, progress):
        run.calls.append(options.out.as_posix())
        if options.out.name in run.raises:
            raise run.raises[options.out.name]
        return options.out / "model.safetensors"

    run.calls, run.raises = [], {}
    monkeypatch.setattr(rscli.training.train, "train", run)
    return run


# --- names -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "name"),
    [
        ([], "mnist-cons-0.5"),
        (["loss.lbd=5"], "mnist-cons-0.5"),  # as the preset has it
        (["loss.lbd=10", "epochs=3"], "mnist-cons-0.5-epochs=3-loss.lbd=10"),
        (["epochs=3", "loss.lbd=10.0"], "mnist-cons-0.5-epochs=3-loss.lbd=10"),
        (["loss.name=stability"], "mnist-cons-0.5-loss.name=stability"),
        (["loss.name=stability", "loss.lbd=3"], "mnist-cons-0.5-loss.name=stability-loss.lbd=3"),
        (["seed=3"], "mnist-cons-0.5"),
        (["callbacks.checkpoint.every=2", "loggers=none"], "mnist-cons-0.5"),  # these only look on
        (["schedule.milestones=[20,40]"], "mnist-cons-0.5-schedule.milestones=20,40"),
        (["arch.name=timm/resnet18"], "mnist-cons-0.5-arch.name=timm-resnet18"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_is_named_after_the_preset_and_what_departs_from_it(sets, name):
    assert name_of(resolve(preset="mnist-cons-0.5", sets=sets), "mnist-cons-0.5") == name


def test_runs_without_a_preset_are_named_after_what_they_are_about(here):
    sets = ["data.name=digits", "arch.name=lenet", "noise.sigma=0.5", "loss.name=gaussian", "optimizer.lr=0.1"]
    assert name_of(resolve(sets=sets), None) == "digits-gaussian-0.5"
    (here / "mine.toml").write_text(
        "\n".join(f"{key} = {text!r}" for key, text in (each.split("=") for each in sets[:2] + sets[3:4]))
    )
    with (here / "mine.toml").open("a") as file:
        file.write("\nnoise.sigma = 0.5\noptimizer.lr = 0.1\n")
    mine = resolve(config_file=here / "mine.toml", sets=["epochs=2"])
    assert name_of(mine, None, here / "mine.toml") == "digits-gaussian-0.5-epochs=2"


def test_a_long_name_is_cut_and_has_a_digest():
    long = "x-" + "-".join(f"loss.setting{i}={i}" for i in range(30))
    names = {folder_name(long), folder_name(long + "1")}
    assert len(names) == 2
    assert all(len(name.encode()) <= LONGEST and name.startswith("x-loss.setting0=0") for name in names)
    assert len(folder_name("ü" * 200).encode()) <= LONGEST
    assert folder_name("a/b:c d\n*") == "a-b-c-d"
    assert folder_name("../..") == "run"


def test_values_as_they_are_named():
    assert [*map(value_text, (5.0, 0.1, 1e-4, None, True, "x", (31, 61), 1e20))] == [
        "5", "0.1", "0.0001", "none", "true", "x", "31,61", "1e+20"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "seeds"), [("0,1,2", [0, 1, 2]), ("0-2", [0, 1, 2]), ("0,2,5-7", [0, 2, 5, 6, 7]), (" 4 - 4 , 1", [4, 1])]
)
def test_seeds(text, seeds):
    assert read_seeds(text) == seeds


@pytest.mark.parametrize("text", ["2-0", "0-", "-1", "0-2,1", "0-99999999999", "a", "1..3", ""])
def test_wrong_seeds(text):
    with pytest.raises(InputError, match="distinct whole numbers"):
        read_seeds(text)


def test_a_grid():
    assert read_sweeps([]) == [{}]
    assert read_sweeps(["a=1,5", "b.c=x, 'y,z'"]) == [
        {"a": "1", "b.c": "x"}, {"a": "1", "b.c": "'y,z'"}, {"a": "5", "b.c": "x"}, {"a": "5", "b.c": "'y,z'"}
    ]  # fmt: skip
    assert read_sweeps(["m=[31,61],[20,40],[]"]) == [{"m": "[31,61]"}, {"m": "[20,40]"}, {"m": "[]"}]


@pytest.mark.parametrize(
    ("sweeps", "said"),
    [
        (["loss.lbd"], "KEY=VALUE"),
        (["loss.lbd=1,,2"], "KEY=VALUE"),
        (["=1"], "KEY=VALUE"),
        (["a=1,1"], "given twice"),
        (["a=1", "a=2"], "given twice"),
        (["seed=0,1"], "--seeds 0,1"),
        ([f"{key}={','.join(map(str, range(300)))}" for key in "ab"], "90,000 runs"),
    ],
)
def test_wrong_sweeps(sweeps, said):
    with pytest.raises(InputError) as caught:
        read_sweeps(sweeps)
    assert said in str(caught.value)


# --- several runs ------------------------------------------------------------------------------------------------------------


def test_a_sweep_makes_a_folder_for_each_point_and_seed(trained):
    answer = train("--sweep", "optimizer.lr=0.1,0.05", "--set", "epochs=2", "--seeds", "0-1", "--json")
    assert answer.exit_code == 0, answer.stderr
    base = "runs/digits-gaussian-0.25-epochs=2"
    assert trained.calls == [f"{base}/optimizer.lr={lr}/seed{seed}" for lr in ("0.1", "0.05") for seed in (0, 1)]
    runs = json.loads(answer.stdout)["runs"]
    assert [run["sweep"] for run in runs] == [{"optimizer.lr": lr} for lr in ("0.1", "0.1", "0.05", "0.05")]
    assert [run["folder"] for run in runs] == trained.calls


def test_a_grid_under_out(trained):
    assert train("--sweep", "optimizer.lr=0.1,0.05", "--sweep", "epochs=2,3", "--out", "d").exit_code == 0
    assert trained.calls[0] == "d/optimizer.lr=0.1-epochs=2/seed0"
    assert len(set(trained.calls)) == 4


def test_equal_points_and_wrong_values_are_refused_before_anything_runs(trained):
    answer = train("--sweep", "optimizer.lr=0.1,1e-1")
    assert (answer.exit_code, trained.calls) == (2, [])
    assert "two runs of the sweep would go to" in answer.stderr
    answer = train("--sweep", "optimizer.lr=0.1,-1")
    assert (answer.exit_code, trained.calls) == (2, [])
    assert "optimizer.lr" in answer.stderr


def test_a_run_that_fails_does_not_keep_the_others_from_their_turn(trained):
    trained.raises["seed1"] = RscliError("the loss is no longer finite")
    answer = train("--seeds", "0-2")
    assert answer.exit_code == 1
    assert len(trained.calls) == 3
    said = " ".join(answer.stderr.split())
    assert "the loss is no longer finite" in said
    assert "1 of 3 runs failed" in said


@pytest.mark.parametrize(
    "error", [Stopped("stopped as asked", exit_code=75), InputError("there are no data")], ids=["stop", "input"]
)
def test_a_stop_and_wrong_input_end_all(trained, error):
    trained.raises["seed1"] = error
    assert train("--seeds", "0-2").exit_code == error.exit_code
    assert len(trained.calls) == 2


def test_a_sweep_goes_on_where_it_was(here):
    """Real runs: one point, then all with --resume: the first keeps its bytes."""
    words = ["--set", "batch=720", "--set", "optimizer.lr=0.05"]
    assert train(*words, "--sweep", "epochs=1", "--out", "d").exit_code == 0
    model = here / "d" / "epochs=1" / "seed0" / "model.safetensors"
    before = (model.stat().st_mtime_ns, model.read_bytes())
    answer = train(*words, "--sweep", "epochs=1,2", "--out", "d", "--resume")
    assert answer.exit_code == 0, answer.stderr
    assert (model.stat().st_mtime_ns, model.read_bytes()) == before
    assert (here / "d" / "epochs=2" / "seed0" / "model.safetensors").read_bytes() != before[1]
    for seed in ("epochs=1", "epochs=2"):
        assert (here / "d" / seed / "seed0" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_an_older_version_began_goes_on_in_its_folder(here):
    assert train(*ONE, "--out", "runs/digits-gaussian-0.25/seed0").exit_code == 0  # as it was called
    answer = train(*ONE, "--resume", "--json")
    assert Path(json.loads(answer.stdout)["folder"]) == Path("runs/digits-gaussian-0.25/seed0")
    assert "is finished already" in " ".join(answer.stderr.split())
    other = train("--set", "epochs=2", "--set", "batch=720", "--resume", "--json", "--dry-run")  # another configuration
    assert "runs/digits-gaussian-0.25-epochs=2-batch=720/seed0/config.json" in json.loads(other.stdout)["files"]


# --- overwrite ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(here):
    assert train(*ONE, "--out", "d").exit_code == 0
    return here / "d"


def test_overwrite_replaces_a_run_of_another_configuration(run_folder):
    before = (run_folder / "model.safetensors").read_bytes()
    (run_folder / "running.txt").write_text("Process 999999999 trains here.")
    (run_folder / ".checkpoint.pt.abc.part").write_text("torn")
    answer = train(*ONE, "--seed", "4", "--out", "d", "--overwrite")
    assert answer.exit_code == 0, answer.stderr
    assert (run_folder / "model.safetensors").read_bytes() != before
    assert json.loads((run_folder / "config.json").read_text())["config"]["seed"] == 4
    assert sorted(each.name for each in run_folder.iterdir()) == [
        "checkpoint.pt", "config.json", "curves.png", "environment.json", "metrics.jsonl", "model.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["results.tsv", "notes.txt", "folder/"])
def test_overwrite_refuses_what_no_run_wrote_and_removes_nothing(run_folder, name):
    (run_folder / name).mkdir() if name.endswith("/") else (run_folder / name).write_text("mine")
    before = {each.name for each in run_folder.iterdir()}
    answer = train(*ONE, "--seed", "4", "--out", "d", "--overwrite")
    assert answer.exit_code == 2
    assert name.strip("/") in answer.stderr
    assert {each.name for each in run_folder.iterdir()} == before
    assert json.loads((run_folder / "config.json").read_text())["config"]["seed"] == 0


def test_overwrite_removes_nothing_before_the_new_run_can_begin(run_folder):
    answer = train(*ONE, "--set", "data.name=mnist", "--out", "d", "--overwrite")  # whose files are not there
    assert answer.exit_code == 2
    assert (run_folder / "model.safetensors").exists()


def test_overwrite_and_resume_refuse_a_folder_in_which_another_process_trains(run_folder):
    (run_folder / "running.txt").write_text("Process 1 trains here.")  # it is there on every machine
    for option in ("--overwrite", "--resume"):
        answer = train(*ONE, "--out", "d", option)
        assert answer.exit_code == 2
        assert "process 1 is training in d right now" in " ".join(answer.stderr.split())


def test_overwrite_and_resume_do_not_go_together():
    answer = train("--overwrite", "--resume")
    assert answer.exit_code == 2
    assert "both given" in answer.stderr
