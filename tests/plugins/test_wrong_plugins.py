"""Plugins that are wrong, each in its own way: one message that names the plugin, its package, and what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rscli.api import Question
from rscli.config.layers import resolve
from rscli.data.splits import open_split, spec_of
from rscli.errors import PluginError
from rscli.models.network import build_classifier
from rscli.plugin_files import load_plugin_file
from rscli.registry import installed
from rscli.results.radius import certified_radius, threshold_of
from rscli.runtime.guard import draw_noise
from rscli.runtime.progress import Silent
from rscli.sampling.blocks import NoiseBlocks
from rscli.sampling.requests import CertifierRequest
from rscli.smoothing.task import CertificationTask
from rscli.training.train import TrainOptions, train

pytestmark = pytest.mark.usefixtures("plugins_forgotten")

HEAD = '''
import math
import numpy as np
from rscli.api import *


class Base(Certifier):
    """A certifier that is right."""

    def plan(self, counts, question):
        return Plan(int(counts.argmax()), (self.n,))

    def decide(self, counts, n, plan):
        return Decision(plan.candidate, 0.6, 0.4, "fine")


class Right(NoisyLoss):
    """A loss that is right."""

    def terms(self, logits, labels):
        return {"ce": -logits.log_softmax(-1).gather(-1, labels.expand(len(logits), -1).unsqueeze(-1)).mean()}
'''


def plugin(tmp_path: Path, body: str):
    """The plugin class `Wrong` of a file `wrong.py`, and its kind."""
    path = tmp_path / "wrong.py"
    path.write_text(HEAD + "\n\n" + body)
    found = {entry.name: entry for entry in load_plugin_file(path)}
    return found["wrong"].kind


def refused(tmp_path: Path, *fragments: str, work) -> None:
    with pytest.raises(PluginError) as caught:
        work()
    for fragment in (*fragments, "wrong of wrong.py sha256:"):
        assert fragment in caught.value.message, caught.value.message
    assert caught.value.exit_code == 2


CERTIFIERS = {
    "selection-text": ("    def selection(self, question): return 'many'", "selection gave samples = 'many'"),
    "selection-negative": ("    def selection(self, question): return -1", "selection gave samples = -1"),
    "selection-bool": ("    def selection(self, question): return True", "selection gave samples = True"),
    "selection-raises": ("    def selection(self, question): raise KeyError('x')", "failed in selection: KeyError: 'x'"),
    "plan-none": ("    def plan(self, counts, question): return None", "plan returned None"),
    "plan-raises": ("    def plan(self, counts, question): return 1 / 0", "failed in plan: ZeroDivisionError"),
    "plan-base": (
        "    def plan(self, counts, question):\n        class Deep(BaseException): pass\n        raise Deep('far down')",
        "failed in plan: Deep: far down",
    ),
    "plan-speechless": (
        "    def plan(self, counts, question):\n        class Odd(Exception):\n            def __str__(self): return 1 / 0\n"
        "        raise Odd",
        "failed in plan: Odd",
    ),
    "plan-exits": ("    def plan(self, counts, question): raise SystemExit(3)", "failed in plan: SystemExit"),
    "plan-no-class": ("    def plan(self, counts, question): return Plan(17, (5,))", "candidate = 17"),
    "plan-falls": ("    def plan(self, counts, question): return Plan(0, (5, 5))", "looks that do not increase"),
    "plan-zero": ("    def plan(self, counts, question): return Plan(0, (0, 5))", "look = 0"),
    "plan-fraction": ("    def plan(self, counts, question): return Plan(0, (2.5,))", "look = 2.5"),
    "plan-too-many": ("    def plan(self, counts, question): return Plan(0, (self.n + 1,))", "look = 101"),
    "plan-looks-text": ("    def plan(self, counts, question): return Plan(0, '5')", "not a Plan with looks"),
    "decide-text": ("    def decide(self, counts, n, plan): return 'cat'", "decide returned 'cat'"),
    "decide-never": ("    def decide(self, counts, n, plan): return None", "did not decide at its last look (100)"),
    "decide-raises": ("    def decide(self, counts, n, plan): return counts['x']", "failed in decide: IndexError"),
    "decide-no-class": ("    def decide(self, counts, n, plan): return Decision(3, .6, .4, '')", "predict = 3"),
    "decide-below": ("    def decide(self, counts, n, plan): return Decision(-2, .6, .4, '')", "predict = -2"),
    "decide-class-text": ("    def decide(self, counts, n, plan): return Decision('0', .6, .4, '')", "predict = '0'"),
    "decide-nan": ("    def decide(self, counts, n, plan): return Decision(0, math.nan, .4, '')", "p_a = nan"),
    "decide-above-one": ("    def decide(self, counts, n, plan): return Decision(0, 1.5, .4, '')", "p_a = 1.5"),
    "decide-p-b-negative": ("    def decide(self, counts, n, plan): return Decision(0, .6, -.1, '')", "p_b = -0.1"),
    "decide-p-text": ("    def decide(self, counts, n, plan): return Decision(0, 'much', .4, '')", "p_a = 'much'"),
    "decide-too-sure": ("    def decide(self, counts, n, plan): return Decision(0, .95, .01, '')", "100 samples can give 0.93"),
    "decide-certain": ("    def decide(self, counts, n, plan): return Decision(0, 1.0, 0.0, '')", "100 samples can give 0.93"),
    "decide-reason-none": ("    def decide(self, counts, n, plan): return Decision(0, .6, .4, None)", "reason = None"),
    "decide-saturated-text": (
        "    def decide(self, counts, n, plan): return Decision(0, .6, .4, '', 'no')",
        "saturated = 'no'",
    ),
    "decide-no-threshold": ("    grid = True", "threshold = None"),
    "decide-threshold-beyond": (
        "    def decide(self, counts, n, plan): return Decision(0, .6, .4, '', threshold=2)",
        "threshold = 2",
    ),
}


@pytest.mark.parametrize(("body", "said"), CERTIFIERS.values(), ids=CERTIFIERS)
def test_a_wrong_certifier(tmp_path, body, said):
    plugin(tmp_path, f"class Wrong(Base):\n{body}\n")
    certifier = installed().build("certifiers", {"name": "wrong", "n": 100, "n0": 10})

    def work():
        request = CertifierRequest(certifier, Question(3, (0.5, 0.55)), 0, lambda: None)
        if request.plan is None:
            request.receive(np.array([10, 0, 0]))
        request.receive(np.array([100, 0, 0]))

    refused(tmp_path, said, work=work)


def test_counts_that_a_certifier_changes_in_place_stay_what_they_were(tmp_path):
    body = "    def {0}(self, counts, {1}):\n        counts[:] = 0\n        return {2}\n"
    plan = body.format("plan", "question", "Plan(0, (self.n,))")
    decide = body.format("decide", "n, plan", "Decision(0, 0.4, 0.4, '')")
    plugin(tmp_path, f"class Wrong(Certifier):\n{plan}\n{decide}")
    request = CertifierRequest(
        installed().build("certifiers", {"name": "wrong", "n": 9, "n0": 5}), Question(2), 7, lambda: None
    )
    request.receive(np.array([5, 0]))
    assert request.receive(np.array([8, 1]))
    assert request.counts.tolist() == [8, 1]


def test_numbers_of_numpy_are_numbers(tmp_path):
    said = "Decision(np.int64(0), np.float64(.6), np.float32(.25), 'ok', np.bool_(1))"
    body = f"    def decide(self, counts, n, plan): return {said}"
    plugin(tmp_path, f"class Wrong(Base):\n{body}\n")
    request = CertifierRequest(
        installed().build("certifiers", {"name": "wrong", "n": 100, "n0": 1}), Question(2), 0, lambda: None
    )
    request.receive(np.array([1, 0]))
    assert request.receive(np.array([99, 1]))
    assert [type(value) for value in vars(request.decision).values()] == [int, float, float, str, bool, type(None)]


RIGHT_NOISE = """
    norm = 'L2'
    def sample(self, shape, *, generator, device):
        import torch
        return torch.zeros(tuple(shape), device=device)
    def radius(self, p_a, p_b): return 1.0
    def probability(self, radius): return 0.5
"""
NOISES = {
    "radius-negative": ("    def radius(self, p_a, p_b): return -0.5", "negative radius -0.5"),
    "radius-infinite": ("    def radius(self, p_a, p_b): return math.inf", "a radius = inf"),
    "radius-nan": ("    def radius(self, p_a, p_b): return math.nan", "a radius = nan"),
    "radius-text": ("    def radius(self, p_a, p_b): return '1'", "a radius = '1'"),
    "radius-raises": ("    def radius(self, p_a, p_b): return self.x", "failed in radius: AttributeError"),
    "probability-below-half": ("    def probability(self, radius): return 0.3", "gave 0.3 for the radius 0.25"),
    "probability-above-one": ("    def probability(self, radius): return 2.0", "gave 2.0"),
    "probability-none": ("    def probability(self, radius): return None", "a threshold = None"),
    "sample-array": ("    def sample(self, shape, **_): return np.zeros(shape)", "which is not a tensor"),
    "sample-shape": (
        "    def sample(self, shape, **_):\n        import torch\n        return torch.zeros(shape[1:])",
        "returned noise of (3, 4)",
    ),
    "sample-whole": (
        "    def sample(self, shape, **_):\n        import torch\n        return torch.zeros(shape, dtype=torch.int64)",
        "torch.int64",
    ),
    "sample-double": (
        "    def sample(self, shape, **_):\n        import torch\n        return torch.zeros(shape, dtype=torch.float64)",
        "torch.float64",
    ),
    "sample-raises": (
        "    def sample(self, shape, **_): raise RuntimeError('no luck')",
        "failed in sample: RuntimeError: no luck",
    ),
}


@pytest.mark.parametrize(("body", "said"), NOISES.values(), ids=NOISES)
def test_a_wrong_noise(tmp_path, body, said):
    plugin(tmp_path, f"class Wrong(Noise):\n{RIGHT_NOISE}\n{body}\n")
    noise = installed().build("noises", {"name": "wrong", "sigma": 0.5})
    from rscli.api import Decision

    def work():
        threshold_of(noise, 0.25)
        certified_radius(Decision(0, 0.9, 0.1, ""), noise)
        draw_noise(noise, (2, 3, 4), torch.Generator(), torch.device("cpu"))

    refused(tmp_path, said, work=work)


@pytest.mark.parametrize(("body", "said"), [("None", "returned None where"), ("images[..., :2]", "returned (1, 3, 2) where")])
def test_noisy_images_that_are_wrong(tmp_path, body, said):
    apply = f"    def apply(self, images, noise, *, out=None): return {body}"
    plugin(tmp_path, f"class Wrong(Noise):\n{RIGHT_NOISE}\n{apply}\n")
    noise = installed().build("noises", {"name": "wrong", "sigma": 0.5})
    (piece,) = NoiseBlocks(noise, 0, torch.device("cpu"), 4).pieces(0, torch.zeros(1, 3, 4), 0, 8)
    refused(tmp_path, said, work=lambda: piece.into(torch.empty(8, 1, 3, 4)))


ARCHITECTURES = {
    "none": ("    def build(self, spec, *, weights=True): return None", "build returned None"),
    "raises": ("    def build(self, spec, *, weights=True): raise ValueError('size')", "failed in build: ValueError: size"),
    "forward-raises": (
        "    def build(self, spec, *, weights=True):\n        from torch import nn\n        return nn.Linear(3, 3)",
        "failed in build: the forward of its network: RuntimeError",
    ),
    "other-classes": (
        "    def build(self, spec, *, weights=True):\n        from torch import nn\n"
        "        return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))",
        "logits of shape (2, 3), not (2, 10)",
    ),
}


@pytest.mark.parametrize(("body", "said"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_wrong_architecture(tmp_path, body, said):
    plugin(tmp_path, f"class Wrong(Architecture):\n{body}\n")
    spec = spec_of(installed().build("datasets", {"name": "digits"}), tmp_path)
    refused(tmp_path, said, work=lambda: build_classifier(installed().build("architectures", {"name": "wrong"}), spec))


SPEC = (
    "    def spec(self, root): return DataSpec(class_names=('a', 'b'), shape=(1, 4, 4), "
    "test_transform=Transform(channels=1, crop=(4, 4)))\n"
)
DATASETS = {
    "spec-none": ("    def spec(self, root): return None", "spec returned None"),
    "spec-raises": ("    def spec(self, root): return self.y", "failed in spec: AttributeError"),
    "spec-crop": (
        "    def spec(self, root): return DataSpec(class_names=('a',), shape=(1, 4, 4), "
        "test_transform=Transform(channels=1, crop=(5, 5)))",
        "failed in spec: ValidationError",
    ),
    "load-list": (SPEC + "    def load(self, split, root, *, download=False): return [1, 2]", "load returned list"),
    "load-no-pixels": (
        SPEC + "    def load(self, split, root, *, download=False): return MemoryImages(None, np.array([0, 1]))",
        "not a uint8 array",
    ),
    "load-no-paths": (
        SPEC + "    def load(self, split, root, *, download=False): return FileImages(None, np.array([0, 1]))",
        "gave paths that are no sequence of paths: None",
    ),
    "load-numbers-as-paths": (
        SPEC + "    def load(self, split, root, *, download=False): return FileImages([1, 2], np.array([0, 1]))",
        "gave paths that are no sequence of paths: [1, 2]",
    ),
    "load-raises": (
        SPEC + "    def load(self, split, root, *, download=False): raise OSError('gone')",
        "failed in load: OSError",
    ),
    "load-labels": (
        SPEC + "    def load(self, split, root, *, download=False):\n"
        "        return MemoryImages(np.zeros((2, 1, 4, 4), np.uint8), np.array([0, 5]))",
        "from 0 to 5",
    ),
}


@pytest.mark.parametrize(("body", "said"), DATASETS.values(), ids=DATASETS)
def test_a_wrong_data_set(tmp_path, body, said):
    plugin(tmp_path, f"class Wrong(Dataset):\n{body}\n")
    dataset = installed().build("datasets", {"name": "wrong"})
    refused(tmp_path, said, work=lambda: open_split(dataset, spec_of(dataset, tmp_path), "train", tmp_path))


TRAINING = {
    "loss-none": ("Loss", "    def step(self, step): return None", "step returned None"),
    "loss-float": ("Loss", "    def step(self, step): return {'ce': 1.0}", "it must return named scalars"),
    "loss-empty": ("Loss", "    def step(self, step): return {}", "at least one named scalar"),
    "loss-vector": ("Loss", "    def step(self, step): return {'ce': step.noisy_logits[0, 0]}", "{'ce': (10,)}"),
    "loss-detached": ("Loss", "    def step(self, step): return {'ce': step.noisy_logits.detach().sum()}", "without gradients"),
    "loss-unnamed": ("Loss", "    def step(self, step): return {1: step.noisy_logits.sum()}", "it must return named scalars"),
    "loss-raises": ("Loss", "    def step(self, step): raise KeyError('key')", "failed in step: KeyError"),
    "loss-in-place": (
        "Right",
        "    def step(self, step):\n        step.noise.zero_()\n        return super().step(step)",
        "changed the step's noise in place",
    ),
    "loss-setup": ("Right", "    def setup(self, context): return {'x': 1}", "failed in setup: AttributeError"),
    "attack-tensor": ("Attack", "    def perturb(self, step): return step.images", "must return step.moved(images=...)"),
    "attack-shape": ("Attack", "    def perturb(self, step): return step.moved(images=step.images[1:])", "images of shape"),
    "attack-array": ("Attack", "    def perturb(self, step): return step.moved(images=step.images.numpy())", "no tensor of"),
    "attack-double": ("Attack", "    def perturb(self, step): return step.moved(noise=step.noise.double())", "no tensor of"),
    "attack-box": ("Attack", "    def perturb(self, step): return step.moved(images=step.images + 1)", "must be in [0, 1]"),
    "attack-in-place": (
        "Attack",
        "    def perturb(self, step):\n        step.images.mul_(0.5)\n        return step",
        "images and clean in place",
    ),
    "attack-raises": ("Attack", "    def perturb(self, step): raise IndexError('far')", "failed in perturb: IndexError: far"),
    "optimizer": ("Optimizer", "    def build(self, model): return 1 / 0", "failed in build: ZeroDivisionError"),
    "optimizer-none": ("Optimizer", "    def build(self, model): return None", "returned None, which is no optimiser"),
    "schedule-none": ("Schedule", "    def factor(self, epoch, epochs): return None", "a factor = None"),
    "schedule-raises": ("Schedule", "    def factor(self, epoch, epochs): raise TypeError('t')", "failed in factor: TypeError"),
    "logger": ("Logger", "    def open(self, run): raise OSError('full')", "failed in open: OSError"),
    "callback": ("Callback", "    def after_step(self, run, state): raise ValueError('v')", "failed in after_step: ValueError"),
}
SECTION = {"losses": "loss", "attacks": "attack", "optimizers": "optimizer", "schedules": "schedule"}


@pytest.mark.parametrize(("base", "body", "said"), TRAINING.values(), ids=TRAINING)
def test_what_is_wrong_in_training(tmp_path, base, body, said):
    kind = plugin(tmp_path, f"class Wrong({base}):\n{body}\n")
    chosen = f"{SECTION[kind]}.name=wrong" if kind in SECTION else f"{kind}.wrong={{}}"
    more = ["optimizer.lr=0.1"] if kind == "optimizers" else []
    resolved = resolve("digits-gaussian-0.25", sets=[chosen, "epochs=1", *more])
    options = TrainOptions(out=tmp_path / "run", data_dir=tmp_path, device="cpu", workers=0)
    refused(tmp_path, said, work=lambda: train(resolved, options, Silent()))
    assert not (tmp_path / "run/model.safetensors").exists()


def test_requests_to_stop_and_a_lack_of_memory_are_not_the_plugins_fault(tmp_path):
    from rscli.runtime.guard import calling

    noise = installed().build("noises", {"name": "gaussian", "sigma": 0.5})
    for error in (KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: no")):
        with pytest.raises(type(error)), calling(noise, "sample"):
            raise error


def test_an_image_that_cannot_be_certified_says_whose_fault_it_is(tmp_path):
    """A noise of thresholds that are wrong is found before the first sample is drawn."""
    plugin(tmp_path, f"class Wrong(Noise):\n{RIGHT_NOISE}\n    def probability(self, radius): return 0.1\n")
    from rscli.models.smoothed import Smoothed

    noise = installed().build("noises", {"name": "wrong", "sigma": 0.5})
    model = Smoothed(torch.nn.Identity(), noise, ("a", "b"))
    certifier = installed().build("certifiers", {"name": "sequential"})
    refused(tmp_path, "gave 0.1", work=lambda: CertificationTask(model, certifier, lambda index: torch.zeros(1, 2, 2), (0.5,)))
