"""A step is kept whole or not at all: a failure or an interrupt anywhere in it costs no token and adds no wrong one."""

from functools import partial

import numpy as np
import pytest
from medusa_profiles import TreeProfile
from medusa_runtime import kv_cache
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import InvalidLogitsError, MedusaError

from .decoding import CHAIN, check_invariants, decode, finish
from .fake_backend import VOCAB, FakeBackend, plain_answer
from .interrupting import elsewhere, interrupted

PROMPT, TOKENS = [5, 6, 7], 9
EXPECTED = plain_answer(PROMPT, TOKENS, (), 4096)
FIRST_OF_9 = plain_answer([9], 1, (), 4096)[0]
FILES = ("decoder.py", "kv_cache.py", "sequence.py", "tree_step.py", "exclusive.py")


@pytest.fixture(autouse=True)
def small_arenas(monkeypatch):
    """So that prefill and steps allocate too."""
    monkeypatch.setattr(kv_cache, "INITIAL_CAPACITY", 2)


def answer_on(decoder, given):
    """Go on, or start again where there is nothing to go on with; either way the answer is the right one."""
    if decoder.sequence is None:
        with pytest.raises(MedusaError, match="start a prompt first"):
            decoder.step()
        assert decode(decoder, PROMPT, TOKENS) == EXPECTED
        return
    assert decoder.sequence.answer == given, "tokens that nobody was given, or given twice"
    while decoder.sequence.finish_reason is None:
        given += decoder.step()
        length = decoder.sequence.length - 1
        assert decoder.cache.length() == length
        np.testing.assert_array_equal(decoder.backend.positions[0, :length], np.arange(length))
    assert (given, decoder.sequence.finish_reason) == EXPECTED
    check_invariants(decoder)


def work_of(decoder, given):
    """A prompt, and two steps."""

    def work():
        given.extend(decoder.start(PROMPT, TOKENS, ()))
        for _ in range(2):
            given.extend(decoder.step())

    return work


def step_into(decoder, taken):
    taken += decoder.step()


def test_an_interrupt_at_any_line_of_a_step_leaves_the_state_before():
    number, came_so_far = 0, True
    while came_so_far:
        decoder, taken = Decoder(FakeBackend(hit_rate=0.8), CHAIN), []
        given = [*decoder.start(PROMPT, TOKENS, ()), *decoder.step()]
        came_so_far = interrupted(partial(step_into, decoder, taken), number, (*FILES, "accept.py"))
        answer_on(decoder, given + taken)  # what the caller did not get is not in the answer either
        assert elsewhere(partial(decoder.start, [9], 1)) == FIRST_OF_9
        number += 1
    assert number > 100


def test_an_interrupt_at_any_bytecode_of_a_step_adds_no_wrong_token():
    number, came_so_far = 0, True
    while came_so_far:
        decoder = Decoder(FakeBackend(hit_rate=0.8), CHAIN)
        given = [*decoder.start(PROMPT, TOKENS, ()), *decoder.step()]
        came_so_far = interrupted(decoder.step, number, ("decoder.py", "kv_cache.py"), "opcode")
        assert decoder.sequence.answer[: len(given)] == given
        answer_on(decoder, list(decoder.sequence.answer))
        number += 1
    assert number > 300


def test_an_interrupt_anywhere_in_a_prompt_leaves_nothing_to_step_on_or_what_there_was():
    number, came_so_far = 0, True
    while came_so_far:
        decoder = Decoder(FakeBackend(hit_rate=0.8), CHAIN)
        given = [*decoder.start(PROMPT, TOKENS, ()), *decoder.step()]
        came_so_far = interrupted(partial(decoder.start, [9, 8], TOKENS, ()), number, FILES)
        if decoder.sequence is not None and decoder.sequence.prompt == (9, 8):
            assert decoder.sequence.answer == plain_answer([9, 8], 1, (), 4096)[0]
            finish(decoder)
            assert decoder.sequence.answer == plain_answer([9, 8], TOKENS, (), 4096)[0]
        else:
            answer_on(decoder, given)
        number += 1
    assert number > 30


@pytest.mark.parametrize("entry", ["set_profile", "warm_up"])
def test_an_interrupt_in_the_other_entries_costs_nothing_either(entry):
    other, number, came_so_far = CHAIN, 0, True
    while came_so_far:
        decoder = Decoder(FakeBackend(hit_rate=0.8))
        given = [*decoder.start(PROMPT, TOKENS, ()), *decoder.step()]
        work = {"set_profile": partial(decoder.set_profile, other), "warm_up": decoder.warm_up}[entry]
        came_so_far = interrupted(work, number, FILES)
        answer_on(decoder, given)
        assert decoder.profile in (TreeProfile.plain(), other)
        assert elsewhere(partial(decoder.start, [9], 1)) == FIRST_OF_9
        number += 1
    assert number > 10


CALLS = ("allocate", "run", "read_tokens", "read_argmax", "read_logits", "commit")


class Fails(FakeBackend):
    """Fails at one call, before or after it has done its work; `calls` counts them."""

    def __init__(self, at, after):
        super().__init__(hit_rate=0.8)
        self.at, self.after, self.calls = at, after, 0
        for name in CALLS:
            setattr(self, name, self._failing(getattr(self, name)))

    def _failing(self, call):
        def work(*arguments):
            self.calls += 1
            now = self.calls == self.at
            if now and not self.after:
                raise OSError("the device fell off")
            found = call(*arguments)
            if now:
                raise OSError("the device fell off")
            return found

        return work


@pytest.mark.parametrize("after", [False, True])
def test_a_backend_that_fails_at_any_call_costs_no_token(after):
    at, failed = 2, True  # the first call is the decoder's own allocation
    while failed:
        decoder, given = Decoder(Fails(at, after), CHAIN), []
        try:
            work_of(decoder, given)()
            failed = False
        except OSError:
            answer_on(decoder, given)
        at += 1
    assert at > 15


def test_rows_that_were_taken_from_under_an_answer_are_missed():
    decoder = Decoder(FakeBackend(), CHAIN)
    decoder.start(PROMPT, TOKENS, ())
    decoder.cache.truncate(1)
    with pytest.raises(MedusaError, match="holds 1 tokens, expected the 3 before the last one; start the"):
        decoder.step()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_logits_that_are_not_finite_are_found_in_the_step_that_gives_them(value, place, monkeypatch):
    backend = FakeBackend()
    decoder = Decoder(backend, CHAIN)
    decoder.start(PROMPT, TOKENS, ())
    decoder.step()
    given, committed, read = list(decoder.sequence.answer), len(backend.committed), backend.read_logits

    def poisoned(row):
        logits = read(row).copy()
        if row == 2:
            logits[place] = value
        return logits

    with monkeypatch.context() as patched:
        patched.setattr(backend, "read_logits", poisoned)
        with pytest.raises(
            InvalidLogitsError, match=r"fake computed logits from .* at row 2 of step 2 in exact: expected"
        ):
            decoder.step()
    assert (decoder.sequence.answer, len(backend.committed), decoder.steps) == (given, committed, 1)
    finish(decoder)
    assert decoder.sequence.answer == EXPECTED[0]


def test_a_prompt_whose_logits_are_minus_infinity_somewhere_is_refused(monkeypatch):
    backend = FakeBackend()
    logits = np.zeros(VOCAB, np.float32)
    logits[3] = -np.inf
    monkeypatch.setattr(backend, "read_logits", lambda row: logits)
    with pytest.raises(InvalidLogitsError, match=r"computed logits from -inf to 0\.0 at row 2 of the prompt in exact"):
        Decoder(backend).start(PROMPT)


def test_a_row_that_a_rule_visits_is_checked_on_every_device():
    backend = FakeBackend()
    backend.logits_on_host = False

    def visits(tree, tokens, argmax, logits):
        logits(3)
        return [0], argmax[0]

    decoder = Decoder(backend, CHAIN, visits)
    decoder.start(PROMPT, TOKENS, ())
    read = backend.read_logits
    backend.read_logits = lambda row: read(row) * (np.nan if row == 3 else 1)
    with pytest.raises(InvalidLogitsError, match="at row 3 of step 1"):
        decoder.step()
