"""Drafts change which steps are run, never the tokens: whole answers over the toy model, with every kind of draft."""

import numpy as np
import pytest
from medusa_profiles import TreeProfile
from medusa_runtime.decoder import Decoder
from medusa_runtime.drafting.controller import DraftOptions, Experience
from medusa_runtime.drafting.drafter import Draft, Drafter
from medusa_runtime.drafting.step_times import StepTimes
from medusa_runtime.sequence import SequenceState

from ..decoding import CHAIN, check_invariants
from ..fake_backend import EOS, FakeBackend, plain_answer, random_tree

TREES = {CHAIN: (0.6, 0.6, 0.6), TreeProfile("two", ((0,),)): (0.6,)}


def sequence_of(prompt, limit, drafter, context=4096):
    sequence = SequenceState(tuple(prompt), limit, frozenset({EOS}), context)
    sequence.drafter = drafter
    return sequence


class RandomDrafter:
    """Drafts anything: a random tree, random literals or right ones, or both."""

    def __init__(self, rng, answer):
        self._rng, self._answer = rng, answer
        self.observed = []

    def next(self, sequence):
        rng, done = self._rng, len(sequence.answer)
        profile = random_tree(rng, 8) if rng.random() < 0.5 else TreeProfile.plain()
        literals = self._answer[done : done + int(rng.integers(0, 6))]
        if rng.random() < 0.4 and literals:
            literals = [*literals[:-1], int(rng.integers(30))]
        return Draft(profile, literals)

    def observe(self, tree, path, ms):
        self.observed.append((tree.name, path, ms))


@pytest.mark.parametrize("seed", range(20))
def test_any_draft_gives_the_tokens_of_plain_decoding(seed):
    rng = np.random.default_rng(seed)
    prompt, context = rng.integers(30, size=int(rng.integers(1, 300))).tolist(), int(rng.choice([310, 330, 4096]))
    expected, _ = plain_answer(prompt, 60, (EOS,), context)
    drafter = RandomDrafter(rng, expected)
    decoder = Decoder(FakeBackend(hit_rate=0.7, spread=3, context=context))
    decoder.begin(sequence := sequence_of(prompt, 60, drafter, context))
    while sequence.finish_reason is None:
        decoder.step()
        check_invariants(decoder)
    assert sequence.answer == expected
    assert len(drafter.observed) == decoder.steps


@pytest.mark.parametrize("literals", [(), (1, 2, 4), (3,)])
@pytest.mark.parametrize("trees", [{}, TREES])
@pytest.mark.parametrize("joint", [False, True])
def test_the_drafter_gives_the_tokens_of_plain_decoding(literals, trees, joint):
    experience = Experience(DraftOptions(trees, literals, joint), StepTimes())
    backend = FakeBackend(hit_rate=0.5, spread=2)
    decoder = Decoder(backend)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        piece = rng.integers(30, size=8).tolist()
        prompt = piece * int(rng.integers(1, 20))
        decoder.begin(sequence := sequence_of(prompt, 50, Drafter(experience)))
        while sequence.finish_reason is None:
            decoder.step()
            check_invariants(decoder)
        assert sequence.answer == plain_answer(prompt, 50, (EOS,), 4096)[0]
    if not trees:
        assert not any(step.draft for step in backend.steps)


def copied(drafter, prompt, answer, room=50):
    sequence = sequence_of(prompt, room + len(answer), drafter)
    sequence.answer.extend(answer)
    return drafter.next(sequence)


def test_the_draft_is_what_followed_the_last_tokens_before():
    experience = Experience(DraftOptions({}, (4,)), StepTimes())
    text = list(range(20))
    assert copied(Drafter(experience), [*text, 25, 5, 6], [7]).literals == [8, 9, 10, 11]
    assert copied(Drafter(experience), [*text, 25, 17, 18], [19]).literals == [25, 17, 18, 19]
    assert copied(Drafter(experience), [*text, 25], [26]).literals == ()
    assert copied(Drafter(experience), [*text, 25, 5, 6], [7], room=2).literals == [8, 9, 7, 7]  # no room for more


def test_the_index_follows_the_answer_and_a_step_that_was_undone():
    drafter = Drafter(Experience(DraftOptions({}, (2,)), StepTimes()))
    sequence = sequence_of([1, 2, 3, 4, 9, 1], 50, drafter)
    sequence.answer.extend([2])
    assert drafter.next(sequence).literals == [3, 4]
    sequence.answer.extend([3, 4])
    assert drafter.next(sequence).literals == [9, 1]
    del sequence.answer[1:]  # the decoder took back what an interrupted step had added
    sequence.answer.extend([7])
    assert drafter.next(sequence).literals == ()
    sequence.answer.extend([1, 2])
    assert drafter.next(sequence).literals == [7, 1]
