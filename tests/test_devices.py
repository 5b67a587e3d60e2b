"""Which device a process uses, without having one: torch.cuda is pretended."""

from __future__ import annotations

import pytest
import torch

from rscli.errors import InputError
from rscli.runtime.devices import pick_device


@pytest.fixture
def four_gpus(monkeypatch):
    """Four GPUs that can be chosen, but not computed on; returns what became the current device."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    monkeypatch.setattr(torch, "Generator", lambda device: None)
    return current


@pytest.mark.parametrize(
    ("name", "local", "wanted"),
    [
        ("auto", "0", "cuda:0"),
        ("auto", "3", "cuda:3"),
        ("cuda", "2", "cuda:2"),
        ("cuda:1", "0", "cuda:1"),
        ("cuda", "5", "cuda:1"),
    ],
)
def test_each_rank_has_a_gpu_of_its_own_and_makes_it_the_current_one(four_gpus, monkeypatch, name, local, wanted):
    monkeypatch.setenv("LOCAL_RANK", local)
    assert pick_device(name) == torch.device(wanted)
    assert four_gpus == [torch.device(wanted)]


@pytest.mark.parametrize("name", ["cuda:77", "meta", "toaster", ""])
def test_a_device_that_cannot_be_used_is_named(name):
    with pytest.raises(InputError, match=f"device '{name}'"):
        pick_device(name)
