"""Estimates of how many candidates are accepted converge to the truth, of one answer and of all."""

import numpy as np
import pytest
from medusa_profiles import TreeProfile
from medusa_runtime.drafting.acceptance import HeadAcceptance, NgramAcceptance, Rate, chain_length

CHAIN = {depth: TreeProfile(f"chain-{depth}", tuple((0,) * d for d in range(1, depth + 1))) for depth in (1, 2, 3)}


def test_a_rate_begins_at_its_prior_and_follows_what_is_observed():
    rate = Rate(0.5)
    assert rate.value == 0.5
    for _ in range(400):
        rate.add(0.9, 1)
    assert rate.value == pytest.approx(0.9, abs=0.02)


def test_an_answer_begins_where_all_answers_are_and_forgets_sooner():
    everything = Rate(0.5)
    for _ in range(400):
        everything.add(1, 1)
    one = Rate(0.5, everything)
    assert one.value == everything.value > 0.95
    for _ in range(40):
        one.add(0, 1)
    assert one.value < 0.4 < everything.value


def test_the_length_of_a_chain_is_the_mean_of_a_simulation():
    rng = np.random.default_rng(0)
    for first, other, length in ((0.7, 0.8, 5), (1.0, 1.0, 4), (0.3, 0.0, 3), (0.9, 0.95, 1)):
        accepted = rng.random((20_000, length)) < np.array([first, *[other] * (length - 1)])
        mean = np.cumprod(accepted, axis=1).sum(axis=1).mean()
        assert chain_length(first, other, length) == pytest.approx(mean, abs=0.05)


def test_matches_of_each_length_have_their_own_probabilities():
    rng, found = np.random.default_rng(1), NgramAcceptance()
    truth = {2: (0.3, 0.5), 16: (0.95, 0.9)}
    for _ in range(1500):
        for length, (first, other) in truth.items():
            tried = int(rng.integers(1, 9))
            hits = rng.random(tried) < np.array([first, *[other] * (tried - 1)])
            found.add(length, int(np.cumprod(hits).sum()), tried)
    for length, expected in truth.items():
        assert found.expected(length) == pytest.approx(expected, abs=0.06)
    assert found.expected(2) == found.expected(0) and found.expected(16) == found.expected(99)
    assert NgramAcceptance(found).expected(16) == found.expected(16)


def test_what_one_tree_shows_holds_for_the_others():
    """The heads are half as good as calibrated: the deeper the tree, the less of it is left."""
    rng = np.random.default_rng(2)
    calibrated = (0.8, 0.7, 0.6)
    heads = HeadAcceptance({tree: calibrated[:depth] for depth, tree in CHAIN.items()})
    assert heads.expected(CHAIN[3]) == pytest.approx(0.8 + 0.8 * 0.7 + 0.8 * 0.7 * 0.6)
    truth = np.array(calibrated) / 2
    for _ in range(3000):
        heads.add(CHAIN[2], int(np.cumprod(rng.random(2) < truth[:2]).sum()))
    for depth, tree in CHAIN.items():
        assert heads.expected(tree) == pytest.approx(np.cumprod(truth[:depth]).sum(), abs=0.05)


def test_no_probability_exceeds_one():
    heads = HeadAcceptance({CHAIN[3]: (0.9, 0.9, 0.9)})
    for _ in range(200):
        heads.add(CHAIN[3], 3)
    assert 2.9 < heads.expected(CHAIN[3]) <= 3
