"""Two threads and one decoder or backend: the second is refused at once, the first gets its answer."""

import threading

import numpy as np
import pytest
from medusa_profiles import TreeProfile
from medusa_runtime.backends.base import literal_step
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import BusyError, MedusaError
from medusa_runtime.kv_cache import KvCache
from medusa_runtime.sequence import SequenceState

from .decoding import CHAIN, begun, decode, finish
from .fake_backend import FakeBackend, plain_answer
from .interrupting import elsewhere, run_together

PROMPT = [1, 2]
EXPECTED = plain_answer(PROMPT, 20, (), 4096)
ENTRIES = {
    "start": lambda decoder: decoder.start([3], 5),
    "begin": lambda decoder: decoder.begin(SequenceState((3,), 5, frozenset(), 100)),
    "step": lambda decoder: decoder.step(),
    "set_profile": lambda decoder: decoder.set_profile(TreeProfile.plain()),
    "warm_up": lambda decoder: decoder.warm_up(),
}


class Waits(FakeBackend):
    """Its runs call `meanwhile`, once, in the middle."""

    def __init__(self):
        super().__init__(hit_rate=0.8)
        self.meanwhile = None

    def run(self, step):
        work, self.meanwhile = self.meanwhile, None
        if work is not None:
            work()
        super().run(step)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("when", ["in the prefill", "in a step", "between steps"])
def test_a_second_thread_is_refused_and_the_first_unharmed(entry, when):
    found, decoder = [], Decoder(Waits(), CHAIN)

    def second():
        found.append(elsewhere(lambda: ENTRIES[entry](decoder)))

    if when == "in the prefill":
        decoder.backend.meanwhile = second
    decoder.start(PROMPT, 20, ())
    if when == "in a step":
        decoder.backend.meanwhile = second
    decoder.step()
    if when == "between steps":
        second()
    finish(decoder)
    assert [type(error) for error in found] == [BusyError]
    assert (decoder.sequence.answer, decoder.sequence.finish_reason) == EXPECTED
    assert decoder.profile is CHAIN
    assert elsewhere(lambda: decode(decoder, [3], 20)) == plain_answer([3], 20, (), 4096)


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_inside_of_a_step_of_the_same_thread_is_refused(entry):
    """As from the handler of a signal."""
    found, decoder = [], Decoder(Waits(), CHAIN)
    decoder.start(PROMPT, 20, ())

    def handler():
        with pytest.raises(BusyError, match="one call at a time"):
            ENTRIES[entry](decoder)
        found.append(entry)

    decoder.backend.meanwhile = handler
    finish(decoder)
    assert (found, decoder.sequence.answer) == ([entry], EXPECTED[0])


def test_an_answer_that_is_given_up_or_whose_thread_has_ended_stands_in_nobodys_way():
    decoder = Decoder(FakeBackend(), CHAIN)
    decoder.start(PROMPT, 20, ())
    decoder.abort()
    assert elsewhere(lambda: decoder.start([3], 20)) == plain_answer([3], 1, (), 4096)[0]
    assert decode(decoder, PROMPT, 20) == EXPECTED  # the other thread has ended in the middle of its answer


def test_another_thread_may_go_on_with_an_answer_that_it_names():
    decoder = Decoder(FakeBackend(), CHAIN)
    sequence = begun(decoder, PROMPT, 20, ())
    assert elsewhere(lambda: decoder.step(sequence)) == EXPECTED[0][1:5]
    begun(decoder, [3], 20, ())
    with pytest.raises(MedusaError, match="another prompt was started"):
        decoder.step(sequence)


def test_whole_answers_of_many_threads_are_right_or_refused():
    """120 answers by four threads at once; before, some were a mixture of two."""
    decoder, refused, wrong, right = Decoder(FakeBackend(hit_rate=0.7), CHAIN), [], [], []
    expected = {first: plain_answer([first], 12, (), 4096)[0] for first in range(4)}
    barrier = threading.Barrier(4)

    def run(first):
        barrier.wait()
        for _ in range(30):
            try:
                answer = list(decoder.start([first], 12, ()))
                while len(answer) < 12:
                    answer += decoder.step()
            except BusyError:
                refused.append(first)
            else:
                (right if answer == expected[first] else wrong).append(answer)

    run_together(run, range(4), 1e-5)
    assert not wrong
    assert right and refused and len(right) + len(refused) == 120


def test_a_cache_of_another_thread_is_refused_while_a_step_runs():
    found, decoder = [], Decoder(Waits(), CHAIN)
    decoder.start(PROMPT, 20, ())

    def second():
        for work in (
            lambda: decoder.cache.truncate(0),
            lambda: decoder.cache.reserve(900),
            lambda: decoder.cache.commit([0]),
            lambda: KvCache(decoder.backend),
        ):
            found.append(elsewhere(work))

    decoder.backend.meanwhile = second
    finish(decoder)
    assert [type(error) for error in found] == [BusyError] * 4
    assert decoder.sequence.answer == EXPECTED[0]


def test_a_cache_whose_commit_fails_keeps_its_length_and_drafts_from_nothing_stale(monkeypatch):
    backend = FakeBackend()
    cache = KvCache(backend)
    backend.run(literal_step(np.array([4, 8, 15], np.int32), 0, np.array([2], np.int32)))
    cache.commit(range(2))
    monkeypatch.setattr(backend, "commit", lambda *_: 1 / 0)
    backend.run(literal_step(np.array([4], np.int32), 2, np.array([0], np.int32)))
    with pytest.raises(ZeroDivisionError):
        cache.commit([0])
    assert (cache.length(), cache.can_draft()) == (2, False)
