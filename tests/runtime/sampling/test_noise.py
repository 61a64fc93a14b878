"""The noise of the draw: uniform, independent from token to token and draw to draw, and a function of its key alone."""

import numpy as np
import pytest
from medusa_runtime.sampling.noise import FEW, draw, draw_key, exponentials

from .statistic import assert_distribution, critical

IDS = np.arange(20_000, dtype=np.uint32)
KEYS = {
    "ids": [(0, 0, 0)],
    "positions": [(7, 0, position) for position in range(40)],
    "choices": [(7, choice, 0) for choice in range(40)],
    "seeds": [(seed, 0, 0) for seed in range(40)],
    "large": [(2**64 - 1 - seed, 127 - seed, 10**6 + seed) for seed in range(40)],
}


def uniforms(ids, key):
    """The uniform number behind each exponential one."""
    return -np.expm1(-exponentials(ids, draw_key(*key)))


@pytest.mark.parametrize("name", KEYS)
def test_noise_is_uniform(name):
    values = np.concatenate([uniforms(IDS, key) for key in KEYS[name]])
    cells = 500
    assert_distribution(np.bincount((values * cells).astype(int), minlength=cells), np.full(cells, 1 / cells))


def test_the_smallest_noise_is_uniform_too():
    """Draws from flat rows are decided where the first hash is nearly 0."""
    values = np.concatenate([uniforms(np.arange(150_000, dtype=np.uint32), (3, 0, at)) for at in range(200)])
    small = values[values < 1e-4] * 1e4
    assert 2500 < len(small) < 3500
    assert_distribution(np.bincount((small * 50).astype(int), minlength=50), np.full(50, 1 / 50))
    assert values.min() > 0


@pytest.mark.parametrize("name", ["positions", "choices", "seeds", "large"])
def test_noise_of_one_token_is_independent_from_draw_to_draw(name):
    rows = np.array([uniforms(IDS[:2000], key) for key in KEYS[name]])  # (40, 2000)
    for first, second in ((rows[:-1], rows[1:]), (rows[:-7], rows[7:])):
        assert_pairs_are_independent(first.ravel(), second.ravel())
        assert_pairs_are_independent(first[:, :-1].ravel(), second[:, 1:].ravel())


@pytest.mark.parametrize("distance", [1, 2, 3, 16, 256, 4096, 65_536])
def test_noise_of_neighbouring_tokens_is_independent(distance):
    ids = np.arange(30_000, dtype=np.uint32)
    for at in range(4):
        values, others = uniforms(ids, (1, 0, at)), uniforms(ids + np.uint32(distance), (1, 0, at))
        assert_pairs_are_independent(values, others)


def assert_pairs_are_independent(first, second, cells=16):
    pairs = (first * cells).astype(int) * cells + (second * cells).astype(int)
    assert_distribution(np.bincount(pairs, minlength=cells**2), np.full(cells**2, 1 / cells**2))
    correlation = np.corrcoef(first, second)[0, 1]
    assert abs(correlation) < 5 / len(first) ** 0.5


def test_every_bit_of_the_key_changes_half_of_the_bits():
    ids = np.arange(64, dtype=np.uint32)
    before = uniforms(ids, (0, 0, 0))
    for bit in range(64):
        changed = uniforms(ids, (1 << bit, 0, 0))
        assert abs(np.corrcoef(before, changed)[0, 1]) < 0.6
        assert not (before == changed).any()


def test_the_noise_of_an_id_does_not_depend_on_the_others():
    key = draw_key(11, 2, 5)
    whole = exponentials(IDS, key)
    for chosen in (IDS[::-1], IDS[5:6], IDS[::37], np.array([9, 9, 3], dtype=np.uint32)):
        assert (exponentials(chosen, key) == whole[chosen]).all()


def test_keys_differ_by_seed_choice_and_position():
    keys = {
        tuple(np.concatenate(draw_key(seed, choice, position)).ravel().tolist())
        for seed in (0, 1, 2, 2**63)
        for choice in range(20)
        for position in range(200)
    }
    assert len(keys) == 4 * 20 * 200


@pytest.mark.parametrize("n", [1, 2, FEW, FEW + 1, 3000, 50_000])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 4.0, 30.0])
def test_the_draw_is_the_best_score_of_all_tokens(n, spread):
    """Which tokens cannot win is only a matter of time, never of the result."""
    rng = np.random.default_rng([n, int(10 * spread)])
    for position in range(30):
        logits = rng.normal(scale=spread, size=n).astype(np.float32)
        if position % 3 == 1:
            logits[rng.random(n) < 0.3] = -np.inf
            logits[rng.integers(n)] = 1.0
        if position % 3 == 2:
            logits[rng.integers(n)] += 12
        temperature, key = float(rng.choice([0.3, 1.0, 2.5])), draw_key(5, 0, position)
        scores = logits.astype(np.float64) / temperature - np.log(exponentials(np.arange(n, dtype=np.uint32), key))
        assert draw(logits, None, temperature, key) == scores.argmax()
        some = np.sort(rng.permutation(n)[: n // 2 + 1])
        if logits[some].max() > -np.inf:
            expected = some[scores[some].argmax()]
            assert draw(logits[some], some, temperature, key) == expected


def test_a_large_vocabulary_is_drawn_from_with_its_probabilities():
    rng = np.random.default_rng(1)
    logits = np.concatenate([rng.normal(6, 1, 30), rng.normal(0, 1, 4000)]).astype(np.float32)
    weights = np.exp(logits.astype(np.float64) / 1.3)
    drawn = [draw(logits, None, 1.3, draw_key(0, 0, position)) for position in range(20_000)]
    assert_distribution(np.bincount(drawn, minlength=len(logits)), weights / weights.sum())


@pytest.mark.parametrize("degrees", [8, 20, 100, 500])
def test_the_critical_value_is_that_of_chi_squared(degrees):
    """For even degrees the probability beyond x is exp(-x / 2) · Σ_{j < degrees / 2} (x / 2)**j / j!."""
    half = critical(degrees) / 2
    terms = np.cumsum(np.concatenate([[0.0], np.log(half / np.arange(1, degrees // 2))]))
    assert 0.3e-6 < np.exp(terms - half).sum() < 1.5e-6
