"""Where an answer ends, and what is refused: by a stop id, a limit, the context, a bad prompt, want of memory."""

import numpy as np
import pytest
from medusa_profiles import ProfileError, TreeProfile
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import CapacityError, MedusaError, PromptError

from .decoding import CHAIN, check_invariants, decode, finish, random_prompt
from .fake_backend import EOS, VOCAB, FakeBackend, plain_answer


@pytest.mark.parametrize("end", range(1, 12))
def test_a_stop_id_or_a_limit_ends_inside_an_accepted_path(end):
    prompt = [1]
    answer, _ = plain_answer(prompt, 60, (), 4096)
    stop = next(token for token in answer[end - 1 :] if answer.index(token) >= end - 1)
    decoder = Decoder(FakeBackend(), CHAIN)
    until_stop = answer[: answer.index(stop) + 1]
    assert decode(decoder, prompt, 60, {stop}) == (until_stop, "stop")
    assert decode(decoder, prompt, end) == (answer[:end], "length")
    short = Decoder(FakeBackend(context=1 + end), CHAIN)
    assert decode(short, prompt, 60) == (answer[:end], "length")


def test_the_models_own_end_tokens_are_the_default():
    prompt = next(p for p in ([n] for n in range(VOCAB)) if plain_answer(p, 60, {EOS}, 4096)[1] == "stop")
    decoder = Decoder(FakeBackend(), CHAIN)
    decoder.start(prompt, 60)
    finish(decoder)
    assert (decoder.sequence.answer, decoder.sequence.finish_reason) == plain_answer(prompt, 60, {EOS}, 4096)
    assert decoder.sequence.last_token == EOS


@pytest.mark.parametrize(("context", "sizes"), [(20, [4] * 4), (19, [4] * 4), (18, [4, 4, 4, 1, 1]), (16, [4] * 3)])
def test_where_the_context_has_no_room_for_the_tree_it_gives_way_to_plain_decoding(context, sizes):
    backend = FakeBackend(context)
    decoder = Decoder(backend, CHAIN)
    assert decode(decoder, [1, 2, 3], 100) == plain_answer([1, 2, 3], 100, (), context)
    assert decoder.sequence.length == context
    assert [step.input_ids.shape[1] for step in backend.steps[1:]] == sizes
    assert max(step.position_ids.max() for step in backend.steps) < context


def test_a_tree_deeper_than_the_context_is_never_run():
    backend = FakeBackend(context=4)
    decoder = Decoder(backend, TreeProfile("t", tuple((0,) * d for d in range(1, 6))))
    assert decode(decoder, [1], 100) == plain_answer([1], 100, (), 4)
    assert all(step.input_ids.shape == (1, 1) for step in backend.steps)


def test_an_answer_of_one_token_takes_no_step():
    backend = FakeBackend()
    decoder = Decoder(backend, CHAIN)
    assert decode(decoder, [1, 2], 1) == plain_answer([1, 2], 1, (), 4096)
    assert len(backend.steps) == 1


def test_the_longest_prompt_leaves_room_for_one_token():
    decoder = Decoder(FakeBackend(context=300), CHAIN)
    prompt = random_prompt(np.random.default_rng(0), 299)
    assert decode(decoder, prompt, 50) == plain_answer(prompt, 50, (), 300)
    assert decoder.sequence.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "more", "error", "message"),
    [
        ([], {}, PromptError, "the prompt is empty"),
        ([[1, 2]], {}, PromptError, "one flat list of token ids"),
        ([1, -1], {}, PromptError, "token ids outside 0 … 31"),
        ([VOCAB], {}, PromptError, "token ids outside 0 … 31"),
        ([1], {"max_new_tokens": 0}, PromptError, "max_new_tokens is 0; expected at least 1"),
        (
            [1] * 50,
            {},
            CapacityError,
            "the prompt has 50 tokens, which leaves no room for an answer in the context of 50",
        ),
        (
            [1] * 51,
            {},
            CapacityError,
            "the prompt has 51 tokens, which leaves no room for an answer in the context of 50",
        ),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused_before_any_work(prompt, more, error, message):
    backend = FakeBackend(context=50)
    decoder = Decoder(backend, CHAIN)
    with pytest.raises(error, match=message):
        decoder.start(prompt, **more)
    assert backend.steps == []
    decoder.start([1, 2], 20, ())
    with pytest.raises(error, match=message):
        decoder.start(prompt, **more)
    finish(decoder)  # the answer under way is not lost
    assert decoder.sequence.answer == plain_answer([1, 2], 20, (), 50)[0]


def test_a_second_decoder_on_a_backend_is_refused_and_harms_nothing():
    backend = FakeBackend()
    decoder = Decoder(backend, CHAIN)
    decoder.start([1, 2], 20, ())
    decoder.step()
    with pytest.raises(MedusaError, match="in use by another decoder"):
        Decoder(backend)
    finish(decoder)
    assert decoder.sequence.answer == plain_answer([1, 2], 20, (), 4096)[0]
    assert decode(decoder, [3], 20) == plain_answer([3], 20, (), 4096)  # the same one may start again
    del decoder
    assert decode(Decoder(backend), [4], 20) == plain_answer([4], 20, (), 4096)


def test_a_decoder_that_cannot_be_made_leaves_the_backend_free():
    backend = FakeBackend(heads=2)
    try:
        Decoder(backend, CHAIN)
    except ProfileError:  # while it is handled, all that was made is still there
        decoder = Decoder(backend)
    assert decode(decoder, [3], 20) == plain_answer([3], 20, (), 4096)


def test_there_is_no_step_before_a_prompt():
    backend = FakeBackend()
    with pytest.raises(MedusaError, match="start a prompt first"):
        Decoder(backend, CHAIN).step()
    assert backend.steps == []


@pytest.mark.parametrize(("max_new_tokens", "stop_ids", "context"), [(1, (), 99), (9, (), 99), (99, (), 9)])
def test_a_finished_sequence_takes_no_further_step(max_new_tokens, stop_ids, context):
    backend = FakeBackend(context)
    decoder = Decoder(backend, CHAIN)
    answer, _ = decode(decoder, [3], max_new_tokens, stop_ids)
    ran, committed, answer = len(backend.steps), len(backend.committed), list(answer)
    with pytest.raises(MedusaError, match="no step after an answer is finished"):
        decoder.step()
    assert (len(backend.steps), len(backend.committed), decoder.sequence.answer) == (ran, committed, answer)
    check_invariants(decoder)


def test_memory_that_runs_out_in_a_step_costs_no_token():
    backend = FakeBackend()
    decoder = Decoder(backend, CHAIN)
    prompt = random_prompt(np.random.default_rng(1), 250)
    decoder.start(prompt, 100, ())
    backend.memory = 256
    with pytest.raises(CapacityError, match="no memory"):
        finish(decoder)
    check_invariants(decoder)
    backend.memory = None
    finish(decoder)
    assert decoder.sequence.answer == plain_answer(prompt, 100, (), 4096)[0]


def test_a_prompt_that_finds_no_memory_leaves_nothing_to_step_on():
    backend = FakeBackend()
    decoder = Decoder(backend, CHAIN)
    decoder.start([1, 2], 50, ())
    backend.memory = 256
    with pytest.raises(CapacityError, match="no memory"):
        decoder.start([1] * 300)
    with pytest.raises(MedusaError, match="start a prompt first"):
        decoder.step()
    assert decode(decoder, [1, 2], 50) == plain_answer([1, 2], 50, (), 4096)
