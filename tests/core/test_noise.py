"""The Gaussian noise: its samples, and its radii against 40-digit quantiles."""

from __future__ import annotations

import subprocess
import sys
from statistics import NormalDist

import mpmath
import numpy as np
import pytest
from pydantic import ValidationError

from rscli.errors import InputError
from rscli.stats import bounds
from rscli_core.noises.gaussian import Gaussian


def quantile(p: float) -> float:
    """PhiInv(p) of the exact float p, by root finding with 40 digits from the standard library's approximation."""
    with mpmath.workdps(40):
        start = mpmath.mpf(NormalDist().inv_cdf(p))
        return float(mpmath.findroot(lambda z: mpmath.erfc(z / mpmath.sqrt(2)) / 2 - (1 - mpmath.mpf(p)), start))


@pytest.mark.parametrize("sigma", [0.25, 1.0])
@pytest.mark.parametrize("p", [0.5, 0.500001, 0.75, 0.8646, 0.8647, 0.99, 0.999999, 1 - 2**-40])
def test_radius_is_sigma_times_the_quantile(p, sigma):
    assert Gaussian(sigma=sigma).radius(p, 1 - p) == pytest.approx(sigma * quantile(p), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("n", "largest"), [(10**4, 3.199), (10**5, 3.811), (10**6, 4.347)])
def test_largest_radius_of_n_samples(n, largest):
    p = bounds.lower(n, n, 0.001)
    assert Gaussian(sigma=0.5).radius(p, 1 - p) == pytest.approx(0.5 * largest, abs=3e-4)


def test_two_sided_radius():
    noise = Gaussian(sigma=2.0)
    assert noise.radius(0.4, 0.1) == pytest.approx(1.0 * (quantile(0.9) - quantile(0.6)), rel=1e-12)
    assert noise.radius(0.8, 0.1) > noise.radius(0.8, 0.2)
    assert noise.radius(0.9, 0.1) > noise.radius(0.8, 0.1)


@pytest.mark.parametrize(("p_a", "p_b"), [(0.5, 0.5), (0.4, 0.6), (0.0, 1.0), (0.0, 0.0), (1.0, 1.0)])
def test_no_radius_without_a_gap(p_a, p_b):
    assert Gaussian(sigma=1).radius(p_a, p_b) == 0.0


@pytest.mark.parametrize(("p_a", "p_b"), [(1.0, 0.0), (1.0, 0.5), (0.5, 0.0), (-0.1, 0.0), (1.1, 0.0), (float("nan"), 0.1)])
def test_infinite_and_impossible_radii_are_refused(p_a, p_b):
    with pytest.raises(InputError):
        Gaussian(sigma=1).radius(p_a, p_b)


@pytest.mark.parametrize("sigma", [0.12, 0.25, 0.5, 1.0])
def test_probability_inverts_the_radius_and_never_falls_short(sigma):
    noise = Gaussian(sigma=sigma)
    assert noise.probability(0) == 0.5
    for radius in np.arange(1, 17) * sigma / 4:
        p = noise.probability(float(radius))
        assert quantile(p) * sigma == pytest.approx(radius, rel=1e-9)
        assert radius <= noise.radius(p, 1 - p) <= radius * (1 + 1e-9)
    for radius in (0.25, 0.5, 0.75):  # the radii of every table
        p = noise.probability(radius)
        assert p == 1 or noise.radius(p, 1 - p) >= radius


def test_probability_beyond_what_floats_hold_is_one():
    assert Gaussian(sigma=0.1).probability(5.0) == 1.0


@pytest.mark.parametrize("radius", [-0.1, float("nan"), float("inf")])
def test_probability_of_no_radius_is_refused(radius):
    with pytest.raises(InputError):
        Gaussian(sigma=1).probability(radius)


@pytest.mark.parametrize("sigma", [0, -1, float("nan"), float("inf")])
def test_sigma_is_positive_and_finite(sigma):
    with pytest.raises(ValidationError):
        Gaussian(sigma=sigma)


def test_samples_are_gaussian_of_the_wanted_size_and_repeatable():
    import torch

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return Gaussian(sigma=0.25).sample((50, 3, 20, 20), generator=generator, device=torch.device("cpu"))

    noise = draw(1)
    assert noise.shape == (50, 3, 20, 20)
    assert noise.dtype == torch.float32
    # 60,000 values: the mean has standard error .001, the deviation .0007
    assert float(noise.mean()) == pytest.approx(0, abs=0.005)
    assert float(noise.std()) == pytest.approx(0.25, abs=0.004)
    assert float((noise.abs() < 0.25).float().mean()) == pytest.approx(0.6827, abs=0.01)
    assert torch.equal(noise, draw(1))
    assert not torch.equal(noise, draw(2))


def test_listing_the_plugins_needs_no_torch():
    imports = "import sys, rscli_core.noises.gaussian, rscli_core.certifiers.cohen"
    code = f"{imports}; print({{'torch', 'scipy.stats'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
