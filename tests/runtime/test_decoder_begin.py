"""Beginning an answer: prompts in parts, rules of one sequence, and several answers to one prompt."""

import numpy as np
import pytest
from medusa_runtime.accept import walk
from medusa_runtime.backends.base import PREFILL_CHUNK
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import CapacityError, MedusaError
from medusa_runtime.sequence import SequenceState

from .decoding import CHAIN, decode, finish, random_prompt
from .fake_backend import FakeBackend, plain_answer, random_tree

LONG = random_prompt(np.random.default_rng(5), 2 * PREFILL_CHUNK + 9)


def sequence_of(prompt, tokens=20, rule=None, context=4096, summaries=False):
    return SequenceState(tuple(prompt), tokens, frozenset(), context, rule, summaries)


class Second:
    """Chooses the second most likely token, everywhere; `read` lists the rows that it looked at."""

    def __init__(self):
        self.read = []

    def __call__(self, tree, tokens, argmax, rows):
        def second(node):
            self.read.append(node)
            summary = rows.summary(node)
            return int(np.argsort(-rows(node), kind="stable")[1]) if summary is None else int(summary.ids[1])

        return walk(tree, tokens, second)


def second_answer(prompt, tokens):
    """The answer by this rule, one token at a time."""
    decoder = Decoder(FakeBackend())
    decoder.begin(sequence := sequence_of(prompt, tokens, Second()))
    finish(decoder)
    assert sequence.answer[0] != plain_answer(prompt, 1, (), 4096)[0][0]
    return sequence.answer


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_prompt_is_left_between_its_parts_and_the_next_one_is_right(part):
    class Enough(Exception):
        pass

    calls = []

    def checkpoint():
        if len(calls) == part:
            raise Enough
        calls.append(part)

    decoder = Decoder(FakeBackend(), CHAIN)
    before = len(decoder.backend.steps)
    with pytest.raises(Enough):
        decoder.begin(sequence_of(LONG), checkpoint)
    assert decoder.sequence is None and len(decoder.backend.steps) == before + part
    with pytest.raises(MedusaError, match="nothing to decode"):
        decoder.step()
    assert decode(decoder, [4, 5], 20) == plain_answer([4, 5], 20, (), 4096)


def test_a_prompt_without_an_interruption_calls_the_checkpoint_before_each_part():
    decoder, calls = Decoder(FakeBackend(), CHAIN), []
    decoder.begin(sequence := sequence_of(LONG), lambda: calls.append(len(decoder.backend.steps)))
    assert calls == [0, 1, 2]
    finish(decoder)
    assert sequence.answer == plain_answer(LONG, 20, (), 4096)[0]


def test_a_prompt_as_long_as_the_context_is_refused_before_anything_changes():
    decoder = Decoder(FakeBackend(context=16), CHAIN)
    decoder.start([1, 2], 8, ())
    sequence = decoder.sequence
    with pytest.raises(CapacityError, match="the prompt has 16 tokens"):
        decoder.begin(sequence_of(range(16), context=16))
    assert decoder.sequence is sequence
    finish(decoder)
    assert sequence.answer == plain_answer([1, 2], 8, (), 16)[0]


@pytest.mark.parametrize("summaries", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_a_rule_of_one_sequence_chooses_all_its_tokens_and_none_of_the_next(seed, summaries):
    rng = np.random.default_rng(seed)
    tree = random_tree(rng, 12)
    backend = FakeBackend(hit_rate=0.7, spread=3, summaries=summaries)
    decoder = Decoder(backend, tree)
    decoder.begin(sequence := sequence_of([7, 8, 9], 40, Second(), summaries=summaries))
    assert decoder.last_path == [0] and decoder.last_tree.size == 1
    finish(decoder)
    assert sequence.answer == second_answer([7, 8, 9], 40)
    assert decode(decoder, [7, 8, 9], 40) == plain_answer([7, 8, 9], 40, (), 4096)


def test_the_rows_of_the_last_tokens_can_be_read_after_each_step():
    decoder = Decoder(FakeBackend(hit_rate=0.8, spread=2), random_tree(np.random.default_rng(3), 10))
    decoder.begin(sequence := sequence_of([5, 6], 60))
    tokens = list(sequence.answer)
    while True:
        assert len(decoder.last_path) == len(tokens)
        assert [int(decoder.rows(row).argmax()) for row in decoder.last_path] == tokens
        if sequence.finish_reason is not None:
            break
        tokens = decoder.step()
        assert decoder.last_path == decoder.backend.committed[-1]


@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_several_answers_to_one_prompt_need_one_prefill(tokens):
    decoder = Decoder(FakeBackend(hit_rate=0.8), CHAIN)
    decoder.begin(first := sequence_of(LONG, tokens), keep_prompt=True)
    finish(decoder)
    prefilled = sum(step.input_ids.shape[1] for step in decoder.backend.steps if not step.draft)
    answers = []
    for rule in (Second(), None, Second()):
        decoder.begin_again(sequence := sequence_of(LONG, tokens, rule))
        finish(decoder)
        answers.append(sequence.answer)
    plain = plain_answer(LONG, tokens, (), 4096)[0]
    assert first.answer == plain
    assert answers == [expected := second_answer(LONG, tokens), plain, expected]
    again = sum(step.input_ids.shape[1] for step in decoder.backend.steps if not step.draft) - prefilled
    assert again <= 3  # a plain step each, as the hidden state of the prompt's last token is gone


def test_another_prompt_cannot_be_answered_again():
    decoder = Decoder(FakeBackend(), CHAIN)
    for keep, other in ((False, [1, 2]), (True, [1, 3])):
        decoder.begin(sequence_of([1, 2]), keep_prompt=keep)
        with pytest.raises(MedusaError, match="is not in the KV cache"):
            decoder.begin_again(sequence_of(other))
    decoder.begin(sequence_of([1, 2]), keep_prompt=True)
    decoder.start([1, 2], 5, ())
    with pytest.raises(MedusaError, match="is not in the KV cache"):
        decoder.begin_again(sequence_of([1, 2]))
    assert decode(decoder, [4, 5], 20) == plain_answer([4, 5], 20, (), 4096)
