"""Which device a process uses, without having one: torch.cuda is pretended."""

from __future__ import annotations

import pytest
import torch

from rscli.errors import InputError
from rscli.runtime import devices
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


@pytest.mark.parametrize(
    ("flags", "slow"),
    [
        ("flags : fpu avx2 fma", True),
        ("flags : fpu avx512f avx512_vnni", True),
        ("flags : avx512f avx512_bf16", False),
        ("flags : amx_bf16 amx_tile", False),
        ("Features : fp asimd bf16 i8mm", False),
        ("Features : fp asimd", True),
    ],
)
def test_bf16_that_is_emulated_is_known_and_doctor_says_so(monkeypatch, tmp_path, flags, slow):
    from rscli.doctor import examine

    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    assert devices.emulated("bf16", torch.device("cpu")) is slow
    assert not devices.emulated("bf16", torch.device("cuda"))
    (found,) = [finding.text for finding in examine(tmp_path)["devices"] if finding.text.startswith("cpu:")]
    assert ("slow bf16: emulated" in found) is slow


def test_elsewhere_than_on_linux_torch_is_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "none")
    assert devices.emulated("bf16", torch.device("cpu")) in (True, False)


@pytest.mark.parametrize(("precision", "slow", "warned"), [("bf16", True, 1), ("bf16", False, 0), ("fp32", True, 0)])
def test_a_run_says_before_it_begins_that_bf16_is_slow(monkeypatch, tmp_path, precision, slow, warned):
    from types import SimpleNamespace

    from rscli.runtime.progress import Silent
    from rscli.sampling.options import SamplingOptions, Work

    (tmp_path / "cpuinfo").write_text("flags : avx2" if slow else "flags : avx512_bf16")
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    said = []
    progress = Silent()
    progress.warn = said.append
    model = SimpleNamespace(network=torch.nn.Linear(2, 2), noise=None, shape=(1, 1, 2), classes=2)
    SamplingOptions(device="cpu", precision=precision).sampler(model, Work(10), {}, progress, lambda: False)
    assert len(said) == warned
    assert all("emulated" in text for text in said)
