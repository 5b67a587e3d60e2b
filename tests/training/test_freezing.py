"""Freezing: what needs no gradient, what keeps its statistics, and what is said of patterns that name nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rscli.api import DataSpec, TrainStep, Transform
from rscli.config.layers import resolve
from rscli.errors import InputError
from rscli.models.modelfile import read_model
from rscli.models.network import Classifier, build_classifier, head_of
from rscli.registry import installed
from rscli.runtime.progress import Silent
from rscli.training.freezing import freeze
from rscli.training.train import TrainOptions, train
from rscli.training.trainer import initial_classifier

SPEC = DataSpec(class_names=("a", "b", "c"), shape=(3, 32, 32), test_transform=Transform(channels=3, crop=(32, 32)))


def resnet(*patterns: str) -> Classifier:
    architecture = installed().build("architectures", {"name": "cifar-resnet", "depth": 8})
    classifier = build_classifier(architecture, SPEC)
    freeze(classifier, patterns, lambda: head_of(architecture, SPEC))
    return classifier


def frozen(classifier: Classifier) -> set[str]:
    return {name for name, parameter in classifier.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "begins", "kept"),
    [
        (["network.layer1.*"], ("network.layer1.",), {"network.layer1.0.bn1", "network.layer1.0.bn2"}),
        (["layer1"], ("network.layer1.",), {"network.layer1.0.bn1", "network.layer1.0.bn2"}),
        (["bn1", "conv1"], ("network.bn1.", "network.conv1."), {"network.bn1"}),
        (["bn1.weight"], ("network.bn1.weight",), set()),  # half of a layer: it goes on to learn, and to count
        (["fc.bias"], ("network.fc.bias",), set()),
    ],
)
def test_patterns(patterns, begins, kept):
    classifier = resnet(*patterns)
    assert frozen(classifier) == {name for name, _ in classifier.named_parameters() if name.startswith(begins)}
    classifier.train()
    assert {n for n, m in classifier.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.training} == kept
    assert set(classifier.kept) == kept


def test_wildcards_take_every_batch_norm():
    classifier = resnet("*.bn*", "*downsample.1*")
    assert all(not m.training for m in classifier.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(p.requires_grad for n, p in classifier.named_parameters() if ".conv" in n or ".fc." in n)


def test_all_but_the_head():
    classifier = resnet("all but the head")
    assert {name for name, p in classifier.named_parameters() if p.requires_grad} == {"network.fc.weight", "network.fc.bias"}
    assert len(classifier.kept) == sum(isinstance(m, nn.BatchNorm2d) for m in classifier.modules())
    (said,) = classifier.start.notes
    assert said.startswith("frozen: 27 of 29 tensors (")
    assert said.endswith("parameters), and the statistics of 9 normalisation layers")


def test_statistics_without_parameters_are_kept_if_they_are_named():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(4 * 30 * 30, 3))
    for pattern, kept in (("1", ("network.1",)), ("0", ())):
        classifier = Classifier(copy.deepcopy(network), SPEC)
        freeze(classifier, [pattern], lambda: ())
        assert classifier.kept == kept


@pytest.mark.parametrize(
    ("pattern", "near"), [("layr1", "layer1"), ("network.layer4.*", "layer3"), ("zzz", "Its parts are: conv1, bn1, layer1")]
)
def test_a_pattern_that_names_nothing(pattern, near):
    with pytest.raises(InputError, match="freeze: nothing is called") as error:
        resnet(pattern)
    assert near in error.value.hint


def test_something_must_be_left():
    with pytest.raises(InputError, match="leaves no parameter to train"):
        resnet("*")


def test_an_attack_leaves_frozen_layers_as_they_are():
    classifier = resnet("layer1", "bn1")
    classifier.train()
    modes, needs = {n: m.training for n, m in classifier.named_modules()}, frozen(classifier)
    images = torch.rand(2, *SPEC.shape)
    noise = installed().build("noises", {"name": "gaussian", "sigma": 0.5})
    labels = torch.zeros(2, dtype=torch.int64)
    step = TrainStep(classifier, images, images, labels, labels, images[None], noise, torch.Generator())
    with step.frozen():
        assert not any(module.training for module in classifier.modules())
    assert {n: m.training for n, m in classifier.named_modules()} == modes
    assert frozen(classifier) == needs


def test_a_copy_stays_frozen():
    classifier = copy.deepcopy(resnet("layer1")).train()
    assert not classifier.network.layer1[0].bn1.training
    assert classifier.network.layer2[0].bn1.training


@pytest.mark.parametrize("loss", ["gaussian", "consistency"])
def test_a_run_changes_nothing_that_is_frozen(tmp_path, loss):
    """Weights and statistics alike, to the bit; with momentum and weight decay, and through a stop of the engine's modes."""
    sets = ["data.name=digits", "arch.name=cifar-resnet", "arch.depth=8", "noise.sigma=0.5", f"loss.name={loss}", "epochs=2"]
    sets += ["optimizer.lr=0.05", "optimizer.weight_decay=0.1", "batch=720", 'freeze=["layer*", "bn1", "conv1.weight"]']
    sets += ["loss.lbd=5", "loss.m=2"] if loss == "consistency" else []
    resolved = resolve(sets=sets)
    before = initial_classifier(resolved, resolved.dataset.spec(tmp_path)).network.state_dict()
    model = train(resolved, TrainOptions(out=tmp_path / "run", data_dir=tmp_path, device="cpu", workers=0), Silent())
    after, _ = read_model(model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"fc.weight", "fc.bias"}
