"""Several processes compute what one computes: every loss with every attack, with and without batch normalisation.

In float64 weights and statistics agree to 1e-9 after two steps, so that nothing hides behind rounding.
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from peers import CASES, peer, two_steps
from rscli.training.processes import Processes


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize(("world", "images"), [(2, 7), (3, 20), (3, 2)], ids=["2", "3", "3, more than images"])
def test_every_loss_and_attack_is_the_same_on_several_processes(tmp_path: Path, world: int, images: int):
    out = tmp_path / "found.pt"
    multiprocessing.spawn(peer, (world, free_port(), images, str(out)), nprocs=world)
    together = torch.load(out, weights_only=True)
    for case, theirs in zip(CASES, together, strict=True):
        ours = two_steps(Processes(), case, images)
        for name, value in ours.items():
            assert torch.allclose(value.double(), theirs[name].double(), rtol=1e-9, atol=1e-9), (case, name)


@pytest.mark.parametrize("case", [case for case in CASES if not case[2]], ids=lambda case: f"{case[0]}-{case[1]}")
def test_micro_batches_give_the_same_gradient(case):
    """Without batch normalisation, whose statistics are those of a micro-batch."""
    whole, parts = two_steps(Processes(), case, 20), two_steps(Processes(), case, 20, parts=3)
    assert all(torch.allclose(whole[name], parts[name], rtol=1e-9, atol=1e-9) for name in whole)
