"""Prefix reuse over the toy model, whose answers show every wrong row: hits, copies, failures and interrupts."""

from functools import partial

import numpy as np
import pytest
from medusa_profiles import TreeProfile
from medusa_runtime import kv_cache
from medusa_runtime.decoder import Decoder
from medusa_runtime.drafting.drafter import Drafter
from medusa_runtime.drafting.options import experience_of
from medusa_runtime.errors import CapacityError, InvalidLogitsError
from medusa_runtime.prefix_reuse import MIN_SAVED_ROWS, PrefixReuse
from medusa_runtime.sampling_params import AUTO
from medusa_runtime.sequence import SequenceState

from .decoding import CHAIN, check_invariants, finish, random_prompt
from .fake_backend import FakeBackend, plain_answer, random_tree
from .interrupting import interrupted
from .test_decoder_atomic import Fails

CONTEXT, TOKENS = 512, 12
RNG = np.random.default_rng(3)
SYSTEM, FIRST, SECOND, THIRD = (random_prompt(RNG, length) for length in (30, 20, 25, 21))


def reusing(backend, profile=CHAIN, budget=1 << 20):
    decoder = Decoder(backend, profile)
    decoder.reuse = PrefixReuse(decoder.cache, budget)
    return decoder


def sequence_of(prompt, tokens=TOKENS, context=CONTEXT):
    return SequenceState(tuple(prompt), tokens, frozenset(), context)


def ask(decoder, prompt, tokens=TOKENS):
    """The exact answer; returns it, and how many tokens were reused."""
    sequence = sequence_of(prompt, tokens, decoder.cache.context)
    decoder.begin(sequence)
    check_invariants(decoder)
    finish(decoder)
    assert (sequence.answer, sequence.finish_reason) == plain_answer(prompt, tokens, (), decoder.cache.context)
    assert sequence.reused < len(prompt)
    return sequence.answer, sequence.reused


@pytest.mark.parametrize("budget", [1, 1500, 6000, 1 << 20])
@pytest.mark.parametrize("seed", range(12))
def test_chats_with_any_drafts_and_budget_have_the_answers_of_plain_decoding(seed, budget, monkeypatch):
    monkeypatch.setattr(kv_cache, "INITIAL_CAPACITY", int(2 + seed % 5))
    rng = np.random.default_rng(seed)
    backend = FakeBackend(context=CONTEXT, hit_rate=0.7, spread=3)
    backend.prefill_chunk = int(rng.integers(5, 64))
    decoder = reusing(backend, random_tree(rng, int(rng.integers(1, 14))), budget)
    experience = experience_of(CHAIN, (CHAIN,), backend, None).of(AUTO)
    system, chats, reused = random_prompt(rng, 20), [[] for _ in range(4)], 0
    for _ in range(14):
        chat = chats[rng.integers(len(chats))]
        if not chat or rng.random() < 0.1:
            chat[:] = system[: rng.integers(len(system) + 1)]
        chat += random_prompt(rng, int(rng.integers(1, 24)))
        tokens = int(rng.integers(1, 30))
        if len(chat) + tokens >= CONTEXT - 50:
            chat[:] = system
        sequence = sequence_of(chat, tokens)
        if experience is not None and rng.random() < 0.5:
            sequence.drafter = Drafter(experience)
        decoder.begin(sequence)
        until = rng.integers(len(sequence.answer), 40)
        while sequence.finish_reason is None and len(sequence.answer) < until:  # some are left before their end
            decoder.step()
            check_invariants(decoder)
        expected, _ = plain_answer(chat, tokens, (), CONTEXT)
        assert sequence.answer == expected[: len(sequence.answer)]
        assert decoder.reuse.store.size <= budget
        chat += sequence.answer[: rng.integers(len(sequence.answer) + 1)]
        reused += sequence.reused
    assert reused > 50
    assert bool(backend.restored) is (budget > 1000)


def test_the_next_turn_computes_only_what_is_new_and_copies_nothing():
    decoder = reusing(FakeBackend(context=CONTEXT))
    answer, reused = ask(decoder, FIRST)
    assert reused == 0
    steps = len(decoder.backend.steps)
    _, reused = ask(decoder, FIRST + answer + SECOND)
    assert reused == len(FIRST) + len(answer) - 1  # the last token's row was never computed
    assert decoder.backend.steps[steps].input_ids.shape[1] == len(SECOND) + 1
    assert (decoder.backend.saved, decoder.backend.restored) == ([], [])


def test_the_same_prompt_again_computes_its_last_token():
    decoder = reusing(FakeBackend(context=CONTEXT))
    ask(decoder, FIRST)
    steps = len(decoder.backend.steps)
    assert ask(decoder, FIRST)[1] == len(FIRST) - 1
    assert decoder.backend.steps[steps].input_ids.shape[1] == 1
    assert ask(decoder, FIRST[:10])[1] == 9
    assert ask(decoder, [FIRST[0]])[1] == 0  # there is nothing before its last token


def test_a_sequence_is_copied_when_its_rows_are_about_to_be_overwritten():
    decoder = reusing(FakeBackend(context=CONTEXT))
    backend = decoder.backend
    first, _ = ask(decoder, SYSTEM + FIRST)
    second, reused = ask(decoder, SYSTEM + SECOND)
    rows = len(SYSTEM + FIRST) + TOKENS - 1
    assert (reused, backend.saved, backend.restored) == (len(SYSTEM), [rows], [])
    assert ask(decoder, SYSTEM + FIRST + first + THIRD)[1] == rows
    assert (len(backend.saved), backend.restored) == (2, [rows])
    assert ask(decoder, SYSTEM + SECOND + second + THIRD)[1] == len(SYSTEM + SECOND) + TOKENS - 1
    assert len(decoder.reuse.store) == 2  # the longer first chat took the place of the shorter one


def test_few_rows_are_computed_again_rather_than_copied():
    for lost in (MIN_SAVED_ROWS - 1, MIN_SAVED_ROWS):
        decoder = reusing(FakeBackend(context=CONTEXT))
        ask(decoder, SYSTEM + FIRST[:lost], 1)
        ask(decoder, [*SYSTEM, FIRST[0] + 1])
        assert bool(decoder.backend.saved) is (lost == MIN_SAVED_ROWS)


def test_no_budget_means_no_reuse_at_all():
    decoder = Decoder(FakeBackend(context=CONTEXT), CHAIN)
    for _ in range(2):
        assert ask(decoder, FIRST)[1] == 0
        assert ask(decoder, SECOND)[1] == 0
    assert decoder.backend.saved == []


def test_a_budget_below_every_sequence_still_reuses_what_is_in_the_cache():
    decoder = reusing(FakeBackend(context=CONTEXT), budget=1)
    ask(decoder, SYSTEM + FIRST)
    assert ask(decoder, SYSTEM + SECOND)[1] == len(SYSTEM)
    assert decoder.backend.saved == [] and len(decoder.reuse.store) == 0


def test_several_answers_to_a_prompt_and_the_rows_of_the_last_one():
    decoder = reusing(FakeBackend(context=CONTEXT))
    ask(decoder, SYSTEM + FIRST)
    answers = []
    for index in range(3):
        sequence = sequence_of(SYSTEM + SECOND, 30)
        sequence.rule = None if index == 1 else lambda tree, tokens, argmax, rows: ([0], int(rows(0).argsort()[-2]))
        if index == 0:
            decoder.begin(sequence, keep_prompt=True)
            assert sequence.reused == len(SYSTEM)
        else:
            decoder.begin_again(sequence)
        while sequence.finish_reason is None:
            decoder.step()
            check_invariants(decoder)
        answers.append(sequence.answer)
    assert answers[0] == answers[2] != answers[1]
    assert answers[1] == plain_answer(SYSTEM + SECOND, 30, (), CONTEXT)[0]
    rows = len(SYSTEM + SECOND)
    assert ask(decoder, SYSTEM + SECOND + answers[1] + THIRD)[1] == rows
    assert ask(decoder, SYSTEM + SECOND + answers[2] + THIRD)[1] == rows + 29  # from the store


def test_a_prompt_that_is_left_between_its_parts_keeps_the_rows_of_the_parts():
    backend = FakeBackend(context=CONTEXT)
    backend.prefill_chunk = 8
    decoder, calls = reusing(backend), []

    def checkpoint():
        calls.append(0)
        if len(calls) == 3:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        decoder.begin(sequence_of(SYSTEM), checkpoint)
    assert ask(decoder, SYSTEM)[1] == 16
    ask(decoder, SECOND)
    assert ask(decoder, SYSTEM + THIRD)[1] == len(SYSTEM)


def test_an_aborted_answer_leaves_its_rows():
    decoder = reusing(FakeBackend(context=CONTEXT))
    decoder.begin(sequence := sequence_of(FIRST))
    decoder.step()
    decoder.abort()
    rows = decoder.cache.length()
    assert ask(decoder, FIRST + sequence.answer + SECOND)[1] == rows


def test_warming_up_leaves_no_row_that_is_claimed():
    decoder = reusing(FakeBackend(context=CONTEXT), TreeProfile.plain())
    ask(decoder, FIRST)
    decoder.warm_up()
    assert ask(decoder, FIRST)[1] == 0


def test_a_context_that_is_full_is_reused_up_to_its_last_token():
    decoder = reusing(FakeBackend(context=64))
    answer, _ = ask(decoder, FIRST, 100)
    assert len(FIRST + answer) == 64
    assert ask(decoder, (FIRST + answer)[:63], 5)[1] == 62
    with pytest.raises(CapacityError, match="leaves no room for an answer"):
        decoder.begin(sequence_of(FIRST + answer, context=64))
    ask(decoder, SECOND, 100)
    assert ask(decoder, (FIRST + answer)[:63], 5)[1] == 62


def test_without_memory_for_a_copy_the_prompt_is_answered_all_the_same(monkeypatch):
    decoder = reusing(FakeBackend(context=CONTEXT))
    ask(decoder, FIRST)
    ask(decoder, SECOND)
    assert len(decoder.reuse.store) == 1

    def refused(*_):
        raise CapacityError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(decoder.backend, "save_past", refused)
        ask(decoder, THIRD)
    assert len(decoder.reuse.store) == 0
    ask(decoder, SECOND)
    assert ask(decoder, THIRD)[1] > 0


def test_rows_behind_invalid_logits_are_forgotten(monkeypatch):
    decoder = reusing(FakeBackend(context=CONTEXT))
    ask(decoder, FIRST)
    ask(decoder, SECOND)
    with monkeypatch.context() as patched:
        patched.setattr(decoder.backend, "read_logits", lambda row: np.full(32, np.nan, np.float32))
        with pytest.raises(InvalidLogitsError):
            decoder.begin(sequence_of(FIRST + THIRD))
    assert len(decoder.reuse.store) == 0
    assert ask(decoder, FIRST + THIRD)[1] == 0


CHATS = (SYSTEM + FIRST, SYSTEM + SECOND, THIRD + FIRST, SYSTEM + FIRST, SYSTEM + SECOND + FIRST)


def talk(decoder):
    for prompt in CHATS:
        decoder.begin(sequence_of(prompt, 8))
        decoder.step()


def check_exact(decoder):
    """Whatever happened before, all answers are exact, also those that reuse what was left."""
    decoder.abort()
    for prompt in (*CHATS[::-1], *CHATS):
        ask(decoder, prompt, 5)


class FailsWithCopies(Fails):
    """Fails at one call of any kind."""

    def __init__(self, at, after):
        super().__init__(at, after)
        for name in ("save_past", "restore_past"):
            setattr(self, name, self._failing(getattr(self, name)))


@pytest.mark.parametrize("budget", [2000, 1 << 20])
@pytest.mark.parametrize("after", [False, True])
def test_a_backend_that_fails_at_any_call_leaves_no_wrong_row(after, budget, monkeypatch):
    monkeypatch.setattr(kv_cache, "INITIAL_CAPACITY", 2)
    at, failed = 2, True
    while failed:
        backend = FailsWithCopies(at, after)
        decoder = reusing(backend, budget=budget)
        try:
            talk(decoder)
            failed = False
        except OSError:
            pass
        backend.at = 0  # nothing fails any more
        check_exact(decoder)
        at += 1
    assert at > 50 and backend.saved and backend.restored


class HalfRestored(FakeBackend):
    """Fails in the middle of copying rows back."""

    fails = True

    def restore_past(self, saved, length, sequence=0):
        if self.fails:
            self.tokens[sequence, : length // 2] = saved.data[0][: length // 2]
            raise OSError("the device fell off")
        super().restore_past(saved, length, sequence)


def test_rows_that_were_restored_in_part_are_not_claimed():
    decoder = reusing(HalfRestored(context=CONTEXT))
    ask(decoder, THIRD + FIRST)
    ask(decoder, SECOND + FIRST)
    with pytest.raises(OSError, match="fell off"):
        decoder.begin(sequence_of(THIRD + FIRST))
    assert decoder.cache.length() == 0
    decoder.backend.fails = False
    assert ask(decoder, SECOND + FIRST)[1] > 0  # from the copy made before
    assert ask(decoder, THIRD + FIRST)[1] > 0


FILES = ("decoder.py", "kv_cache.py", "sequence.py", "prefill.py", "prefix_reuse.py", "prefix_store.py")


def begun_with_copies():
    decoder = reusing(FakeBackend(context=CONTEXT, hit_rate=0.8))
    for prompt in (SYSTEM + FIRST, THIRD + FIRST):
        decoder.begin(sequence_of(prompt, 8))
        decoder.step()
    return decoder


@pytest.mark.parametrize("event", ["line", "opcode"])
@pytest.mark.parametrize("prompt", [SYSTEM + FIRST, THIRD + SECOND], ids=["stored", "in the cache"])
def test_an_interrupt_anywhere_in_a_prompt_leaves_no_wrong_row(prompt, event):
    number, came_so_far = 0, True
    while came_so_far:
        decoder = begun_with_copies()
        begin = partial(decoder.begin, sequence_of(prompt, 8))
        came_so_far = interrupted(begin, number, FILES, event)
        decoder.abort()
        for next_prompt in (THIRD + FIRST, prompt):
            ask(decoder, next_prompt, 2)
        number += 1 if event == "line" else 7
    assert decoder.backend.saved
    assert number > 60


def test_an_interrupt_anywhere_in_a_step_leaves_no_wrong_row():
    number, came_so_far = 0, True
    while came_so_far:
        decoder = begun_with_copies()
        came_so_far = interrupted(decoder.step, number, FILES)
        held = decoder.sequence
        decoder.abort()
        _, reused = ask(decoder, [*held.prompt, *held.answer, *SECOND], 2)
        assert reused >= len(held.prompt)
        number += 1
    assert number > 40


def test_a_tree_without_heads_reuses_too():
    decoder = reusing(FakeBackend(context=CONTEXT), TreeProfile.plain())
    ask(decoder, FIRST)
    ask(decoder, SECOND)
    assert ask(decoder, FIRST + THIRD)[1] == len(FIRST)
