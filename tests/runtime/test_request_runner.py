"""What the engine counts: acceptance by depth up to an answer's end, time in the queue, and each end once."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from medusa_runtime.errors import DeadlineError, RequestCancelledError
from medusa_runtime.sampling_params import SamplingParams

from .fake_backend import EOS, FakeBackend, plain_answer
from .test_engine_ends import Gate
from .toy_engine import plain_tokens, text_of, toy_engine

PROMPT = [6, 6]
SECONDS = 20


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_candidates_behind_the_limit_are_neither_drafted_nor_accepted(max_tokens: int) -> None:
    """With heads that are always right, every candidate that an answer has room for is accepted."""
    with toy_engine(FakeBackend(hit_rate=1.0)) as engine:
        result = engine.generate(PROMPT, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        stats = engine.stats()
    assert result.accepted_by_depth == result.drafted_by_depth == stats.accepted_by_depth == stats.drafted_by_depth
    whole, rest = divmod(max_tokens - 1, 4)  # a step gives three candidates and one token more
    assert result.steps == whole + (rest > 0)
    assert sum(result.accepted_by_depth) == 3 * whole + rest == stats.accepted_tokens
    assert stats.step_tokens == max_tokens - 1 and stats.tokens_per_step == result.tokens_per_step


def test_candidates_behind_the_end_of_an_answer_are_neither_drafted_nor_accepted() -> None:
    expected = plain_answer(PROMPT, 60, (), 4096)[0]
    for end in range(2, 12):
        if expected[end] in expected[:end]:
            continue
        for params in (
            SamplingParams(max_tokens=60, ignore_eos=True, stop_token_ids=[expected[end]]),
            SamplingParams(max_tokens=60, ignore_eos=True, stop=[text_of(expected[end : end + 1])]),
        ):
            with toy_engine(FakeBackend(hit_rate=1.0)) as engine:
                result = engine.generate(PROMPT, params)
            assert list(result.token_ids) == expected[: end + 1] and result.finish_reason == "stop"
            assert result.accepted_by_depth == result.drafted_by_depth
            whole, rest = divmod(end, 4)
            assert sum(result.accepted_by_depth) == 3 * whole + rest


def test_the_time_of_requests_that_ended_in_the_queue_counts() -> None:
    backend = Gate()
    with toy_engine(backend) as engine:
        running = engine.submit(PROMPT, SamplingParams(max_tokens=2))
        assert backend.entered.wait(SECONDS)
        late = [engine.submit(PROMPT, SamplingParams(max_tokens=2), timeout=0.05) for _ in range(3)]
        threading.Event().wait(0.1)
        backend.open.set()
        running.result(SECONDS)
        waited = 0.0
        for handle in late:
            with pytest.raises(DeadlineError) as found:
                handle.result(SECONDS)
            waited += found.value.result.times.queue
        stats = engine.stats()
    assert waited >= 0.3 and stats.cancelled == 3
    assert stats.queue_seconds == pytest.approx(waited + running.result().times.queue, rel=0.05)


def test_a_request_that_two_threads_end_at_once_is_counted_once(monkeypatch: Any) -> None:
    """The second thread comes while the first one counts."""
    backend = Gate()
    with toy_engine(backend) as engine:
        running = engine.submit(PROMPT, SamplingParams(max_tokens=2))
        assert backend.entered.wait(SECONDS)
        handle = engine.submit(PROMPT, SamplingParams(max_tokens=2))
        add, other = engine._stats.add, threading.Thread(target=handle.cancel)

        def count(**amounts: float) -> None:
            if not other.is_alive() and amounts.get("cancelled"):
                other.start()
                other.join(0.1)  # it waits until the first end is set
            add(**amounts)

        monkeypatch.setattr(engine._stats, "add", count)
        handle.cancel()
        other.join(SECONDS)
        backend.open.set()
        running.result(SECONDS)
        with pytest.raises(RequestCancelledError):
            handle.result(SECONDS)
        assert engine.stats().cancelled == 1


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_several_answers_are_drawn_from_the_saved_summary_of_the_prompt(options: dict[str, Any]) -> None:
    """Steps in between overwrite the backend's own summary."""
    params = SamplingParams(temperature=1.2, max_tokens=12, n=3, seed=5, **options)
    with toy_engine(FakeBackend(hit_rate=0.8, spread=2, summaries=True)) as engine:
        result = engine.generate(PROMPT, params)
    for choice in result.choices:
        assert list(choice.token_ids) == plain_tokens(PROMPT, params, choice=choice.index)[0]
    assert EOS not in {choice.token_ids[0] for choice in result.choices}
