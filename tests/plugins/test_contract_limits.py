"""What a plugin must not be able to do: mix two tests in one file, change what a resumed run is, or lose what it was told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import rscli
from rscli.api import Position, TrainStep
from rscli.cli.app import app
from rscli.config.layers import resolve
from rscli.errors import InputError, PluginError, Stopped
from rscli.plugin_files import load_plugin_file
from rscli.registry import installed
from rscli.runtime.progress import Silent
from rscli.training.run_folder import RunFolder
from rscli.training.train import TrainOptions, train
from runs import Interrupting, train_options
from support import forget_plugins

pytestmark = pytest.mark.usefixtures("plugins_forgotten")


def plugins(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text("import math\nfrom pydantic import Field\nfrom rscli.api import *\n\n\n" + text)
    return path


def options(folder: Path, **changes) -> TrainOptions:
    return train_options(folder / "run", **changes)


def digits(*sets: str, preset: str = "digits-gaussian-0.25"):
    return resolve(preset, sets=["epochs=2", *sets])


VOTE = """
class Vote(Certifier):
    def plan(self, counts, question):
        return Plan(int(counts.argmax()), (self.n,))

    def decide(self, counts, n, plan):
        return Decision(plan.candidate, {p_a}, 0.4, "vote")
"""


def test_rows_of_another_version_of_a_certifier_are_not_added_to_a_file(tmp_path):
    train(digits("epochs=1"), options(tmp_path), Silent())
    out = tmp_path / "r.tsv"

    def certify(most: int, p_a: float, *more: str):
        file = plugins(tmp_path, VOTE.format(p_a=p_a))
        words = ["certify", tmp_path / "run", "--n", "100", "--certifier", "vote", "--plugin", file, "--out", out, "-q"]
        answer = CliRunner().invoke(app, [*map(str, words), "--max", str(most), *more])
        forget_plugins()
        return answer

    assert certify(3, 0.6).exit_code == 0
    before = out.read_bytes()
    refused = certify(6, 0.7, "--resume")
    assert refused.exit_code == 2
    assert "certifier.version" in refused.stderr
    assert out.read_bytes() == before
    assert certify(6, 0.6, "--resume").exit_code == 0
    assert len(out.read_text().splitlines()) == 7


def test_the_file_that_runs_is_the_one_whose_digest_is_recorded(tmp_path):
    """Also if it was changed within a second, to the same length: Python's own cache of modules would not notice."""
    file = plugins(tmp_path, VOTE.format(p_a=0.6))
    load_plugin_file(file)
    stamp = file.stat()
    plugins(tmp_path, VOTE.format(p_a=0.7))
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    forget_plugins()
    load_plugin_file(file)
    found = installed().load("certifiers", "vote")
    assert found(n=9).decide(np.zeros(2), 9, type("P", (), {"candidate": 0})).p_a == 0.7
    assert not list(tmp_path.glob("**/__pycache__"))


SHRINKING = """
class Shrinking(Callback):
    decay: float = Field(0.9, ge=0, lt=1)

    def end(self, run, state):
        for parameter in run.model.parameters():
            parameter.data.mul_(self.decay)
"""


def test_a_callback_that_may_change_weights_is_part_of_what_a_run_is(tmp_path):
    load_plugin_file(plugins(tmp_path, SHRINKING))
    with pytest.raises(Stopped):
        train(digits("callbacks.shrinking.decay=0.9"), options(tmp_path), Interrupting(3))
    for other in (["callbacks.shrinking.decay=0.5"], []):
        with pytest.raises(InputError, match=r"callbacks\.shrinking"):
            train(digits(*other), options(tmp_path, resume=True), Silent())
    same = digits("callbacks.shrinking.decay=0.9", "callbacks.checkpoint.every=2", "loggers.jsonl=none")
    assert train(same, options(tmp_path, resume=True), Silent()).exists()


@pytest.mark.parametrize("name", ["NAdam", "ASGD", "Adafactor", "RMSprop", "AdamW"])
def test_a_run_goes_on_with_any_optimiser_of_torch(tmp_path, name):
    build = f"        import torch\n\n        return torch.optim.{name}(model.parameters(), lr=self.lr)\n"
    load_plugin_file(plugins(tmp_path, f"class Mine(Optimizer):\n    def build(self, model):\n{build}"))
    whole, split_at = tmp_path / "whole", tmp_path / "split_at"
    whole.mkdir()
    split_at.mkdir()
    wanted = digits("optimizer.name=mine", "optimizer.lr=0.001", "epochs=1")
    first = train(wanted, options(whole), Silent())
    with pytest.raises(Stopped):
        train(wanted, options(split_at), Interrupting(4))
    assert train(wanted, options(split_at, resume=True), Silent()).read_bytes() == first.read_bytes()


STATEFUL = """
class Stateful(NoisyLoss):
    def setup(self, context):
        import torch

        {setup}
        return {{"table": torch.zeros(context.images)}}

    def step(self, step):
        step.state["table"][step.indices] += 1
        return {{"ce": {ce}}}
"""
CE = "-step.noisy_logits.log_softmax(-1).gather(-1, step.labels.expand(len(step.noise), -1).unsqueeze(-1)).mean()"


def test_a_step_on_one_image_asks_nothing_of_a_loss_that_keeps_something(tmp_path):
    load_plugin_file(plugins(tmp_path, STATEFUL.format(setup="pass", ce=CE)))
    assert train(
        digits("loss.name=stateful", "batch=359", "epochs=1"), options(tmp_path), Silent()
    ).exists()  # 1437 = 4 * 359 + 1


def test_what_a_loss_cannot_prepare_leaves_no_run_behind(tmp_path):
    load_plugin_file(plugins(tmp_path, STATEFUL.format(setup="raise ValueError('no teacher')", ce=CE)))
    with pytest.raises(PluginError, match="failed in setup"):
        train(digits("loss.name=stateful"), options(tmp_path), Silent())
    assert not RunFolder(tmp_path / "run").config.exists()


def test_a_loss_is_prepared_until_somebody_says_stop(tmp_path):
    load_plugin_file(plugins(tmp_path, STATEFUL.format(setup="list(context.batches(10))", ce=CE)))
    with pytest.raises(Stopped, match="while the loss was prepared"):
        train(digits("loss.name=stateful"), options(tmp_path), Interrupting(3))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("names", "taken"), [(("lr", "ce"), "lr"), (("loss", "kl"), "loss"), (("accuracy",), "accuracy")])
def test_terms_do_not_take_the_names_of_the_log(tmp_path, names, taken):
    terms = ", ".join(f"'{name}': {CE}" for name in names)
    load_plugin_file(plugins(tmp_path, f"class Named(Loss):\n    def step(self, step):\n        return {{{terms}}}\n"))
    with pytest.raises(PluginError, match=f"calls a term {taken}"):
        train(digits("loss.name=named", "epochs=1"), options(tmp_path), Silent())


def test_a_single_term_may_be_called_loss(tmp_path):
    load_plugin_file(plugins(tmp_path, f"class Named(Loss):\n    def step(self, step):\n        return {{'loss': {CE}}}\n"))
    train(digits("loss.name=named", "epochs=1"), options(tmp_path), Silent())
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] > 0


TALKING = """
class Talking(Callback):
    looks_on = True

    def begin(self, run, state):
        run.log({"began": run.epoch})

    def after_step(self, run, state):
        state["steps"] = state.get("steps", 0) + 1
        run.log({f"step": state["steps"]})
"""


def test_what_is_logged_is_in_the_line_of_its_epoch_also_after_a_stop(tmp_path):
    load_plugin_file(plugins(tmp_path, TALKING))
    wanted = digits("callbacks.talking={}", "batch=256")
    with pytest.raises(Stopped):
        train(wanted, options(tmp_path), Interrupting(2))
    train(wanted, options(tmp_path, resume=True), Silent())
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, 12]
    assert lines[0]["began"] == 0
    assert "began" not in lines[1]


def test_what_a_checkpoint_cannot_hold_is_said_when_it_is_written(tmp_path):
    begin = "        import numpy as np\n\n        state['x'] = np.float64(1)\n"
    load_plugin_file(plugins(tmp_path, f"class Odd(Callback):\n    def begin(self, run, state):\n{begin}"))
    with pytest.raises(PluginError, match="no checkpoint holds a float64"):
        train(digits("callbacks.odd={}"), options(tmp_path), Silent())


PROBE = """
class Watch(Callback):
    looks_on = True

    def after_epoch(self, run, state):
        images, labels = run.images("test", range(5))
        found = run.certify(images, n=200, alpha=0.01)
        right = sum(one.predict == label for one, label in zip(found, labels))
        run.log({"probe": right / 5, "classes": len(run.spec.class_names)})
"""


def test_a_probe_certifies_held_out_images_and_changes_nothing(tmp_path):
    load_plugin_file(plugins(tmp_path, PROBE))
    probed, plain = tmp_path / "probed", tmp_path / "plain"
    probed.mkdir()
    plain.mkdir()
    train(digits("callbacks.watch={}"), options(probed), Silent())
    train(digits(), options(plain), Silent())
    states = [rscli.load(folder / "run").network.state_dict() for folder in (probed, plain)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    lines = [json.loads(line) for line in (probed / "run/metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["probe"] <= 1 and line["classes"] == 10 for line in lines)


STEPS = """
import json


class Steps(Logger):
    def open(self, run):
        path = run.folder / "steps.txt"

        class Log(LogWriter):
            def write(self, line):
                pass

            def write_step(self, line):
                with path.open("a") as file:
                    file.write(json.dumps(line) + chr(10))

        return Log()
"""


def test_a_logger_may_have_the_figures_of_every_step(tmp_path):
    load_plugin_file(plugins(tmp_path, STEPS))
    train(digits("loggers.steps={}", "batch=256"), options(tmp_path), Silent())
    lines = [json.loads(line) for line in (tmp_path / "run/steps.txt").read_text().splitlines()]
    assert [(line["epoch"], line["batch"]) for line in lines] == [(epoch, batch) for epoch in (1, 2) for batch in range(1, 7)]
    (epoch, _) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    weights = [256] * 5 + [1437 - 5 * 256]
    mean = sum(line["loss"] * weight for line, weight in zip(lines[:6], weights, strict=True)) / 1437
    assert epoch["loss"] == pytest.approx(mean, rel=1e-6)


TEACHER = """
class Taught(Loss):
    teacher: str

    def networks(self, context):
        from pathlib import Path

        network, noise = context.load_model(Path(self.teacher))
        return {"teacher": network}

    def step(self, step):
        import torch

        teacher = step.networks["teacher"]
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        with torch.no_grad():
            wanted = teacher(step.clean).softmax(-1)
        return {"ce": -(wanted * step.noisy_logits.log_softmax(-1)).sum(-1).mean()}
"""


def test_a_teacher_is_there_in_every_step_also_of_a_resumed_run(tmp_path):
    (tmp_path / "teacher").mkdir()
    train(digits("epochs=1"), options(tmp_path / "teacher"), Silent())
    load_plugin_file(plugins(tmp_path, TEACHER))
    wanted = digits("loss.name=taught", f"loss.teacher={tmp_path / 'teacher' / 'run'}")
    with pytest.raises(Stopped):
        train(wanted, options(tmp_path), Interrupting(3))
    assert train(wanted, options(tmp_path, resume=True), Silent()).exists()


def test_logits_of_the_frozen_model_are_not_those_of_training():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    images = torch.rand(3, 1, 2, 2)
    gaussian = installed().build("noises", {"name": "gaussian", "sigma": 0.5})
    labels, noise = torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3, 1, 2, 2)
    step = TrainStep(model, images, images, labels, torch.arange(3), noise, gaussian, torch.Generator(), Position())
    with step.frozen():
        assert not step.noisy_logits.requires_grad
    assert step.noisy_logits.requires_grad


def test_a_classifier_with_another_noise_is_not_saved_as_what_it_was(tmp_path):
    train(digits("epochs=1"), options(tmp_path), Silent())
    model = rscli.load(tmp_path / "run")
    load_plugin_file(plugins(tmp_path, "class Flat(Noise):\n    norm = 'L1'\n"))
    flat = installed().build("noises", {"name": "flat", "sigma": 0.25})
    given = {"class_names": model.class_names, "input_shape": model.shape, "transform": model.transform, "source": model.source}
    for change in ({"noise": flat}, {"sigma": 0.25, "class_names": ["other"] * 10}, {"sigma": 0.25, "input_shape": (1, 9, 9)}):
        with pytest.raises(InputError, match="differ from those of the model file"):
            rscli.SmoothedClassifier(model.network, **{**given, **change}).save(tmp_path / "m")
    rscli.SmoothedClassifier(model.network, **given, sigma=0.5).save(tmp_path / "m")
    assert rscli.load(tmp_path / "m").sigma == 0.5


def test_a_network_keeps_its_layout():
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.LazyLinear(2))
    network(torch.zeros(1, 3, 8, 8))
    before = [(parameter.data_ptr(), parameter.stride()) for parameter in network.parameters()]
    rscli.SmoothedClassifier(network, sigma=0.5, class_names=2).certify(torch.rand(2, 3, 8, 8), n=50, alpha=0.1)
    assert [(parameter.data_ptr(), parameter.stride()) for parameter in network.parameters()] == before


# --- files and names of an older version -------------------------------------------------------------------------------------


def older(folder: Path) -> None:
    """Makes the protocol beside `r.tsv` one of format 1, as the version before wrote it for the sequential certifier."""
    path = folder / "r.tsv.protocol.json"
    protocol = json.loads(path.read_text())
    certifier = protocol["certifier"]
    certifier.pop("decisive")
    certifier["give_up"] = certifier.pop("futility")
    for key in ("sha256", "norm"):
        protocol.pop(key)
    for key in ("preset", "overrides", "classes", "images"):
        protocol["info"].pop(key)
    path.write_text(json.dumps({**protocol, "format": 1}))


def test_results_of_format_1_go_on(tmp_path):
    train(digits("epochs=1"), options(tmp_path), Silent())
    out = tmp_path / "r.tsv"
    words = ["certify", tmp_path / "run", "--n", "500", "--certifier", "sequential", "--radii", "0,0.25", "--out", out, "-q"]

    def certify(*more: str):
        return CliRunner().invoke(app, [*map(str, words), *more])

    assert certify("--max", "6").exit_code == 0
    whole = [line.split("\t") for line in out.read_text().splitlines()]
    out.write_text("".join("\t".join(line) + "\n" for line in whole[:4]))
    older(tmp_path)
    answer = certify("--max", "6", "--resume")
    assert answer.exit_code == 0, answer.stderr
    assert [line.split("\t")[:5] for line in out.read_text().splitlines()] == [line[:5] for line in whole]
    other = certify("--max", "6", "--resume", "--set", "certifier.futility=0.01")
    assert other.exit_code == 2
    assert "certifier.futility was 0.001, is now 0.01" in other.stderr


def test_a_label_that_is_not_that_of_the_data_is_found_on_resume(tmp_path):
    train(digits("epochs=1"), options(tmp_path), Silent())
    out = tmp_path / "r.tsv"
    words = ["certify", str(tmp_path / "run"), "--n", "300", "--out", str(out), "-q"]
    assert CliRunner().invoke(app, [*words, "--max", "5"]).exit_code == 0
    lines = [line.split("\t") for line in out.read_text().splitlines()]
    at, other = 1, next(str(label) for label in range(10) if str(label) not in lines[1][1:3])
    lines[at][1:3] = [other, other if lines[at][2] == lines[at][1] else lines[at][2]]
    out.write_text("".join("\t".join(line) + "\n" for line in lines))
    answer = CliRunner().invoke(app, [*words, "--max", "6", "--resume"])
    assert answer.exit_code == 2
    assert f"image {lines[at][0]} has the label {lines[at][1]}" in answer.stderr


@pytest.mark.parametrize(
    ("sets", "milestones", "said"),
    [
        (["schedule.drops=[7]"], (7,), "schedule.drops is now called schedule.milestones (--set)"),
        (["schedule.drops=[7]", "schedule.milestones=[5]"], (5,), "is ignored"),
        (["schedule.milestones=[5]"], (5,), None),
        (["schedule.name=rscli:step"], (14, 18), None),
    ],
    ids=["old", "both", "new", "qualified"],
)
def test_old_names_win_over_lower_layers_and_are_said(sets, milestones, said):
    found = resolve("digits-cons-0.25", sets=sets)
    assert found.schedule.milestones == milestones
    assert found.notes == () if said is None else said in found.notes[0]
    if said is not None:
        assert found.sources["schedule.milestones"] == "--set"


@pytest.mark.parametrize("name", ["config.json", "checkpoint.pt", "a/b.jsonl", "../x.jsonl", ".x.jsonl"])
def test_a_log_does_not_take_the_place_of_another_file(name):
    with pytest.raises(InputError, match=r"loggers\.jsonl\.file"):
        resolve("digits-cons-0.25", sets=[f"loggers.jsonl.file={name}"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("class Wrong(Optimizer):\n    def build(self, model):\n        from torch.optim import LBFGS\n\n"
         "        return LBFGS(model.parameters())\n", "closure"),
        ("class Wrong(Schedule):\n    def factor(self, epoch, epochs):\n        return -1.0\n", "never negative"),
        ("class Wrong(Logger):\n    def open(self, run):\n        return None\n", "no LogWriter"),
    ],
    ids=["closure", "negative", "no-log"],
)  # fmt: skip
def test_what_newer_kinds_return_is_checked(tmp_path, body, said):
    load_plugin_file(plugins(tmp_path, body))
    kind = body.partition("(")[2].partition(")")[0].lower()
    chosen = "loggers.wrong={}" if kind == "logger" else f"{kind}.name=wrong"
    more = ["optimizer.lr=0.1"] if kind == "optimizer" else []
    with pytest.raises(PluginError, match=said):
        train(digits(chosen, "epochs=1", *more), options(tmp_path), Silent())


def test_what_is_no_network_is_refused_at_once():
    with pytest.raises(InputError, match="must be a torch module"):
        rscli.SmoothedClassifier(lambda images: images, sigma=1.0, class_names=10)
