"""Whole answers by a Decoder over the toy model, with what must hold between steps checked at each."""

import itertools

import numpy as np
from medusa_profiles import TreeProfile

from .fake_backend import VOCAB, contexts_of, state_of

CHAIN = TreeProfile("chain", ((0,), (0, 0), (0, 0, 0)))


def random_prompt(rng, length):
    return rng.integers(VOCAB, size=length).tolist()


def begun(decoder, *arguments):
    """The sequence of an answer that was just started."""
    decoder.start(*arguments)
    return decoder.sequence


def check_invariants(decoder):
    """What must hold between steps: the past is exactly the tokens but the last, each at its own position."""
    sequence, length, backend = decoder.sequence, decoder.cache.length(), decoder.backend
    tokens = [*sequence.prompt, *sequence.answer]
    assert length == len(tokens) - 1 == sequence.length - 1
    assert length <= decoder.cache.capacity == backend.tokens.shape[1] <= decoder.cache.context
    np.testing.assert_array_equal(backend.tokens[0, :length], tokens[:-1])
    np.testing.assert_array_equal(backend.positions[0, :length], np.arange(length))
    assert sequence.last_token == tokens[-1]
    assert decoder.cache.can_draft()
    contexts = contexts_of(tokens[:-1])
    np.testing.assert_array_equal(backend.contexts[0, :length], contexts)
    assert backend.hidden[0] == (state_of(tokens[:-1]), contexts[-1], length - 1)


def finish(decoder):
    """Step to the end, checking the invariants, and return what each step gave."""
    given, steps = [], decoder.steps
    while decoder.sequence.finish_reason is None:
        before = decoder.sequence.length
        given.append(decoder.step())
        check_invariants(decoder)
        assert 1 <= len(given[-1]) == decoder.sequence.length - before <= decoder.profile.depth + 1
        assert decoder.backend.committed[-1][0] == 0  # the root is always kept
        assert len(decoder.backend.committed[-1]) == len(given[-1])
        assert decoder.steps == steps + len(given)
    return given


def decode(decoder, prompt, max_new_tokens, stop_ids=()):
    """A whole answer, from the prompt to the end."""
    first = decoder.start(prompt, max_new_tokens, stop_ids)
    assert len(first) == 1 and decoder.steps == 0
    check_invariants(decoder)
    given = finish(decoder)
    assert decoder.sequence.answer == [*first, *itertools.chain(*given)]
    return decoder.sequence.answer, decoder.sequence.finish_reason
