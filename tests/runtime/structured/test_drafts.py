"""Tokens that a grammar forces become literals where that pays, and no draft changes a token."""

import dataclasses

import numpy as np
import pytest
from medusa_profiles import TreeProfile
from medusa_runtime.answer_rule import SampleRule
from medusa_runtime.decoder import Decoder
from medusa_runtime.drafting.controller import PLAIN, Choice, Controller, DraftOptions, Experience
from medusa_runtime.drafting.drafter import Draft, Drafter
from medusa_runtime.drafting.step_times import StepTimes
from medusa_runtime.sampling.sampler import Sampler
from medusa_runtime.sampling_params import SamplingParams
from medusa_runtime.sequence import SequenceState
from medusa_runtime.structured.answer_grammar import Forced
from medusa_runtime.structured.compiler import GrammarCompiler

from ..fake_backend import FakeBackend, random_tree
from .constrained import END, VOCAB, constrained_tokens
from .schemas import json_tokenizer
from .test_engine import KINDS, PROMPT

CHAIN = TreeProfile("chain", ((0,), (0, 0), (0, 0, 0)))


def grammar_of(backend, params):
    return GrammarCompiler(json_tokenizer(), backend.model).compile(params.structured_outputs).begin()


def sequence_of(params, grammar, drafter, limit=60):
    sequence = SequenceState(tuple(PROMPT), limit, frozenset({END}), 4096)
    sampler = Sampler(params, PROMPT, VOCAB, {END}, (), params.seed or 0, 0, grammar)
    sequence.rule, sequence.drafter = SampleRule(sampler, sequence.answer), drafter
    return sequence


class RandomDrafter:
    """Drafts heads' candidates and literals side by side; the literals are right, wrong, forced, or not allowed."""

    def __init__(self, rng, answer, grammar):
        self._rng, self._answer, self._grammar = rng, answer, grammar

    def next(self, sequence):
        rng, done = self._rng, len(sequence.answer)
        profile = random_tree(rng, 8) if rng.random() < 0.6 else TreeProfile.plain()
        kind = rng.integers(3)
        if kind == 0:
            return Draft(profile, list(self._grammar.forced(sequence.answer, 5).tokens))
        literals = self._answer[done : done + int(rng.integers(0, 6))]
        if kind == 1 and literals:
            literals = [*literals[:-1], int(rng.integers(VOCAB))]
        return Draft(profile, literals)

    def observe(self, tree, path, ms):
        pass


@pytest.mark.parametrize("outputs", KINDS, ids=lambda one: next(iter(one)))
def test_trees_with_any_tokens_side_by_side_give_those_of_plain_constrained_decoding(outputs):
    for seed in range(4):
        params = SamplingParams(structured_outputs=outputs, temperature=seed % 2, seed=seed, max_tokens=60)
        backend, rng = FakeBackend(hit_rate=0.6, spread=3, vocab=VOCAB), np.random.default_rng(seed)
        expected, _ = constrained_tokens(PROMPT, params)
        grammar, decoder = grammar_of(backend, params), Decoder(backend)
        decoder.begin(sequence := sequence_of(params, grammar, RandomDrafter(rng, expected, grammar)))
        while sequence.finish_reason is None:
            decoder.step()
        assert sequence.answer == expected


class Broken(Exception):
    pass


def test_a_step_that_fails_at_any_row_is_repeated_exactly(monkeypatch):
    params = SamplingParams(structured_outputs=KINDS[0], max_tokens=60)
    expected, _ = constrained_tokens(PROMPT, params)
    backend = FakeBackend(hit_rate=0.9, spread=1, vocab=VOCAB)
    read, left = backend.read_logits, [0]

    def failing(row, sequence=0):
        left[0] -= 1
        if left[0] == 0:
            raise Broken
        return read(row, sequence)

    monkeypatch.setattr(backend, "read_logits", failing)
    drafter = Drafter(Experience(DraftOptions({CHAIN: (0.9,) * 3}, (3, 7)), StepTimes()), grammar_of(backend, params))
    decoder = Decoder(backend, CHAIN)
    decoder.begin(sequence := sequence_of(params, grammar_of(backend, params), drafter))
    failures = 0
    while sequence.finish_reason is None:
        for at in (1, 2, 3):
            before, left[0] = list(sequence.answer), at
            try:
                decoder.step()
                break
            except Broken:
                failures += 1
                assert sequence.answer == before
            left[0] = 0
        else:
            decoder.step()
    assert sequence.answer == expected and failures > 5


def controller(literals=(1, 3, 7), profiles=None):
    return Controller(Experience(DraftOptions(profiles or {}, literals), StepTimes()))


def literals_of(one, forced):
    choice = one.choose(None, 0, forced)
    assert choice.forced == (choice.literals > 0)
    return choice.literals


def test_as_many_literals_as_pay_for_their_rows():
    assert literals_of(controller(), Forced([1] * 7, [])) == 7
    assert literals_of(controller(), Forced([1] * 3, [])) == 3
    assert literals_of(controller(), Forced([1] * 6, [])) == 7  # one of them is padding
    assert literals_of(controller(), Forced([], [])) == 0
    assert literals_of(controller(literals=()), Forced([1, 2], [])) == 0
    heads = controller(profiles={CHAIN: (0.95, 0.95, 0.95)})
    for _ in range(3):
        heads.observe(Choice(PLAIN, 0), None, 0, False, 10.0)
        heads.observe(Choice(CHAIN, 0), None, 3, False, 11.0)
    assert literals_of(heads, Forced([1], [])) == 0 and literals_of(heads, Forced([1] * 7, [])) == 7


def test_guesses_that_fail_are_no_longer_verified_and_those_that_hold_are():
    doubtful, guess = controller(literals=(1,)), Forced([1], [0])
    for _ in range(100):
        doubtful.observe_forced(guess, 1, 0)
        doubtful.observe(Choice(PLAIN, 1), None, 0, False, 10.5)
        doubtful.observe(Choice(PLAIN, 0), None, 0, False, 10.0)
    assert literals_of(doubtful, guess) == 0 and literals_of(doubtful, Forced([1], [])) == 1
    for _ in range(100):
        doubtful.observe_forced(guess, 1, 1)
    assert literals_of(doubtful, guess) == 1


def test_only_guesses_that_were_reached_count():
    one, forced = controller(), Forced([1, 2, 3, 4], [1, 3])
    one.observe_forced(forced, 4, 0)  # the first token, a certain one, was not accepted
    one.observe_forced(forced, 1, 1)  # the guess was not tried
    assert one._guesses.value == controller()._guesses.value
    one.observe_forced(forced, 4, 1)
    low = one._guesses.value
    one.observe_forced(forced, 4, 4)
    assert low < controller()._guesses.value and one._guesses.value > low


def test_what_followed_before_is_drafted_as_far_as_it_is_allowed():
    encode = json_tokenizer().encode
    known = encode('["xyz": 310, "xyz": 310]', add_special_tokens=False)
    answer = encode('"xyz":', add_special_tokens=False)
    params = SamplingParams(structured_outputs={"regex": '"[a-z]+": ?[0-4]*'}, max_tokens=60)
    backend = FakeBackend(vocab=VOCAB)
    experience = Experience(DraftOptions({}, (1, 2, 3, 5, 7)), StepTimes())
    found = []
    for grammar in (None, grammar_of(backend, params)):
        drafter = Drafter(experience, grammar)
        sequence = SequenceState(tuple(known), 60, frozenset({END}), 4096, answer=list(answer))
        found.append(json_tokenizer().decode(drafter.next(sequence).literals))
    assert found[0].startswith(" 310]") and found[1].startswith(" 310") and "]" not in found[1]


def test_parameters_with_outputs_can_be_replaced():
    params = SamplingParams(structured_outputs=KINDS[0])
    assert dataclasses.replace(params, seed=3).structured_outputs == params.structured_outputs
