"""The sampler: its seeds, what it reads, and rows of odd shapes."""

import itertools

import numpy as np
import pytest
from medusa_runtime.errors import ArgumentError, InvalidLogitsError
from medusa_runtime.sampling import Sampler
from medusa_runtime.sampling_params import SamplingParams

from .reference import distribution
from .scripted import ScriptedModel, ScriptedRows, plain_answer

V = 300


def sampler(vocab_size=V, seed=1, choice=0, prompt=(), ends=(), words=(), **params):
    return Sampler(SamplingParams(**params), prompt, vocab_size, ends, words, seed, choice)


def test_the_same_seed_gives_the_same_answer_and_another_one_another():
    model = ScriptedModel(V)
    answers = {
        (seed, choice): tuple(plain_answer(sampler(seed=seed, choice=choice, temperature=1.0), model, [4], 12))
        for seed in (0, 1, 2**64 - 1)
        for choice in range(3)
    }
    assert len(set(answers.values())) == 9
    assert answers[1, 0] == tuple(plain_answer(sampler(seed=1, temperature=1.0), model, [4], 12))


def test_a_choice_does_not_depend_on_the_calls_before():
    """A step may be repeated, and the nodes of a tree may be asked for in any order."""
    model, params = ScriptedModel(V), {"temperature": 1.0, "repetition_penalty": 1.4, "top_p": 0.9}
    outputs = [(), (3,), (3, 9), (3, 9, 9), (7,), (7, 9), (3, 9, 2)]
    rows = [ScriptedRows([model.logits(output)]) for output in outputs]
    alone = [sampler(**params).choose(row, 0, output) for row, output in zip(rows, outputs, strict=True)]
    for order in itertools.islice(itertools.permutations(range(len(outputs))), 0, 5000, 97):
        shared = sampler(**params)
        assert [shared.choose(rows[at], 0, outputs[at]) for at in order] == [alone[at] for at in order]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.2, "top_k": 50, "top_p": 0.9},
        {"temperature": 0.6, "top_p": 0.8},
        {"temperature": 1.5, "top_p": 0.5},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 100},
        {"temperature": 0.9, "top_p": 0.99, "repetition_penalty": 1.2},
    ],
)
def test_summaries_give_the_tokens_of_whole_rows(params):
    model = ScriptedModel(V, spread=2.5)
    for seed in range(40):
        one, other = (sampler(seed=seed, prompt=(4,), **params) for _ in range(2))
        assert plain_answer(one, model, [4], 10) == plain_answer(other, model, [4], 10, entries=64)


def test_rows_are_read_only_where_the_summary_does_not_suffice():
    row = np.zeros(V, dtype=np.float32)
    row[:3] = 20, 19, 18

    def read(output=(), words=(), ends=(), **params):
        rows = ScriptedRows([np.zeros(V), row], entries=64)
        sampler(words=words, ends=ends, **params).choose(rows, 1, output)
        assert set(rows.read) <= {1} and set(rows.summarised) <= {1}
        return len(rows.read)

    assert read() == 0
    assert read(temperature=1.0, top_k=3) == 0
    assert read(temperature=1.3, top_p=0.9) == 0
    assert read(temperature=1.0) == 1
    assert read(temperature=1.0, top_k=64) == 1  # the 64th logit is that of all others
    assert read(temperature=8.0, top_p=0.11) == 1  # which of them is the fourth is not known
    assert read(frequency_penalty=1.0) == 1
    assert read(output=(5, 6), words=[(6, 7)], bad_words=["x"]) == 1
    assert read(output=(6, 5), words=[(6, 7)], bad_words=["x"]) == 0
    assert read(output=(6,), min_tokens=2, ends=(8,)) == 1
    assert read(output=(6, 5), min_tokens=2, ends=(8,)) == 0


@pytest.mark.parametrize("levels", [1, 2, 3, 20])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.2, "top_k": 64, "top_p": 0.6},
        {"temperature": 0.6, "top_p": 0.05},
        {"temperature": 1.0, "top_p": 0.3},
        {"temperature": 1.5, "top_p": 1e-9},
        {"temperature": 1.0, "min_p": 0.3, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 1.0},
    ],
)
def test_rows_of_equal_logits_give_the_same_tokens_whatever_the_order_of_their_summaries(params, levels):
    summarised = 0
    for seed in range(60):
        rng = np.random.default_rng([levels, seed])
        row = rng.integers(0, levels, V) * rng.choice([0.0, 0.7, 2.0, -0.0])
        row[rng.permutation(V)[: rng.integers(0, 90)]] += 3
        whole, summaries = ScriptedRows([row]), ScriptedRows([row], entries=64)
        assert sampler(seed=seed, **params).choose(whole, 0, ()) == sampler(seed=seed, **params).choose(
            summaries, 0, ()
        )
        summarised += not summaries.read
    assert summarised > 10


def test_greedy_takes_the_most_likely_token_after_the_processors_and_the_first_of_equal_ones():
    row = np.zeros(V, dtype=np.float32)
    row[[20, 9, 30]] = 5
    for entries in (None, 64):
        rows = ScriptedRows([row], entries)
        assert sampler().choose(rows, 0, ()) == 9
        assert sampler(logit_bias={30: 0.5}).choose(rows, 0, ()) == 30
        assert sampler(presence_penalty=1.0).choose(rows, 0, (9,)) == 20
        assert sampler(repetition_penalty=1.5, prompt=(9, 20)).choose(rows, 0, ()) == 30
        assert sampler(allowed_token_ids=[40, 41]).choose(rows, 0, ()) == 40


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"min_tokens": 3}])
def test_rows_that_are_not_finite_are_rejected(wrong, params):
    row = np.zeros(V, dtype=np.float32)
    row[7] = wrong
    for entries in (None, 64):
        chooser = sampler(ends=(2,), **params)
        with pytest.raises(InvalidLogitsError):
            chooser.choose(ScriptedRows([row], entries), 0, ())
        assert isinstance(chooser.choose(ScriptedRows([np.zeros(V)], entries), 0, ()), int)


FILTERS = ({}, {"top_k": 1000}, {"top_k": 2}, {"top_p": 1e-12}, {"top_p": 0.5}, {"min_p": 1.0}, {"min_p": 1e-300})


@pytest.mark.parametrize("params", FILTERS)
@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1.0, 1e6, 1e300])
@pytest.mark.parametrize(
    "row",
    [
        [0.0],
        [-5.0, -5.0, -5.0],
        [3e38, -3e38, 3e38, 0.0],
        [3.4028235e38, 1.0, 3.4028233e38],
        [-3e38, -2.9e38, -3.1e38],
        [1e-40, 2e-40, 0.0],
        np.zeros(700),
        np.linspace(-1000, 1000, 700),
    ],
    ids=["one", "equal", "huge", "huge and close", "very negative", "denormal", "many equal", "wide"],
)
def test_odd_rows_are_drawn_from(row, temperature, params):
    """Without a warning, and never a token that has no probability."""
    rows = [ScriptedRows([row], entries) for entries in (None, 64)]
    size = len(rows[0].logits[0])
    clamped = SamplingParams(temperature=min(max(temperature, 1e-30), 1e30), **params)  # as documented
    expected = distribution(clamped, rows[0].logits[0])
    for seed in range(20):
        chooser = sampler(size, seed, temperature=temperature, **params)
        token = chooser.choose(rows[0], 0, ())
        assert token == chooser.choose(rows[1], 0, ())
        assert expected[token] > 0


def test_near_temperature_zero_a_draw_is_greedy_and_near_infinity_uniform():
    row = np.array([1.0, 4.0, 3.999, -2.0], dtype=np.float32)
    cold = [sampler(4, seed, temperature=1e-6).choose(ScriptedRows([row]), 0, ()) for seed in range(200)]
    assert set(cold) == {1}
    hot = [sampler(4, seed, temperature=1e6).choose(ScriptedRows([row]), 0, ()) for seed in range(2000)]
    assert np.bincount(hot, minlength=4).min() > 420


def test_token_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ArgumentError, match=r"^allowed_token_ids has the token id 300; expected one from 0 to 299"):
        sampler(allowed_token_ids=[300])
