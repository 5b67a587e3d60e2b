"""Random numbers of a step: the same for an image however the images are shared out, and new ones for everything else."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from rscli.api import Noise
from rscli.errors import PluginError
from rscli.training.draws import ROWS, StepDraws
from rscli_core.noises.gaussian import Gaussian

SHAPE, CPU = (2, 3, 3), torch.device("cpu")


class Scaling(Noise):
    """Uniform factors: a distribution that is not additive."""

    norm = "L2"

    def sample(self, shape, *, generator, device) -> Tensor:
        return 1 + self.sigma * (2 * torch.rand(tuple(shape), generator=generator, device=device) - 1)

    def apply(self, images, noise, *, out=None) -> Tensor:
        return torch.mul(images, noise, out=out)


class Flat(Noise):
    """Forgets the copies."""

    norm = "L2"

    def sample(self, shape, *, generator, device) -> Tensor:
        return torch.zeros(tuple(shape)[1:], device=device)


def draws(first: int = 0, end: int = 40, size: int = 40, *, noise: Noise | None = None, seed: int = 7, key=("step", 0, 0, 0)):
    return StepDraws(noise or Gaussian(sigma=0.5), SHAPE, first=first, end=end, size=size, seed=seed, key=key, device=CPU)


def calls(one: StepDraws) -> list[Tensor]:
    """What several calls give, the images in the first dimension."""
    return [one.noise(3).transpose(0, 1), one.uniform(), one.noise(1).transpose(0, 1), one.uniform(2, 3)]


@st.composite
def partitions(draw) -> list[int]:
    """The edges of contiguous slices, none empty, of up to 70 images."""
    size = draw(st.integers(1, 70))
    inner = draw(st.sets(st.integers(1, size), max_size=6)) - {size}
    return [0, *sorted(inner), size]


@settings(deadline=None, max_examples=60)
@given(edges=partitions(), noise=st.sampled_from([Gaussian(sigma=0.5), Scaling(sigma=0.3)]))
def test_slices_put_together_are_the_whole(edges, noise):
    size = edges[-1]
    whole = calls(draws(0, size, size, noise=noise))
    parts = [calls(draws(first, end, size, noise=noise)) for first, end in pairwise(edges)]
    for number, wanted in enumerate(whole):
        assert torch.equal(torch.cat([part[number] for part in parts]), wanted)


@settings(deadline=None, max_examples=30)
@given(world=st.integers(1, 5), pieces=st.integers(1, 4), size=st.integers(20, 70))
def test_processes_and_their_micro_batches(world, pieces, size):
    found = []
    for rank in range(world):
        low, high = rank * size // world, (rank + 1) * size // world
        edges = sorted({low + (high - low) * piece // pieces for piece in range(pieces + 1)})
        found += [draws(first, end, size).noise(2) for first, end in pairwise(edges)]
    assert torch.equal(torch.cat(found, 1), draws(0, size, size).noise(2))


def test_calls_of_other_kinds_are_numbered_together():
    """Whoever asks for uniform numbers first gets other noise then: processes must make the same calls, in the same order."""
    one, other, third = draws(), draws(), draws()
    one.uniform()
    assert not torch.equal(one.noise(1), other.noise(1))
    third.noise(7)
    third.noise(1)
    assert torch.equal(one.uniform(), third.uniform())


def test_everything_that_differs_gives_other_numbers():
    """Calls, images, copies, seeds; and each part of the key: epoch, batch, chunk."""
    again = draws()
    found = [*(again.noise(1) for _ in range(3))]
    found += [draws(key=key).noise(1) for key in [("step", 1, 0, 0), ("step", 0, 1, 0), ("step", 0, 0, 1), ("trial", 0, 0, 0)]]
    found += [draws(seed=8).noise(1), draws(seed=70).noise(1)]
    rows = torch.cat([each[0] for each in found]).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows) == 40 * len(found)
    copies = draws().noise(5).flatten(2).flatten(0, 1)
    assert len(copies.unique(dim=0)) == 200
    assert torch.equal(draws().noise(5), draws().noise(5))


def test_no_block_repeats_another():
    """Neighbours in one block and in the next one are uncorrelated: |r| < 5 / sqrt(number of values)."""
    noise = draws(0, 4 * ROWS, 4 * ROWS, noise=Gaussian(sigma=1)).noise(400).transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(noise) - torch.eye(4 * ROWS)
    assert correlation.abs().max() < 5 / noise.shape[1] ** 0.5


@pytest.mark.parametrize("edges", [(0, 512), (3, 515)])
def test_the_distribution(edges):
    one = draws(*edges, size=600, noise=Gaussian(sigma=0.25))
    noise, uniform = one.noise(8).flatten().double(), one.uniform(100).flatten().double()
    n = len(noise)
    assert abs(noise.mean()) < 4 * 0.25 / n**0.5
    assert abs(noise.std() / 0.25 - 1) < 4 / (2 * n) ** 0.5
    assert stats.kstest(noise.numpy() / 0.25, "norm").pvalue > 1e-3
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3
    assert 0 <= uniform.min() <= uniform.max() < 1


def test_noise_of_another_shape_is_refused_by_name():
    with pytest.raises(PluginError, match=r"Flat breaks its contract: sample returned noise of \(16, 2, 3, 3\)"):
        draws(noise=Flat(sigma=1)).noise(2)
