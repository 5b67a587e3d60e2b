"""CERTIFY: its plan, its decisions, and its error over repeated certifications."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from scipy import stats

from rscli.api import ABSTAIN, Plan, Question
from rscli_core.certifiers.cohen import Cohen
from rscli_core.noises.gaussian import Gaussian


def counts(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_defaults_are_the_field_s():
    certifier = Cohen()
    assert (certifier.n0, certifier.n, certifier.alpha) == (100, 100_000, 0.001)
    assert certifier.selection(Question(classes=10)) == 100


@pytest.mark.parametrize(
    ("selected", "expected"), [((3, 90, 7), 1), ((50, 50, 0), 0), ((0, 50, 50), 1), ((0, 0, 100), 2)], ids=str
)
def test_the_most_frequent_class_is_tested_the_lowest_on_ties(selected, expected):
    assert Cohen(n=500).plan(counts(*selected), Question(classes=3)) == Plan(expected, (500,))


def test_a_given_label_is_tested_without_selection_samples():
    question = Question(classes=3, label=2)
    assert Cohen().selection(question) == 0
    assert Cohen(n=500).plan(counts(0, 0, 0), question) == Plan(2, (500,))


@pytest.mark.parametrize("hits", [6000, 9000, 9999])
def test_the_bound_is_the_beta_quantile(hits):
    decision = Cohen(n=10_000).decide(counts(10_000 - hits, hits), 10_000, Plan(1, (10_000,)))
    assert decision.predict == 1
    assert decision.p_a == pytest.approx(stats.beta.ppf(0.001, hits, 10_000 - hits + 1), rel=1e-11)
    assert decision.p_b == 1 - decision.p_a
    assert (decision.reason, decision.saturated) == ("n-reached", False)


def test_unanimous_samples_are_saturated_and_give_the_largest_radius():
    decision = Cohen().decide(counts(0, 100_000), 100_000, Plan(1, (100_000,)))
    assert decision.saturated
    assert Gaussian(sigma=1).radius(decision.p_a, decision.p_b) == pytest.approx(3.811, abs=5e-4)


def test_the_least_certified_count_of_a_hundred_thousand():
    plan = Plan(0, (100_000,))  # docs/certification.md: the fixed test at 1/2 needs 50,490
    assert Cohen().decide(counts(50_489, 49_511), 100_000, plan).predict == ABSTAIN
    assert Cohen().decide(counts(50_490, 49_510), 100_000, plan).predict == 0


@pytest.mark.parametrize("hits", [0, 3000, 5000, 5100])
def test_below_a_half_it_abstains_with_radius_zero(hits):
    decision = Cohen(n=10_000).decide(counts(hits, 10_000 - hits), 10_000, Plan(0, (10_000,)))
    assert (decision.predict, decision.reason, decision.saturated) == (ABSTAIN, "below-half", False)
    assert decision.p_a < 0.5
    assert Gaussian(sigma=1).radius(decision.p_a, decision.p_b) == 0.0


def test_a_bound_of_exactly_one_half_is_certified_with_radius_zero():
    decision = Cohen(n=2, alpha=0.25).decide(counts(2, 0), 2, Plan(0, (2,)))  # L = .25^(1/2)
    assert (decision.predict, decision.p_a) == (0, 0.5)
    assert Gaussian(sigma=1).radius(decision.p_a, decision.p_b) == 0.0


@pytest.mark.parametrize(
    "p", [(0.5, 0.5, 0.0), (0.34, 0.33, 0.33), (0.5, 0.05, 0.45), (0.55, 0.45, 0.0), (0.9999, 0.0001, 0.0)], ids=str
)
def test_wrong_certificates_are_as_rare_as_alpha(p):
    """A certificate is wrong if it names a class whose probability is below its bound p_a, whichever class was selected."""
    rng, trials, alpha = np.random.default_rng(7), 4000, 0.01
    certifier = Cohen(n0=20, n=1000, alpha=alpha)
    wrong = 0
    for selected, fresh in zip(rng.multinomial(20, p, trials), rng.multinomial(1000, p, trials), strict=True):
        plan = certifier.plan(selected, Question(classes=3))
        decision = certifier.decide(fresh, 1000, plan)
        wrong += decision.predict != ABSTAIN and p[decision.predict] < decision.p_a
    assert wrong <= trials * alpha + 4 * sqrt(trials * alpha)  # 4 standard deviations above alpha
