"""How often certificates are wrong, through the whole engine: noise, batches, counts, looks, bounds and radii.

The base classifier is synthetic: it reads one pixel that holds nothing but noise and cuts the normal distribution into classes,
so that the probability of every class is known exactly. A certificate is wrong if the tested class is less probable than it
says, or another one more probable, or if its radius is larger than the true one. At most alpha of them may be; with `IMAGES`
images, more than `ALLOWED` wrong ones would be seen with probability 1e-5 if alpha were just kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

from rscli.api import ABSTAIN, Certifier, Plan, Question
from rscli.registry import installed
from rscli.results.radius import certified_radius
from rscli.sampling.requests import CertifierRequest
from rscli.sampling.sampler import Sampler
from rscli.stats.sequential import look_schedule
from rscli_core.certifiers.cohen import fixed_n_decision

ALPHA, N, N0, SIGMA, IMAGES = 0.05, 300, 20, 0.5, 1000
ALLOWED = int(binom.isf(1e-5, IMAGES, ALPHA))
GAUSSIAN = installed().build("noises", {"name": "gaussian", "sigma": SIGMA})
RADII = (0.0, 0.25, 0.5, 0.75)
THRESHOLDS = tuple(GAUSSIAN.probability(radius) for radius in RADII)


def classifier(p: tuple[float, ...]):
    """A model that gives class i with probability p[i] to an image of zeros under the noise."""
    edges = torch.tensor(SIGMA * norm.ppf(np.cumsum(p)[:-1]), dtype=torch.float32)
    return lambda images: torch.nn.functional.one_hot(torch.bucketize(images[:, 0, 0, 0], edges), len(p)).float()


def test_the_classifier_has_the_probabilities_that_it_claims():
    votes = classifier((0.5, 0.05, 0.45))(torch.randn(400_000, 1, 1, 1) * SIGMA).mean(0)
    assert votes.tolist() == pytest.approx([0.5, 0.05, 0.45], abs=0.004)


@dataclass(frozen=True)
class Seen:
    """The shares of images that were certified, and certified wrongly."""

    certified: float
    wrong: int


def certify(certifier: Certifier, p: tuple[float, ...], label: int | None) -> Seen:
    """All images through the engine; the seed is fixed, so that the outcome is, too."""
    image = torch.zeros(1, 1, 1)
    question = Question(len(p), THRESHOLDS if certifier.grid else (), label)
    requests = (CertifierRequest(certifier, question, key, lambda: image) for key in range(IMAGES))
    sampler = Sampler(classifier(p), GAUSSIAN, len(p), seed=1, batch=4096, device=torch.device("cpu"))
    certified = wrong = 0
    for request in sampler.run(requests):
        decision = request.decision
        if decision.predict == ABSTAIN:
            continue
        certified += 1
        own, other = p[decision.predict], max(p[: decision.predict] + p[decision.predict + 1 :])
        claim = certified_radius(decision, GAUSSIAN, RADII if certifier.grid else ())
        too_far = claim > GAUSSIAN.radius(own, other) + 1e-12 or own <= other
        wrong += own <= decision.p_a or other > decision.p_b or too_far
    return Seen(certified / IMAGES, wrong)


def build(name: str, **fields) -> Certifier:
    return installed().build("certifiers", {"name": name, "n": N, "n0": N0, "alpha": ALPHA, **fields})


CERTIFIERS = {
    "cohen": build("cohen"),
    "cohen-early": build("cohen", early_abstain=True),
    "sequential": build("sequential"),
    "sequential-all-early": build("sequential", early=1.0),
    "two-sided": build("two-sided"),
    "two-sided-even": build("two-sided", share=0.5),
    "two-stage": build("two-stage", n0=100),
}
SETTINGS = {
    "at-one-half": (0.5, 0.3, 0.2),
    "at-a-radius": (THRESHOLDS[2], (1 - THRESHOLDS[2]) / 2, (1 - THRESHOLDS[2]) / 2),
    "near-tie-of-three": (0.334, 0.333, 0.333),
    "strong-runner-up": (0.5, 0.05, 0.45),
    "saturated": (ALPHA ** (1 / N), 1 - ALPHA ** (1 / N)),
}
"""Probabilities of the classes. The lower bound of a fixed n meets `saturated` when all n samples agree: probability alpha."""


@pytest.mark.parametrize("label", [None, 0], ids=["selected", "label"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("certifier", CERTIFIERS)
def test_wrong_certificates_are_as_rare_as_alpha(certifier, setting, label):
    seen = certify(CERTIFIERS[certifier], SETTINGS[setting], label)
    assert seen.wrong <= ALLOWED, f"{seen.wrong} of {IMAGES} are wrong; {ALLOWED} may be"


TIGHT = {"cohen": "saturated", "two-sided": "at-one-half", "two-stage": "at-one-half", "sequential": "at-a-radius"}
"""Settings in which a certifier makes use of its alpha: there the tests above would see if it took more."""


@pytest.mark.parametrize(("certifier", "setting"), TIGHT.items())
def test_the_settings_are_adversarial(certifier, setting):
    assert certify(CERTIFIERS[certifier], SETTINGS[setting], 0).wrong > IMAGES * ALPHA / 4


def test_certificates_that_should_be_given_are_given():
    for certifier in CERTIFIERS.values():
        assert certify(certifier, (0.9, 0.05, 0.05), None).certified > 0.99
    assert certify(CERTIFIERS["two-sided"], (0.45, 0.1, 0.1, 0.1, 0.1, 0.15), 0).certified > 0.9
    assert certify(CERTIFIERS["cohen"], (0.45, 0.1, 0.1, 0.1, 0.1, 0.15), 0).certified < 0.01


class Peeking(Certifier):
    """Takes a bound for a fixed n, at full alpha, look after look: unsound."""

    def plan(self, counts, question):
        return Plan(0, look_schedule(self.n))

    def decide(self, counts, n, plan):
        decision = fixed_n_decision(int(counts[0]), n, 0, self.alpha)
        return decision if n == self.n or decision.predict != ABSTAIN else None


def test_an_unsound_certifier_is_caught():
    assert certify(Peeking(n=N, n0=N0, alpha=ALPHA), SETTINGS["at-one-half"], 0).wrong > ALLOWED
