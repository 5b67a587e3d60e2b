"""bench/train_cost.py: that it measures what it says; its figures are for a quiet machine to tell."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from support import ROOT

PATH = ROOT / "bench" / "train_cost.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("train_cost", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_is_measured_on_both_networks_at_full_effort(bench):
    networks = {"LeNet/MNIST": 431_080, "ResNet-20/CIFAR-10": 272_474}
    assert bench.SETUPS.keys() == networks.keys()
    for name, setup in bench.SETUPS.items():
        assert list(setup) == ["gaussian", "stability", "macer", "cons", "smoothadv", "smoothadv-cons"]
        for method, preset in setup.items():
            trainer = bench.last_epoch_trainer(*preset, 8, CPU)
            assert sum(p.numel() for p in trainer.classifier.parameters()) == networks[name]
            assert trainer.resolved.noise.sigma == 0.5
            assert trainer.lr_factor == pytest.approx(0.01)
            attack = trainer.resolved.attack
            assert (attack is not None) is method.startswith("smoothadv")
            assert attack is None or attack.epsilon_at(trainer.epoch) == attack.epsilon


def test_ratios_are_to_gaussian_in_the_same_round(bench, monkeypatch):
    setup = {method: bench.SETUPS["LeNet/MNIST"][method] for method in ("gaussian", "cons")}
    clock = iter([1.0, 2.0, 10.0, 30.0, 2.0, 8.0])  # gaussian, cons; three rounds on a machine whose speed drifts
    monkeypatch.setattr(bench, "epoch_seconds", lambda trainer: next(clock))
    found = bench.measure(setup, 8, 3, CPU)
    assert found["gaussian"] == {"m": 1, "ratio": 1, "least": 1, "most": 1, "images_per_s": 8 / 2}
    assert found["cons"] == {"m": 2, "ratio": 3, "least": 2, "most": 4, "images_per_s": 8 / 8}


def test_an_epoch_is_all_images(bench):
    trainer = bench.last_epoch_trainer(*bench.SETUPS["LeNet/MNIST"]["cons"], 300, CPU)
    assert bench.epoch_seconds(trainer) > 0
    assert (trainer.batch, trainer.meter.images) == (2, 300)
