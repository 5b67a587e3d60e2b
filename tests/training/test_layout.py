"""The layout of training on a CPU: never one in which a convolution's gradient is wrong, or the process crashes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from rscli.errors import InputError
from rscli.runtime.progress import Silent
from rscli.training.layout import training_layout, unsafe_in_channels_last
from rscli.training.run_folder import RunFolder

CPU = torch.device("cpu")


@given(st.integers(1, 40), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, (1, 2), 3]), st.sampled_from([1, 2]))
def test_what_is_unsafe(channels, kernel, stride, groups):
    channels *= groups
    network = nn.Sequential(nn.Conv2d(channels, 6 * groups, kernel, stride, groups=groups), nn.Linear(2, 2))
    unsafe = kernel == 1 and stride != 1 and channels < 16 and groups == 1
    assert unsafe_in_channels_last(network) == ("0" if unsafe else None)
    layout = torch.contiguous_format if unsafe else torch.channels_last
    assert training_layout(network, CPU, None) is layout
    assert training_layout(network, CPU, False) is torch.contiguous_format
    assert training_layout(network, torch.device("cuda"), True) is torch.channels_last
    if unsafe:
        with pytest.raises(InputError, match="--channels-last is not safe on a CPU"):
            training_layout(network, CPU, True)


GRADIENTS = """
import sys, torch
from torch import nn
from rscli.training.layout import training_layout
worst = 0.0
for channels in [1, 2, 3, 4, 8, 12, 15, 16, 17, 24]:
    for out, stride, batch in [(8, 2, 2), (48, 2, 3), (8, 3, 4), (5, (1, 2), 2)]:
        layer = nn.Conv2d(channels, out, 1, stride=stride)
        exact = nn.Conv2d(channels, out, 1, stride=stride).double()
        exact.load_state_dict(layer.state_dict())
        layout = training_layout(layer, torch.device("cpu"), None)
        layer = layer.to(memory_format=layout)
        images, twin = torch.rand(batch, channels, 32, 32), None
        twin = images.double().requires_grad_()
        images = images.contiguous(memory_format=layout).requires_grad_()
        weights = torch.randn_like(exact(twin))
        (exact(twin) * weights).sum().backward()
        (layer(images) * weights.float()).sum().backward()
        for mine, theirs in ((layer.weight, exact.weight), (images, twin)):
            worst = max(worst, float((mine.grad - theirs.grad).abs().max() / theirs.grad.abs().max()))
print(worst)
"""


def test_strided_1x1_convolutions_have_the_gradients_of_float64():
    """In a process of its own, forty of them: in channels_last those with fewer than 16 channels crash it, or tear its heap."""
    done = subprocess.run([sys.executable, "-c", GRADIENTS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["timm/repvgg_a0", "timm/fastvit_t8"])
def test_the_networks_that_crashed_train(tmp_path, arch):
    source = np.random.default_rng(0)
    for split, name, number in [(s, n, k) for s in ("train", "test") for n in ("a", "b") for k in range(2)]:
        path = tmp_path / "pets" / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    sets = ["data.name=imagefolder", f"data.path={tmp_path / 'pets'}", "data.size=64", f"arch.name={arch}", "noise.sigma=0.25"]
    sets += ["loss.name=gaussian", "optimizer.lr=0.01", "epochs=1", "batch=2"]
    command = [sys.executable, "-m", "rscli", "train", "--device", "cpu", "--workers", "0", "--out", str(tmp_path / "run")]
    command += [word for one in sets for word in ("--set", one)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/model.safetensors").exists()


# --- a process that dies of a signal -----------------------------------------------------------------------------------------

CRASHING = """
import os, signal, sys
from rscli.training.run import TrainingRun
number = int(sys.argv.pop())
def crash(*_, **__):
    os.kill(os.getpid(), number)
TrainingRun.complete = crash
from rscli.cli.app import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGKILL])
def test_a_run_that_dies_of_a_signal_says_so_and_what_to_try(tmp_path, number):
    run = ["train", "--preset", "digits-gaussian-0.25", "--set", "epochs=1", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", CRASHING, *run, str(int(number))], capture_output=True, text=True, timeout=120)
    assert done.returncode == -number
    if number != signal.SIGKILL:
        assert "Fatal Python error" in done.stderr
    left = (tmp_path / "running.txt").read_text()
    assert "--resume" in left
    assert "--contiguous" in left
    done = subprocess.run([sys.executable, "-m", "rscli", *run, "--resume"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "the previous run was killed, or crashed" in " ".join(done.stderr.split())
    assert not (tmp_path / "running.txt").exists()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["epoch"] == 1


def test_the_mark_of_a_running_process_goes_with_it_whatever_python_raises(tmp_path: Path):
    folder = RunFolder(tmp_path)

    def fail() -> None:
        assert str(os.getpid()) in folder.running.read_text()
        raise KeyError

    with pytest.raises(KeyError), folder.at_work(Silent()):
        fail()
    assert [each.name for each in tmp_path.iterdir()] == ["failed.txt"]  # which says why
