"""The certifiers beyond CERTIFY: what they decide, and how often they are wrong against an adversary."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats
from scipy.special import ndtr, ndtri

from rscli.api import ABSTAIN, Certifier, Decision, Plan, Question
from rscli.errors import InputError
from rscli.stats import bounds, sequential
from rscli_core.certifiers.cohen import Cohen
from rscli_core.certifiers.sequential import Sequential
from rscli_core.certifiers.two_sided import TwoSided
from rscli_core.certifiers.two_stage import TwoStage
from rscli_core.noises.gaussian import Gaussian

NOISE = Gaussian(sigma=0.5)
RADII = tuple(0.25 * i for i in range(6))
GRID = tuple(NOISE.probability(radius) for radius in RADII)


def counts(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def certify(certifier: Certifier, p: tuple[float, ...], question: Question, rng: np.random.Generator) -> tuple[Decision, int]:
    """One image whose classes have probabilities `p`, sampled as the engine does: the decision, and the fresh samples used."""
    plan = certifier.plan(rng.multinomial(certifier.selection(question), p), question)
    total, before = np.zeros(len(p), np.int64), 0
    if not plan.looks:
        return certifier.decide(total, 0, plan), 0
    for n in plan.looks:
        total = total + rng.multinomial(n - before, p)
        before = n
        decision = certifier.decide(total, n, plan)
        if decision is not None:
            return decision, n
    raise AssertionError("undecided at the last look")


def is_wrong(decision: Decision, p: tuple[float, ...], *, exceeds: bool) -> bool:
    """Whether a certificate says what is not so: p_a too high, or another class above p_b. `exceeds`: p > p_a was claimed."""
    if decision.predict == ABSTAIN:
        return False
    own = p[decision.predict]
    others = max(q for c, q in enumerate(p) if c != decision.predict)
    return own < decision.p_a or (exceeds and own == decision.p_a) or others > decision.p_b + 1e-15


# --- error against an adversary ----------------------------------------------------------------------------------------------

ADVERSARIES = {
    "at 1/2": (0.5, 0.5, 0.0),
    "at a threshold": (GRID[2], 1 - GRID[2], 0.0),
    "at the highest threshold": (GRID[-1], 1 - GRID[-1], 0.0),
    "three near-ties": (0.34, 0.33, 0.33),
    "a strong runner-up": (0.5, 0.05, 0.45),
    "two classes near 1/2": (0.49, 0.48, 0.03),
    "saturated": (0.9999, 0.0001, 0.0),
}
CERTIFIERS = {
    "cohen-early": Cohen(n0=20, n=500, alpha=0.01, early_abstain=True),
    "sequential": Sequential(n0=20, n=500, alpha=0.01, first_look=20),
    "sequential-greedy": Sequential(n0=20, n=500, alpha=0.01, first_look=5, growth=1.5, early=1.0, futility=1e-6),
    "two-sided": TwoSided(n0=20, n=500, alpha=0.01),
    "two-stage": TwoStage(n0=50, n=500, alpha=0.01, radius_tolerance=0.3),
}


@pytest.mark.parametrize("p", ADVERSARIES.values(), ids=ADVERSARIES)
@pytest.mark.parametrize("certifier", CERTIFIERS.values(), ids=CERTIFIERS)
def test_wrong_certificates_are_as_rare_as_alpha(certifier, p):
    rng, trials = np.random.default_rng(8), 1000
    exceeds = isinstance(certifier, Sequential)
    selected, labelled = Question(3, GRID), Question(3, GRID, label=0)  # by turns
    questions = [selected, labelled] * (trials // 2)
    wrong = sum(is_wrong(certify(certifier, p, question, rng)[0], p, exceeds=exceeds) for question in questions)
    assert wrong <= stats.binom.isf(1e-5, trials, certifier.alpha)  # a right certifier fails one run in 100,000


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 2, 4], ids=["r=0", "r=.5", "r=1"])
def test_sequential_error_at_a_threshold_in_detail(level):
    rng, trials = np.random.default_rng(9), 15_000
    certifier = Sequential(n=400, alpha=0.01, first_look=10)
    p, question = (GRID[level], 1 - GRID[level]), Question(classes=2, thresholds=GRID, label=0)
    wrong = sum(is_wrong(certify(certifier, p, question, rng)[0], p, exceeds=True) for _ in range(trials))
    assert wrong <= trials * 0.01 + 4 * sqrt(trials * 0.01)
    assert wrong >= 0.3 * trials * 0.01  # and alpha is made use of


def test_the_simulation_can_fail():
    """Looking again and again at full alpha, which is unsound, is caught by the same simulation."""

    class Peeking(Cohen):
        def plan(self, selected, question):
            return Plan(0, sequential.look_schedule(self.n, 20))

        def decide(self, seen, n, plan):
            decision = super().decide(seen, plan.looks[-1], plan) if n == plan.looks[-1] else None
            bound = bounds.lower(int(seen[0]), n, self.alpha)
            return Decision(0, bound, 1 - bound, "peeked") if bound > 0.5 else decision

    rng = np.random.default_rng(8)
    certifier, p = Peeking(n=500, alpha=0.01), (0.5, 0.5)
    wrong = sum(is_wrong(certify(certifier, p, Question(classes=2), rng)[0], p, exceeds=False) for _ in range(1000))
    assert wrong > stats.binom.isf(1e-5, 1000, 0.01)


# --- sequential --------------------------------------------------------------------------------------------------------------


def test_sequential_certifies_grid_radii_exactly():
    rng = np.random.default_rng(10)
    decision, n = certify(Sequential(), (0.95, 0.05), Question(classes=2, thresholds=GRID), rng)
    # PhiInv(.95) = 1.645 sigma: .82 at sigma .5
    assert (decision.predict, decision.reason, decision.saturated) == (0, "gave-up", False)
    assert NOISE.radius(decision.p_a, decision.p_b) == pytest.approx(0.75, rel=1e-9)
    assert decision.p_a == GRID[3]
    assert n < 10_000


def test_sequential_stops_at_the_largest_wanted_radius():
    decision, n = certify(Sequential(), (1.0, 0.0), Question(classes=2, thresholds=GRID), np.random.default_rng(0))
    assert (decision.predict, decision.reason, decision.saturated, decision.p_a) == (0, "all-radii", True, GRID[-1])
    assert n < 2500  # 1.25 is 2.5 sigma: all of log(.0001)/log(.9938) = 1500 samples or so must be hits


def test_sequential_gives_up_on_the_wrong_class():
    decision, n = certify(Sequential(), (0.1, 0.9), Question(classes=2, thresholds=GRID, label=0), np.random.default_rng(0))
    assert decision == Decision(ABSTAIN, 0.0, 1.0, "gave-up")
    assert n == 50


def test_sequential_decides_at_the_last_look():
    certifier = Sequential(n=100)
    question = Question(classes=2, thresholds=(0.5,), label=0)
    plan = certifier.plan(counts(0, 0), question)
    for n in plan.looks[:-1]:
        assert certifier.decide(counts(n - n * 2 // 5, n * 2 // 5), n, plan) is None
    assert certifier.decide(counts(60, 40), 100, plan) == Decision(ABSTAIN, 0.0, 1.0, "n-reached")


def test_sequential_keeps_what_an_earlier_look_certified():
    certifier = Sequential(n=2000)
    plan = certifier.plan(counts(100, 0), Question(classes=2, thresholds=(0.5, 0.8)))
    assert certifier.decide(counts(42, 8), 50, plan) is None  # certified at 1/2 (41 suffice), open at .8
    assert certifier.decide(counts(42, 18), 60, plan) is None  # fewer than the 47 of this look
    decision = certifier.decide(counts(42, 45), 87, plan)  # hopeless at .8 by now, and would be open at 1/2
    assert decision == Decision(0, 0.5, 0.5, "gave-up", threshold=0)
    assert NOISE.radius(decision.p_a, decision.p_b) == 0.0


def test_sequential_images_do_not_share_their_standing():
    certifier, question = Sequential(), Question(classes=2, thresholds=GRID)
    first, second = certifier.plan(counts(100, 0), question), certifier.plan(counts(100, 0), question)
    assert certifier.decide(counts(0, 50), 50, first) is not None
    assert certifier.decide(counts(50, 0), 50, second) is None
    assert first.state is not second.state
    assert first.state.test is second.state.test  # but the boundaries are computed once


def test_sequential_selects_like_certify_unless_the_label_is_given():
    certifier = Sequential(n0=77)
    assert certifier.selection(Question(classes=3, thresholds=GRID)) == 77
    assert certifier.selection(Question(classes=3, thresholds=GRID, label=2)) == 0
    assert certifier.plan(counts(3, 9, 9), Question(classes=3, thresholds=GRID)).candidate == 1
    assert certifier.plan(counts(0, 0, 0), Question(classes=3, thresholds=GRID, label=2)).candidate == 2


@pytest.mark.parametrize(("thresholds", "words"), [((), "radii"), ((0.3, 0.6), "1/2"), ((0.6, 0.5), "increase")])
def test_sequential_refuses_thresholds_it_cannot_test(thresholds, words):
    with pytest.raises(InputError, match=words):
        Sequential().plan(counts(100, 0), Question(classes=2, thresholds=thresholds))


def test_sequential_treats_radii_beyond_n_as_hopeless():
    question = Question(classes=2, thresholds=(0.5, float(ndtr(4.5)), 1.0), label=0)
    decision, n = certify(Sequential(), (1.0, 0.0), question, np.random.default_rng(0))
    assert (decision.p_a, decision.reason, n) == (0.5, "gave-up", 50)


def test_sequential_agrees_with_certify_on_what_is_certified():
    """On many images the certified accuracy at each radius is that of fixed n."""
    rng = np.random.default_rng(11)
    n, images = 10_000, 1000
    probabilities = ndtr(rng.normal(1.2, 1.0, images))
    question = Question(classes=2, thresholds=GRID, label=0)
    certifier = Sequential(n=n)
    found = [certify(certifier, (p, 1 - p), question, rng) for p in probabilities]
    fixed = bounds.lower(rng.binomial(n, probabilities), n, 0.001)
    for p0 in GRID:
        share = np.mean([d.predict == 0 and d.p_a >= p0 for d, _ in found])
        # the same images are sampled afresh by both, so a few near each threshold differ by chance
        assert share == pytest.approx(np.mean(fixed > p0), abs=0.015)
    assert np.mean([n for _, n in found]) < 0.6 * n  # though most of these images are near some threshold


# --- early abstention --------------------------------------------------------------------------------------------------------


def test_early_abstention_changes_nothing_but_the_samples_of_hopeless_images():
    late, early = Cohen(n=10_000), Cohen(n=10_000, early_abstain=True)
    question = Question(classes=2, label=0)
    for hits in (4000, 5200, 9000, 10_000):
        final = counts(hits, 10_000 - hits)
        plan = early.plan(counts(0, 0), question)
        assert plan.looks[-1] == 10_000
        assert early.decide(final, 10_000, plan) == late.decide(final, 10_000, late.plan(counts(0, 0), question))
    decision, n = certify(early, (0.3, 0.7), question, np.random.default_rng(0))
    assert decision == Decision(ABSTAIN, 0.0, 1.0, "gave-up")
    assert n < 500


def test_early_abstention_gives_up_at_the_boundary_itself():
    certifier = Cohen(early_abstain=True)
    plan = certifier.plan(counts(100, 0), Question(classes=2))
    assert plan.looks == sequential.look_schedule(100_000)
    may_spend = 0.2 * 1e-3 / 42  # at the first of 42 looks before the last
    least = int(stats.binom.ppf(may_spend, 50, 0.5))  # P(hits < least) <= may_spend < P(hits <= least)
    assert certifier.decide(counts(least - 1, 51 - least), 50, plan) == Decision(ABSTAIN, 0.0, 1.0, "gave-up")
    assert certifier.decide(counts(least, 50 - least), 50, plan) is None


@pytest.mark.parametrize("p", [0.5, 0.52])
def test_early_abstention_seldom_loses_an_image(p):
    rng, certifier = np.random.default_rng(12), Cohen(n=2000, early_abstain=True)
    question = Question(classes=2, label=0)
    lost = sum(certify(certifier, (p, 1 - p), question, rng)[0].reason == "gave-up" for _ in range(2000))
    assert lost <= stats.binom.isf(1e-5, 2000, 2e-4)


# --- two-sided ---------------------------------------------------------------------------------------------------------------


def test_two_sided_bounds_are_the_two_quantiles():
    decision = TwoSided(n=10_000).decide(counts(4500, 3000, 2500), 10_000, Plan(0, (10_000,)))
    assert decision.predict == 0  # p_A < 1/2: CERTIFY abstains
    assert decision.p_a == pytest.approx(stats.beta.ppf(0.0009, 4500, 5501), rel=1e-10)
    assert decision.p_b == pytest.approx(stats.beta.isf(0.0001, 3001, 7000), rel=1e-10)
    assert Cohen(n=10_000).decide(counts(4500, 3000, 2500), 10_000, Plan(0, (10_000,))).predict == ABSTAIN


def test_two_sided_never_uses_more_than_the_rest():
    decision = TwoSided(n=1000).decide(counts(900, 100, 0), 1000, Plan(0, (1000,)))
    assert decision.p_b == 1 - decision.p_a  # with two classes the rest is the better bound


@pytest.mark.parametrize("seen", [(500, 500, 0), (300, 350, 350), (0, 1000, 0), (350, 340, 310)], ids=str)
def test_two_sided_abstains_without_a_gap(seen):
    decision = TwoSided(n=1000).decide(counts(*seen), 1000, Plan(0, (1000,)))
    assert (decision.predict, decision.reason) == (ABSTAIN, "no-gap")
    assert Gaussian(sigma=1).radius(decision.p_a, decision.p_b) == 0.0


def test_two_sided_saturates_like_certify():
    decision = TwoSided(n=1000).decide(counts(1000, 0, 0), 1000, Plan(0, (1000,)))
    assert decision.saturated
    assert decision.p_a == pytest.approx(0.0009 ** (1 / 1000))


# --- two-stage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hits", [600, 800, 950, 999, 1000])
def test_two_stage_meets_the_wanted_loss_at_the_pilot_s_estimate(hits):
    certifier = TwoStage(radius_tolerance=0.1)
    (n,) = certifier.plan(counts(hits, 1000 - hits), Question(classes=2)).looks

    def radius(size: int) -> float:
        """In sigma, from the bound at the pilot's share of hits."""
        share = hits * size // 1000
        return float(ndtri(stats.beta.ppf(0.001, share, size - share + 1)))

    assert radius(n) >= 0.9 * radius(100_000)
    assert radius(n * 9 // 10) < 0.9 * radius(100_000)
    assert n < 100_000


def test_two_stage_takes_more_for_less_loss_and_never_more_than_n():
    sizes = [
        TwoStage(radius_tolerance=loss).plan(counts(900, 100), Question(classes=2)).looks[0] for loss in (0.5, 0.1, 0.01, 1e-6)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < 500
    assert sizes[-1] == 100_000


def test_two_stage_takes_all_n_when_the_pilot_cannot_tell():
    assert TwoStage().plan(counts(490, 510), Question(classes=2, label=0)).looks == (100_000,)


def test_two_stage_abstains_on_a_hopeless_pilot_without_fresh_samples():
    certifier = TwoStage()
    plan = certifier.plan(counts(100, 900), Question(classes=2, label=0))
    assert plan.looks == ()
    assert certifier.decide(counts(0, 0), 0, plan) == Decision(ABSTAIN, 0.0, 1.0, "gave-up")


def test_two_stage_certifies_from_fresh_samples_only():
    certifier = TwoStage(radius_tolerance=0.3)
    plan = certifier.plan(counts(900, 100), Question(classes=2))
    n = plan.looks[0]
    decision = certifier.decide(counts(n * 8 // 10, n - n * 8 // 10), n, plan)
    assert decision.p_a == bounds.lower(n * 8 // 10, n, 0.001)  # the pilot's 900 of 1000 are gone
    assert certifier.selection(Question(classes=2, label=1)) == 1000  # it needs its pilot even when the class is given


# --- fields ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("certifier", "fields"),
    [
        (Sequential, {"early": 1.5}),
        (Sequential, {"futility": 0}),
        (Sequential, {"first_look": 0}),
        (Sequential, {"growth": 1.0}),
        (TwoSided, {"alpha_split": 1.0}),
        (TwoStage, {"radius_tolerance": 0.0}),
        (Cohen, {"early_abstian": True}),
    ],
)
def test_fields_out_of_range_are_refused(certifier, fields):
    with pytest.raises(ValidationError):
        certifier(**fields)
