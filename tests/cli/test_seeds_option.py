"""`rscli train --seeds`: a run folder for each seed, one stop for all, and finished seeds skipped."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from rscli.cli.app import app
from rscli.errors import Stopped

SMALL = ["--preset", "digits-gaussian-0.25", "--set", "epochs=1", "--set", "batch=720", "--device", "cpu", "--workers", "0"]

NAME = "digits-gaussian-0.25-epochs=1-batch=720"
"""What the folder is called: the preset, and what departs from it."""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    return CliRunner().invoke(app, ["train", *SMALL, *map(str, words)])


@pytest.fixture
def trained(monkeypatch):
    """Instead of training: which seeds were asked for, and where; a seed in `stop` is stopped with that exit code."""
    import rscli.training.train

    calls, stop = [], {}

    def train(resolved, options, progress):
        calls.append((resolved.config.seed, options.out.as_posix(), options.resume))
        if resolved.config.seed in stop:
            raise Stopped("stopped as asked", exit_code=stop[resolved.config.seed])
        return options.out / "model.safetensors"

    monkeypatch.setattr(rscli.training.train, "train", train)
    train.calls, train.stop = calls, stop
    return train


@pytest.mark.parametrize(
    ("words", "folders"),
    [
        (["--seeds", "0,1,2"], [(s, f"runs/{NAME}/seed{s}") for s in (0, 1, 2)]),
        (["--seeds", "7, 3", "--out", "here"], [(7, "here/seed7"), (3, "here/seed3")]),
        (["--seeds", "4", "--out", "here"], [(4, "here/seed4")]),
        (["--seed", "4", "--out", "here"], [(4, "here")]),
        (["--out", "here"], [(0, "here")]),
        (["--seed", "4"], [(4, f"runs/{NAME}/seed4")]),
        (["--set", "seed=9", "--seeds", "1,2"], [(s, f"runs/{NAME}/seed{s}") for s in (1, 2)]),
    ],
    ids=["three", "out", "one-of-several", "one-with-out", "out-alone", "one", "over-the-configuration"],
)
def test_where_each_seed_goes(trained, words, folders):
    assert run(*words).exit_code == 0
    assert [call[:2] for call in trained.calls] == folders


def test_json_lists_the_runs(trained):
    found = json.loads(run("--seeds", "0,1", "--out", "d", "--json").stdout)
    assert found == {"runs": [{"model": f"d/seed{s}/model.safetensors", "folder": f"d/seed{s}"} for s in (0, 1)]}
    assert json.loads(run("--seed", "0", "--out", "d", "--json").stdout) == {"model": "d/model.safetensors", "folder": "d"}


@pytest.mark.parametrize("code", [75, 130])
def test_a_stop_in_one_seed_stops_all(trained, code):
    trained.stop[1] = code
    assert run("--seeds", "0,1,2").exit_code == code
    assert [call[0] for call in trained.calls] == [0, 1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "0,1", "--seed", "0"], "are both given"),
        (["--seeds", "0,0"], "distinct whole numbers"),
        (["--seeds", "0,-1"], "distinct whole numbers"),
        (["--seeds", "0,,1"], "distinct whole numbers"),
        (["--seeds", "1.5"], "distinct whole numbers"),
        (["--seeds", ""], "distinct whole numbers"),
        (["--seeds", str(2**63)], "seed"),
    ],
    ids=["both", "twice", "negative", "empty-part", "fraction", "empty", "too-large"],
)
def test_wrong_seeds(trained, words, said):
    answer = run(*words)
    assert answer.exit_code == 2
    assert said in answer.stderr
    assert trained.calls == []


def test_a_folder_in_use_is_noticed_before_the_first_seed(trained, here):
    (here / "d" / "seed1").mkdir(parents=True)
    plan = json.loads(run("--seed", "1", "--dry-run", "--json").stdout)
    (here / "d" / "seed1" / "config.json").write_text(json.dumps({"config": plan["config"]}))
    answer = run("--seeds", "0,1", "--out", "d")
    assert answer.exit_code == 2
    assert "already a training run in" in answer.stderr
    assert "seed1" in answer.stderr
    assert trained.calls == []
    assert run("--seeds", "0,1", "--out", "d", "--resume").exit_code == 0
    assert [call[2] for call in trained.calls] == [True, True]


def test_the_dry_run_shows_each_folder_and_writes_nothing(here):
    answer = run("--seeds", "0,5", "--dry-run")
    shown = answer.stdout.replace("\\", "/")
    assert answer.exit_code == 0
    for seed in (0, 5):
        assert f"runs/{NAME}/seed{seed}/model.safetensors" in shown
    assert "0, 5" in shown
    assert list(here.iterdir()) == []


def test_the_dry_run_in_json_has_every_plan():
    found = json.loads(run("--seeds", "0,5", "--dry-run", "--json").stdout)["runs"]
    assert [plan["config"]["seed"] for plan in found] == [0, 5]
    (one,) = [plan for plan in found if plan["config"]["seed"] == 5]
    assert one.keys() == json.loads(run("--seed", "5", "--dry-run", "--json").stdout).keys()


def test_finished_seeds_are_skipped_and_others_trained(here):
    """Real runs: seed 0 alone, then 0 and 1 with --resume; seed 0 keeps its bytes, and equals what --seed 0 makes."""
    assert run("--seed", "0", "--out", "d/seed0").exit_code == 0
    model = here / "d" / "seed0" / "model.safetensors"
    before = (model.stat().st_mtime_ns, model.read_bytes())
    answer = run("--seeds", "0,1", "--out", "d", "--resume")
    assert answer.exit_code == 0
    assert "is finished already" in " ".join(answer.stderr.split())
    assert (model.stat().st_mtime_ns, model.read_bytes()) == before
    other = here / "d" / "seed1" / "model.safetensors"
    assert other.exists()
    assert other.read_bytes() != before[1]
