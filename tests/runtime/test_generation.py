"""A stream of text: an iterator that can be closed, left, read by another thread, and never loses a piece."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from medusa_runtime.decoder import Decoder
from medusa_runtime.errors import BusyError, CapacityError, MedusaError
from medusa_runtime.generation import Generation

from .decoding import CHAIN
from .fake_backend import FakeBackend, plain_answer
from .interrupting import elsewhere, interrupted


class Words:
    """A tokenizer whose tokens are words."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{token}>" for token in ids)

    def token(self, token_id: int) -> str:
        return f"<{token_id}>"


WORDS: Any = Words()
EXPECTED = plain_answer([6, 6], 20, (31,), 4096)
TEXT = WORDS.decode(EXPECTED[0])


@pytest.fixture
def decoder() -> Decoder:
    return Decoder(FakeBackend(hit_rate=0.8), CHAIN)


def ask(decoder: Decoder, first: int = 6, tokens: int = 20) -> Generation:
    return Generation(decoder, WORDS, [first, 6], tokens)


def test_it_is_an_iterator(decoder: Decoder) -> None:
    answer = ask(decoder)
    assert isinstance(answer, Iterator) and iter(answer) is answer
    first = next(answer)
    assert first + "".join(answer) == TEXT
    assert (answer.tokens, answer.finish_reason) == EXPECTED
    assert list(answer) == [] and next(answer, "end") == "end"
    assert answer.tokens_per_step == (len(answer.tokens) - 1) / answer.steps


def test_its_tokens_are_a_copy(decoder: Decoder) -> None:
    answer = ask(decoder)
    next(answer)
    answer.tokens.append(3)
    answer.tokens.clear()
    assert TEXT.endswith("".join(answer)) and answer.tokens == EXPECTED[0]


def test_a_stream_keeps_other_threads_out_until_it_is_closed(decoder: Decoder) -> None:
    answer = ask(decoder)
    next(answer)
    refused = elsewhere(lambda: ask(decoder))
    assert isinstance(refused, BusyError) and "answer for thread 'MainThread'" in str(refused)
    answer.close()
    answer.close()
    assert "".join(elsewhere(lambda: list(ask(decoder)))) == TEXT
    with pytest.raises(MedusaError, match="was closed before it was read to its end; ask again"):
        next(answer)
    assert answer.finish_reason is None


@pytest.mark.parametrize("how", ["with", "dropped", "read", "error"])
def test_what_ends_a_stream_frees_the_engine(decoder: Decoder, how: str) -> None:
    if how == "with":
        with ask(decoder) as answer:
            next(answer)
    elif how == "dropped":
        next(ask(decoder))
        gc.collect()
    elif how == "read":
        answer = ask(decoder)
        list(answer)
    else:
        with pytest.raises(ZeroDivisionError), ask(decoder) as answer:
            next(answer)
            raise ZeroDivisionError
    assert "".join(elsewhere(lambda: list(ask(decoder)))) == TEXT


def test_the_next_prompt_of_the_same_thread_takes_the_engine_over(decoder: Decoder) -> None:
    first = ask(decoder)
    piece = next(first)
    assert "".join(ask(decoder)) == TEXT
    with pytest.raises(MedusaError, match="another prompt was started on this engine before this answer was read"):
        "".join(first)
    assert first.tokens == EXPECTED[0][: len(first.tokens)] and TEXT.startswith(piece)


def test_another_thread_may_read_on_and_then_owns_it(decoder: Decoder) -> None:
    answer = ask(decoder)
    pieces = [next(answer)]
    reading, done = threading.Event(), threading.Event()

    def read() -> None:
        pieces.append(next(answer))
        pieces.append(next(answer))
        reading.set()
        done.wait(30)

    thread = threading.Thread(target=read, name="reader")
    thread.start()
    assert reading.wait(30)
    with pytest.raises(BusyError, match="answer for thread 'reader'"):
        ask(decoder)
    done.set()
    thread.join()
    assert "".join(pieces) + "".join(answer) == TEXT


def test_reading_at_the_same_time_is_refused_and_the_first_reader_unharmed(decoder: Decoder) -> None:
    answer, found, run = ask(decoder), [], decoder.backend.run
    next(answer)

    def meanwhile(step: Any) -> None:
        found.append(elsewhere(lambda: next(answer)))
        answer_two = elsewhere(lambda: ask(decoder))
        found.append(answer_two)
        decoder.backend.run = run  # type: ignore[method-assign]
        run(step)

    decoder.backend.run = meanwhile  # type: ignore[method-assign]
    assert TEXT.endswith("".join(answer)) and answer.tokens == EXPECTED[0]
    assert [type(error) for error in found] == [BusyError, BusyError]


def test_closing_while_another_thread_reads_ends_its_reading_after_the_step(decoder: Decoder) -> None:
    answer, run = ask(decoder), decoder.backend.run

    def meanwhile(step: Any) -> None:
        answer.close()
        run(step)

    decoder.backend.run = meanwhile  # type: ignore[method-assign]
    failure = elsewhere(lambda: "".join(answer))
    assert isinstance(failure, MedusaError) and "was closed" in str(failure)
    decoder.backend.run = run  # type: ignore[method-assign]
    assert "".join(ask(decoder)) == TEXT


def test_memory_that_runs_out_costs_no_piece(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = ask(decoder)
    text = next(answer)
    with monkeypatch.context() as patched:
        patched.setattr(decoder.cache, "reserve", lambda _rows: (_ for _ in ()).throw(CapacityError("no memory")))
        with pytest.raises(CapacityError):
            next(answer)
    assert text + "".join(answer) == TEXT


def test_an_interrupt_anywhere_loses_no_piece_silently(decoder: Decoder) -> None:
    number, came_so_far, torn = 0, True, 0
    files = ("generation.py", "tokenizer.py", "exclusive.py", "decoder.py")
    while came_so_far:
        answer, pieces = ask(decoder), []
        pieces.append(next(answer))
        came_so_far = interrupted(partial(read_into, answer, pieces), number, files)
        try:
            pieces += list(answer)
        except MedusaError as error:
            torn += 1
            assert "reading this answer was interrupted" in str(error)
        else:
            assert "".join(pieces) == TEXT, number
        assert answer.tokens == EXPECTED[0][: len(answer.tokens)]
        answer.close()
        number += 1
    assert number > 60 and 0 < torn <= number


def read_into(answer: Generation, pieces: list[str]) -> None:
    pieces.append(next(answer))


def test_a_cancelled_task_goes_on_in_its_thread_and_harms_nothing(decoder: Decoder) -> None:
    started, go_on, run = threading.Event(), threading.Event(), decoder.backend.run

    def slow(step: Any) -> None:
        started.set()
        go_on.wait(30)
        run(step)

    def whole() -> str:
        with ask(decoder) as answer:
            texts.append("".join(answer))
        return texts[-1]

    async def serve() -> None:
        decoder.backend.run = slow  # type: ignore[method-assign]
        task = asyncio.create_task(asyncio.to_thread(whole))
        await asyncio.to_thread(started.wait, 30)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(task, 0.01)
        with pytest.raises(BusyError):
            await asyncio.to_thread(whole)
        decoder.backend.run = run  # type: ignore[method-assign]
        go_on.set()

    texts: list[str] = []
    asyncio.run(serve())  # which waits for its threads
    assert texts == [TEXT]
    assert "".join(ask(decoder)) == TEXT
