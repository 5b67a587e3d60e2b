"""`rscli train --dry-run`: what a run costs, and what would keep it from beginning."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from rscli.api import Passes
from rscli.cli.app import app
from rscli.cli.dry_run import quantity, size
from rscli.cli.runs import duration
from rscli.config.layers import resolve
from rscli.training.cost import cost_of, forward_flops, kept_bytes
from rscli.training.train import TrainOptions

ONE = ["--set", "epochs=1", "--set", "batch=720", "--device", "cpu", "--workers", "0"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*words):
    return CliRunner().invoke(app, ["train", *map(str, words)])


def dry(*words) -> dict:
    answer = train(*words, "--dry-run", "--json")
    assert answer.exit_code == 0, answer.stderr
    return json.loads(answer.stdout)


def cost(*sets: str, preset: str = "mnist-cons-0.5"):
    return cost_of(resolve(preset=preset, sets=sets), TrainOptions(Path("x"), Path("data")), 60_000)


# --- what it costs -----------------------------------------------------------------------------------------------------------


def test_imagenet_with_consistency_is_231_million_passes(here):
    """1,281,167 images x 2 copies x 90 epochs of ResNet-50: 4.09 G multiplications and additions an image (He et al. 2016 say
    3.8 G for a variant), so 8.2 GFLOPs; on 312 TFLOP/s at 40 %, 12.6 hours.
    """
    answer = dry("--preset", "imagenet-cons-0.5", "--device-tflops", "312")
    found = answer["cost"]
    assert answer["parameters"] == 25_557_032
    assert found["trained_rows"] * found["epochs"] == 1_281_167 * 2 * 90
    assert found["forward_flops"] == pytest.approx(2 * 4.09e9, rel=0.01)
    assert found["training_flops"] == 3 * 1_281_167 * 2 * 90 * found["forward_flops"]
    assert found["hours"] == pytest.approx(found["training_flops"] / (312e12 * 0.4) / 3600)
    assert 12 < found["hours"] < 13
    assert list(here.iterdir()) == []


def test_lenet_by_hand():
    """Convolutions of 5x5 to 20 and 50 channels, a 2x2 pooling behind each, and linear layers of 500 and 10."""
    assert cost().forward_flops == 2 * (24 * 24 * 20 * 25 + 8 * 8 * 50 * 25 * 20 + 800 * 500 + 500 * 10)
    maps = [28 * 28, 24 * 24 * 20, 12 * 12 * 20, 8 * 8 * 50, 4 * 4 * 50, 500]
    indices = [12 * 12 * 20, 4 * 4 * 50]  # int64: where the pooling found its maxima
    assert cost().row_bytes == 4 * sum(maps) + 8 * sum(indices)


def test_what_autograd_keeps_of_an_image_by_hand():
    """Of two linear layers with a ReLU between them: the input of the first, and that of the second, the ReLU's output."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3))
    for device in ("cpu", "meta"):
        assert kept_bytes(network.to(device), (3, 2, 2)) == 4 * (12 + 7)
        assert forward_flops(network, (3, 2, 2)) == 2 * (12 * 7 + 7 * 3)


def test_weights_gradients_and_momentum():
    parameters = dry("--preset", "mnist-cons-0.5")["parameters"]
    assert cost().weights_bytes == 3 * 4 * parameters
    assert cost("optimizer.momentum=0").weights_bytes == 2 * 4 * parameters


def test_a_network_that_cannot_be_looked_at_is_unknown():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, images):
            if images.device.type == "meta":
                raise ValueError("not there")
            return self.layer(images.flatten(1))

    assert forward_flops(Moody().to("meta"), (1, 2, 2)) is None
    assert kept_bytes(Moody().to("meta"), (1, 2, 2)) is None
    assert forward_flops(Moody(), (1, 2, 2)) == 2 * 4 * 2


@pytest.mark.parametrize(
    ("sets", "trained", "attacked", "forward"),
    [
        ([], 2, 0, 0),
        (["loss.name=gaussian", "loss.m=4"], 4, 0, 0),
        (["loss.name=macer", "loss.lbd=1", "loss.m=16"], 16, 0, 0),
        (["loss.name=stability"], 2, 0, 0),
        (["loss.name=stability", "loss.m=3"], 4, 0, 0),
        (["attack.name=pgd", "attack.epsilon=1", "attack.steps=10"], 2, 20, 0),
        (["attack.name=ddn", "attack.epsilon=1", "attack.steps=5"], 2, 8, 2),
        (["attack.name=gradient-free", "attack.epsilon=1", "attack.steps=3"], 2, 0, 6),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_rows_are_what_a_step_really_passes(sets, trained, attacked, forward, monkeypatch):
    """A real step of one chunk, whose network counts what passes it, and what comes back."""
    from rscli.data.splits import open_split, spec_of
    from rscli.training.trainer import Trainer

    batch = 12
    words = [*sets, f"batch={batch}", "chunk=false", "limit=12", "data.name=digits"]
    resolved = resolve(preset="digits-cons-0.25", sets=words)
    spec = spec_of(resolved.dataset, Path("data"))
    from rscli.data.subset import limited

    split = limited(open_split(resolved.dataset, spec, "train", Path("data")), batch)
    trainer = Trainer(resolved, spec, split, torch.device("cpu"), channels_last=False)
    counts = {"trained": 0, "attacked": 0, "forward": 0}

    def count(module, inputs, output):
        rows, frozen = len(output), not next(module.parameters()).requires_grad
        counts["forward"] += rows  # until a gradient comes back

        def back(_):
            counts["forward"] -= rows
            counts["attacked" if frozen else "trained"] += rows

        if output.requires_grad:
            output.register_hook(back)

    trainer.classifier.register_forward_hook(count)
    next(trainer.epoch_batches())
    assert counts == {"trained": trained * batch, "attacked": attacked * batch, "forward": forward * batch}
    found = cost_of(resolved, TrainOptions(Path("x"), Path("data")), batch)
    assert (found.trained_rows, found.attacked_rows, found.forward_rows) == tuple(
        each * batch for each in (trained, attacked, forward)
    )
    assert found.training_flops == resolved.config.epochs * batch * (3 * trained + 2 * attacked + forward) * found.forward_flops


def test_an_attack_that_says_nothing_is_not_guessed(monkeypatch):
    from rscli_core.attacks.pgd import Pgd

    monkeypatch.setattr(Pgd, "passes", lambda self, m: None)
    words = ["--preset", "mnist-smoothadv-0.5", "--device-tflops", "10"]
    found = dry(*words)["cost"]
    assert (found["attacked_rows"], found["training_flops"], found["hours"]) == (None, None, None)
    assert found["trained_rows"] == 240_000
    assert "does not say what it costs" in train(*words, "--dry-run").stdout


def test_the_contract_has_a_word_for_each():
    assert Passes() == (0, 0, 0)
    assert resolve(preset="mnist-gaussian-0.5", sets=["loss.m=3"]).loss.passes == Passes(trained=3)


def test_memory_grows_with_the_rows_of_a_step_alone():
    small, large = cost("loss.m=4", "chunk=false"), cost("loss.m=8", "chunk=false")
    assert small.memory_bytes - small.weights_bytes == 4 * 256 * small.row_bytes
    assert large.memory_bytes - large.weights_bytes == 8 * 256 * small.row_bytes
    assert cost("loss.m=8").rows_in_step == 256  # in chunks: the rows of a batch


def test_a_trial_measures_and_writes_nothing(here):
    found = dry("--preset", "digits-gaussian-0.25", "--device", "cpu", "--trial", "0.2")["cost"]
    assert found["trial"]["images_per_s"] > 0
    assert found["trial"]["seconds"] >= 0.2
    assert found["hours"] == pytest.approx(found["epochs"] * 1437 / found["trial"]["images_per_s"] / 3600)
    assert list(here.iterdir()) == []


def test_a_trial_counts_the_images_that_are_trained_on(here):
    sets = ["--set", "holdout=437", "--set", "limit=1000"]
    found = dry("--preset", "digits-gaussian-0.25", "--device", "cpu", "--trial", "0.1", *sets)["cost"]
    assert found["hours"] == pytest.approx(found["epochs"] * 563 / found["trial"]["images_per_s"] / 3600)


PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
COSTS = re.findall(
    r"^\| `([\w.-]+)` \| (\d+) \+ (\d+) \| (\d+) \| (\S+) \| (\S+) GiB \| (\S+) \|$", PAGE.read_text(encoding="utf-8"), re.M
)


@pytest.mark.slow
@pytest.mark.parametrize("row", COSTS, ids=lambda row: row[0])
def test_the_costs_of_the_page_are_what_the_dry_run_counts(row):
    found = dry("--preset", row[0], "--device-tflops", "312")["cost"]
    images = {"mnist": 60_000, "cifar10": 50_000, "imagenet": 1_281_167}[row[0].partition("-")[0]]
    rows = tuple(f"{found[key] / images:g}" for key in ("trained_rows", "attacked_rows"))
    hours, memory = f"{found['hours']:.2f}", f"{found['memory_bytes'] / 2**30:.3g}"
    assert (*rows, str(found["epochs"]), f"{found['training_flops']:.3g}", memory, hours) == row[1:]


def test_the_page_has_costs():
    assert len(COSTS) == 9


def test_what_only_a_dry_run_has():
    for words in (["--trial", "1"], ["--device-tflops", "10"]):
        answer = train("--preset", "digits-gaussian-0.25", *words)
        assert answer.exit_code == 2
        assert "--dry-run" in answer.stderr


def test_quantities():
    assert [quantity(v) for v in (0, 12, 8.18e9, 999.4e3, 5.66e18, 2e22)] == ["0 ", "12 ", "8.18 G", "999 k", "5.66 E", "20 Z"]
    assert [size(v) for v in (12, 1536, 3 * 2**30, 2**42)] == ["12 B", "1.5 KiB", "3 GiB", "4 TiB"]
    assert [duration(s) for s in (0, 45, 60, 754, 3600, 12_000, 187_200)] == [
        "0 s", "45 s", "1 min", "13 min", "1 h", "3 h 20 min", "2 d 4 h"
    ]  # fmt: skip


# --- what would keep it from beginning ---------------------------------------------------------------------------------------


def test_the_dry_run_says_that_the_command_would_be_refused():
    words = ["--preset", "digits-gaussian-0.25", *ONE, "--out", "d"]
    assert dry(*words)["refused"] is None
    assert train(*words).exit_code == 0
    assert "already holds a training run" in dry(*words)["refused"]
    assert dry(*words, "--resume")["refused"] is None
    assert dry(*words, "--overwrite")["refused"] is None
    other = dry(*words, "--seed", "3", "--resume")["refused"]
    assert "another configuration" in other
    assert "seed: 0" in other
    answer = train(*words, "--dry-run")
    assert answer.exit_code == 0
    assert "the run would be refused" in " ".join(answer.stderr.split())


def test_milestones_that_never_come_are_said_by_the_dry_run_and_by_the_run():
    words = ["--preset", "digits-gaussian-0.25", *ONE, "--set", "epochs=3", "--set", "schedule.milestones=31,61"]
    said = "milestones 31 and 61 of the schedule never come in a run of 3 epochs: the learning rate keeps its first value"
    assert said in dry(*words)["remark"]
    for more in (["--dry-run"], ["--data-limit", "20"]):
        answer = train(*words, *more)
        assert answer.exit_code == 0, answer.stderr
        assert said in " ".join(answer.stderr.split())


@pytest.mark.parametrize(
    ("milestones", "epochs", "said"),
    [((31, 61), 90, None), ((31, 61), 62, None), ((31, 61), 61, "milestone 61"), ((1, 2, 3), 1, "1, 2 and 3"), ((), 3, None)],
)
def test_a_milestone_at_the_end_never_comes_either(milestones, epochs, said):
    from rscli_core.schedules.step import Step

    schedule = Step(milestones=milestones)
    remark = schedule.remark(epochs)
    assert (remark is None) == (said is None)
    rates = {schedule.factor(step / 10, epochs) for step in range(10 * epochs)}
    assert (len(rates) < len(milestones) + 1) == (remark is not None)  # fewer rates than the milestones make
    if said:
        assert said in remark
        assert ("keeps its first value" in remark) == (len(rates) == 1)


# --- a quick look ------------------------------------------------------------------------------------------------------------


def test_a_limit_in_three_spellings():
    preset = ["--preset", "digits-gaussian-0.25"]
    for words in (["--data-limit", "100"], ["--set", "limit=100"], ["--set", "data.limit=100"]):
        answer = dry(*preset, *words)
        assert (answer["images"], answer["config"]["limit"]) == (100, 100)
        assert "runs/digits-gaussian-0.25-limit=100/seed0/config.json" in answer["files"]
        assert answer["sources"]["limit"] == words[0]
    assert dry(*preset)["config"]["limit"] is None
    assert dry(*preset, "--data-limit", "9999")["images"] == 1437


def test_a_limited_run_trains_on_so_many_images():
    answer = train("--preset", "digits-gaussian-0.25", *ONE, "--data-limit", "50", "--set", "batch=10", "--out", "d")
    assert answer.exit_code == 0, answer.stderr
    state = torch.load("d/checkpoint.pt", weights_only=True)
    assert state["data"]["images"] == 50
    answer = train("--preset", "digits-gaussian-0.25", *ONE, "--set", "batch=10", "--out", "d", "--resume")
    assert answer.exit_code == 2
    assert "limit: 50" in answer.stderr
