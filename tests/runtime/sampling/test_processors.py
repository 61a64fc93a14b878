"""vLLM's processors against their definitions, one token at a time."""

import math

import numpy as np
import pytest
from medusa_runtime.errors import ArgumentError, RequestError
from medusa_runtime.sampling.processors import Processors
from medusa_runtime.sampling_params import SamplingParams

from .reference import processed

V = 40


def row(seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(scale=scale, size=V).astype(np.float32)


def apply(params, logits, prompt=(), output=(), ends=(), words=()):
    return Processors(params, prompt, V, ends, words).apply(logits, output)


def random_case(seed):
    rng = np.random.default_rng(seed)
    params = SamplingParams(
        repetition_penalty=float(rng.choice([1.0, 1.3, 0.6])),
        frequency_penalty=float(rng.choice([0.0, 0.7, -0.4])),
        presence_penalty=float(rng.choice([0.0, -1.1, 0.9])),
        logit_bias={int(token): float(rng.normal()) for token in rng.integers(0, V, 3)} if rng.random() < 0.5 else None,
        allowed_token_ids=rng.integers(0, V, 25).tolist() if rng.random() < 0.5 else None,
        min_tokens=int(rng.integers(0, 6)),
    )
    prompt, output = rng.integers(0, 12, rng.integers(1, 20)).tolist(), rng.integers(0, 12, rng.integers(0, 9)).tolist()
    words = [tuple(rng.integers(0, 5, rng.integers(1, 4)).tolist()) for _ in range(6)]
    ends = rng.integers(0, V, 2).tolist()
    return params, prompt, output, ends, words


@pytest.mark.parametrize("seed", range(150))
def test_all_processors_together_follow_their_definitions(seed):
    params, prompt, output, ends, words = random_case(seed)
    logits = row(seed)
    expected = processed(params, logits, prompt, output, ends, words)
    np.testing.assert_allclose(apply(params, logits, prompt, output, ends, words), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_an_answer_that_grows_shrinks_and_changes_has_the_logits_of_its_tokens_alone(seed):
    """Counts are kept from call to call; a step may be repeated, and a walk may end on another path."""
    rng = np.random.default_rng(seed)
    params = SamplingParams(repetition_penalty=1.2, frequency_penalty=0.5, presence_penalty=0.3)
    prompt = rng.integers(0, V, 5).tolist()
    kept, logits, output = Processors(params, prompt, V, (), ()), row(), []
    for _ in range(60):
        change = rng.random()
        if change < 0.7:
            output = output + rng.integers(0, V, rng.integers(1, 4)).tolist()
        elif change < 0.9:
            output = output[: rng.integers(0, len(output) + 1)]
        elif output:
            output = [*output[:-1], int(rng.integers(V))]
        expected = apply(params, logits, prompt, output).copy()
        assert (kept.apply(logits, output) == expected).all()
        assert (kept.apply(logits, tuple(output)) == expected).all()


def test_the_backends_array_is_not_written_to():
    logits = row()
    logits.flags.writeable = False
    params = SamplingParams(repetition_penalty=2.0, logit_bias={3: 1.0}, allowed_token_ids=[3, 4])
    changed = apply(params, logits, prompt=[3])
    assert changed is not logits and not np.shares_memory(changed, logits)


def test_many_distinct_tokens_are_counted():
    output = list(range(V)) * 3 + [7]
    params = SamplingParams(frequency_penalty=0.5)
    expected = row() - 0.5 * np.array([4.0 if token == 7 else 3.0 for token in range(V)])
    np.testing.assert_allclose(apply(params, row(), output=output), expected, atol=1e-6)
    wide = Processors(SamplingParams(presence_penalty=1.0), [], 1000, (), ())
    assert (wide.apply(np.zeros(1000, np.float32), list(range(300)))[:301] == [-1.0] * 300 + [0.0]).all()


def test_a_bad_word_is_forbidden_where_it_would_become_complete():
    params, words = SamplingParams(bad_words=["x"]), [(4, 5, 6), (7,), (8, 8)]
    processors = Processors(params, [4, 5], V, (), words)

    def forbidden(output):
        return np.flatnonzero(np.isinf(processors.apply(row(), output))).tolist()

    assert forbidden([]) == [7]  # tokens of the prompt do not begin a bad word
    assert forbidden([5]) == [7]
    assert forbidden([4, 5]) == [6, 7]
    assert forbidden([4, 5, 1]) == [7]
    assert forbidden([1, 4, 5]) == [6, 7]
    assert forbidden([8]) == [7, 8]


def test_processors_are_active_only_where_a_logit_may_change():
    params = SamplingParams(min_tokens=2, bad_words=["x"])
    processors = Processors(params, [], V, (1,), [(4, 5)])
    assert [processors.active(output) for output in ([], [3], [3, 3], [3, 4], [4, 3])] == [
        True,
        True,
        False,
        True,
        False,
    ]
    assert not Processors(SamplingParams(), [], V, (1,), ()).active([])
    assert not Processors(SamplingParams(logit_bias={}), [], V, (), ()).active([])
    assert not Processors(SamplingParams(min_tokens=3), [], V, (), ()).active([])


def test_ids_outside_the_vocabulary_are_never_chosen_and_change_nothing():
    params = SamplingParams(min_tokens=2, bad_words=["x"])
    processors = Processors(params, [], V, (V, V + 3), [(V,), (2, V), (V + 1, 3)])
    assert not processors.active([2])
    assert (processors.apply(row(), [2]) == row()).all()


def test_extreme_penalties_leave_finite_logits():
    logits = np.array([3e38, -3e38, 0.0, 1.0] * 10, dtype=np.float32)
    for penalty in (1e-300, 1e-30, 1e30, 1e300, 1.7e308, 5e-324):
        params = SamplingParams(repetition_penalty=penalty, frequency_penalty=2.0, logit_bias={0: 100.0})
        changed = apply(params, logits, prompt=list(range(V)), output=[0, 1, 2])
        assert np.isfinite(changed).all(), penalty
        assert (changed[4:8] * [1, -1, 1, 1] >= 0).all()


def test_parameters_that_forbid_everything_at_once_are_refused_at_the_beginning():
    message = r"^no token may be chosen at the answer's beginning, because of {}; expected at least one: "
    with pytest.raises(ArgumentError, match=message.format("allowed_token_ids and min_tokens")):
        Processors(SamplingParams(allowed_token_ids=[1, 2], min_tokens=1), [], V, (1, 2), ())
    with pytest.raises(ArgumentError, match=message.format("allowed_token_ids and bad_words")):
        Processors(SamplingParams(allowed_token_ids=[1, 2], bad_words=["x", "y"]), [], V, (), [(1,), (2,)])
    with pytest.raises(ArgumentError, match=message.format("min_tokens")):
        Processors(SamplingParams(min_tokens=1), [], 1, (0,), ())
    Processors(SamplingParams(allowed_token_ids=[1, 2], min_tokens=1), [], V, (1,), ())


def test_parameters_that_forbid_everything_later_end_the_request_with_their_names():
    processors = Processors(SamplingParams(allowed_token_ids=[1], bad_words=["x"]), [], V, (), [(1, 1)])
    assert np.isfinite(processors.apply(row(), [])).sum() == 1
    message = (
        r"^no token may be chosen behind the first 1 tokens of the answer, because of allowed_token_ids and bad_words"
    )
    with pytest.raises(RequestError, match=message) as caught:
        processors.apply(row(), [1])
    assert caught.value.result is None


def test_forbidden_tokens_stay_forbidden_whatever_is_added():
    params = SamplingParams(
        logit_bias={1: 100.0}, presence_penalty=-2.0, repetition_penalty=0.01, min_tokens=1, frequency_penalty=-2.0
    )
    assert apply(params, row(), prompt=[1], ends=(1,))[1] == -math.inf
