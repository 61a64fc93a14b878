"""Requests that end early or fail: cancelling, deadlines, a full queue, closing, errors of the backend."""

from __future__ import annotations

import gc
import os
import threading
import time
from typing import Any

import numpy as np
import pytest
from medusa_profiles import TreeProfile
from medusa_runtime import request_runner
from medusa_runtime.errors import (
    ArgumentError,
    DeadlineError,
    EngineClosedError,
    ForkedProcessError,
    InvalidLogitsError,
    QueueFullError,
    RequestCancelledError,
)
from medusa_runtime.sampling_params import SamplingParams

from .fake_backend import EOS, FakeBackend, plain_answer
from .test_scheduler import held, in_child
from .toy_engine import toy_engine

SECONDS = 20  # that nothing here may take
PROMPT = [6, 6]
GREEDY = SamplingParams(max_tokens=20)


class Gate(FakeBackend):
    """Its runs wait until the gate is open; `entered` is set when one waits."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(hit_rate=0.8, **arguments)
        self.open, self.entered = threading.Event(), threading.Event()
        self.threads: set[str] = set()

    def run(self, step: Any) -> None:
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        assert self.open.wait(SECONDS)
        super().run(step)


@pytest.fixture
def engine() -> Any:
    made = toy_engine()
    yield made
    made.close(drain=False, timeout=SECONDS)


@pytest.fixture
def gate() -> Any:
    backend = Gate()
    engine = toy_engine(backend, max_waiting=2)
    yield backend, engine
    backend.open.set()
    engine.close(drain=False, timeout=SECONDS)


def test_a_request_is_cancelled_while_it_waits_and_while_it_works(gate: Any) -> None:
    backend, engine = gate
    working, waiting = engine.submit(PROMPT, GREEDY), engine.submit(PROMPT, GREEDY)
    assert backend.entered.wait(SECONDS)
    waiting.cancel()
    with pytest.raises(RequestCancelledError) as found:
        waiting.result(SECONDS)
    assert found.value.result.text == "" and found.value.result.finish_reason is None
    assert found.value.result.prompt_token_ids == tuple(PROMPT)
    assert not working.is_done
    working.cancel()
    backend.open.set()
    with pytest.raises(RequestCancelledError):
        list(working)
    assert engine.generate(PROMPT, GREEDY).token_ids == tuple(plain_answer(PROMPT, 20, (EOS,), 4096)[0])
    stats = engine.stats()
    assert (stats.finished, stats.cancelled, stats.failed) == (1, 2, 0)


def test_what_was_generated_before_a_cancellation_is_not_lost() -> None:
    with toy_engine() as engine:
        handle = engine.submit(PROMPT, SamplingParams(max_tokens=4000, ignore_eos=True, temperature=1, seed=2))
        chunks = [next(handle) for _ in range(3)]
        handle.cancel()
        with pytest.raises(RequestCancelledError) as found:
            for chunk in handle:
                chunks.append(chunk)
        result = found.value.result
        assert result.token_ids == tuple(token for chunk in chunks for token in chunk.token_ids)
        assert result.text.startswith("".join(chunk.text for chunk in chunks))
        assert result.finish_reason is None and result.seed == 2
        with pytest.raises(RequestCancelledError):
            handle.result()
        with pytest.raises(RequestCancelledError):
            next(handle)


@pytest.mark.parametrize("how", ["dropped", "left with a block", "an error in a block"])
def test_a_handle_that_is_given_up_cancels_its_request(how: str) -> None:
    with toy_engine() as engine:
        endless = SamplingParams(max_tokens=4000, ignore_eos=True)
        if how == "dropped":
            next(engine.submit(PROMPT, endless))
        elif how == "left with a block":
            with engine.submit(PROMPT, endless) as handle:
                next(handle)
        else:
            with pytest.raises(KeyError), engine.submit(PROMPT, endless):
                raise KeyError
        assert engine.generate(PROMPT, GREEDY).finish_reason is not None
        assert engine.stats().cancelled == 1


def test_deadlines_end_requests_that_wait_and_that_work(gate: Any) -> None:
    backend, engine = gate
    working = engine.submit(PROMPT, SamplingParams(max_tokens=4000, ignore_eos=True), timeout=0.05)
    waiting = engine.submit(PROMPT, GREEDY, timeout=0.05)
    assert backend.entered.wait(SECONDS)
    time.sleep(0.06)
    backend.open.set()
    for handle in (working, waiting):
        with pytest.raises(DeadlineError, match="deadline") as found:
            handle.result(SECONDS)
        assert found.value.result is not None and len(found.value.result.text) <= 1
    assert engine.generate(PROMPT, GREEDY, timeout=SECONDS).finish_reason is not None


def test_a_full_queue_refuses_and_a_result_may_be_waited_for_in_parts(gate: Any) -> None:
    backend, engine = gate
    first = engine.submit(PROMPT, GREEDY)
    assert backend.entered.wait(SECONDS)
    waiting = [engine.submit(PROMPT, GREEDY) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait"):
        engine.submit(PROMPT, GREEDY)
    with pytest.raises(TimeoutError, match="it goes on"):
        first.result(0.01)
    stats = engine.stats()
    assert (stats.waiting, stats.running) == (2, 1)
    backend.open.set()
    assert len({handle.result(SECONDS).token_ids for handle in (first, *waiting)}) == 1


def test_all_work_is_done_in_one_thread(gate: Any) -> None:
    backend, engine = gate
    backend.open.set()
    engine.generate(PROMPT, GREEDY)
    threads = [threading.Thread(target=engine.generate, args=(PROMPT, GREEDY)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert backend.threads == {"medusa-scheduler"}


def test_closing_answers_what_was_submitted_and_refuses_the_rest(gate: Any) -> None:
    backend, engine = gate
    handles = [engine.submit(PROMPT, GREEDY) for _ in range(2)]
    backend.open.set()
    engine.close(timeout=SECONDS)
    assert all(handle.is_done for handle in handles)
    assert len({handle.result().token_ids for handle in handles}) == 1
    with pytest.raises(EngineClosedError, match="the engine is closed"):
        engine.submit(PROMPT, GREEDY)
    with pytest.raises(EngineClosedError):
        engine.warm_up()


def test_an_error_in_a_with_block_ends_everything_at_once() -> None:
    with pytest.raises(KeyError), toy_engine() as engine:
        handle = engine.submit(PROMPT, SamplingParams(max_tokens=4000, ignore_eos=True))
        next(handle)
        raise KeyError
    with pytest.raises(EngineClosedError) as found:
        handle.result(SECONDS)
    assert "was closed before the answer" in str(found.value)
    assert found.value.result is not None and found.value.result.token_ids
    assert (engine.stats().cancelled, engine.stats().failed) == (1, 0)


def test_an_engine_that_nobody_refers_to_ends_its_thread_but_not_before_its_handles() -> None:
    handle = toy_engine().submit(PROMPT, GREEDY)
    assert handle.result(SECONDS).finish_reason is not None
    thread = handle._scheduler._thread
    del handle
    gc.collect()
    thread.join(SECONDS)
    assert not thread.is_alive()


class Breaks(FakeBackend):
    """Fails at the call of its choice."""

    def __init__(self, at: int, error: Exception | None, **arguments: Any) -> None:
        super().__init__(hit_rate=0.8, **arguments)
        self.at, self.error, self.calls = at, error, 0

    def run(self, step: Any) -> None:
        self.calls += 1
        if self.calls == self.at and self.error is not None:
            raise self.error
        super().run(step)
        if self.calls == self.at:
            self._ran[2][...] = np.nan


@pytest.mark.parametrize("error", [MemoryError("no memory"), OSError("the device fell off"), None])
@pytest.mark.parametrize("at", range(1, 8))
def test_after_any_failure_the_next_request_is_exact(at: int, error: Exception | None) -> None:
    with toy_engine(Breaks(at, error)) as engine:
        expected = tuple(plain_answer(PROMPT, 20, (), 4096)[0])
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        handle = engine.submit(PROMPT, params)
        with pytest.raises(type(error) if error else InvalidLogitsError) as found:
            handle.result(SECONDS)
        assert (found.value is error) or error is None
        assert engine.generate(PROMPT, params).token_ids == expected
        assert (engine.stats().failed, engine.stats().finished) == (1, 1)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_row_that_is_not_finite_is_found_on_a_device_too(temperature: float) -> None:
    with toy_engine(Breaks(2, None, summaries=True)) as engine:
        params = SamplingParams(max_tokens=20, temperature=temperature, logprobs=1, seed=1)
        with pytest.raises(InvalidLogitsError, match="at row 0 of step 1"):
            engine.generate(PROMPT, params)


def test_errors_and_logs_name_no_prompt(caplog: Any) -> None:
    caplog.set_level("DEBUG")
    with toy_engine(Breaks(2, OSError("the device fell off"))) as engine:
        for _ in range(2):
            try:
                engine.generate([1, 2, 3], SamplingParams(max_tokens=9))
            except OSError:
                continue
    assert "request 1 ended with OSError" in caplog.text and "request 2: 3 tokens of prompt" in caplog.text
    assert "[1, 2, 3]" not in caplog.text
    assert {record.name for record in caplog.records} == {"medusa_runtime"}


def test_warming_up_runs_in_the_engines_thread(gate: Any) -> None:
    backend, engine = gate
    backend.open.set()
    engine._decoder.set_profile(TreeProfile.plain())  # the toy refuses to draft from nothing
    engine.warm_up()
    assert backend.threads == {"medusa-scheduler"}
    assert engine.generate(PROMPT, GREEDY).token_ids == tuple(plain_answer(PROMPT, 20, (EOS,), 4096)[0])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_gets_an_error_that_names_the_processes(gate: Any) -> None:
    backend, engine = gate
    handle = engine.submit(PROMPT, GREEDY)
    assert backend.entered.wait(SECONDS)

    def use() -> None:
        message = f"loaded in process {os.getppid()} and is used in its child {os.getpid()}"
        for entry in (
            lambda: engine.generate(PROMPT, GREEDY),
            lambda: next(handle),
            handle.result,
            handle.cancel,
            engine.warm_up,
        ):
            with pytest.raises(ForkedProcessError, match=message):
                entry()
        with pytest.raises(ForkedProcessError, match=message):
            engine.stats()
        engine.close()

    with held(handle._request.mailbox._lock, engine._stats._lock, engine._scheduler._lock):
        assert in_child(use) == 0
    backend.open.set()
    assert list(handle.result(SECONDS).token_ids) == plain_answer(PROMPT, 20, (EOS,), 4096)[0]


def test_a_thousand_cancels_at_random_steps_harm_nobody() -> None:
    rng = np.random.default_rng(0)
    expected = plain_answer(PROMPT, 20, (EOS,), 4096)[0]
    with toy_engine() as engine:
        for number in range(1000):
            handle = engine.submit(PROMPT, SamplingParams(max_tokens=4000, ignore_eos=True))
            for _ in range(int(rng.integers(0, 4))):
                next(handle)
            if number % 3 == 0:
                handle.cancel()
                with pytest.raises(RequestCancelledError):
                    handle.result(SECONDS)
            del handle
            if number % 50 == 0:
                assert list(engine.generate(PROMPT, GREEDY).token_ids) == expected
        assert engine.stats().cancelled == 1000
        gc.collect()


@pytest.mark.parametrize("broken", ["_Run", "Times", "GenerationResult", "Chunk"])
def test_no_memory_for_any_part_of_a_request_ends_that_request_alone(
    engine: Any, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_arguments: Any, **_named: Any) -> None:
        raise MemoryError(broken)

    with monkeypatch.context() as patch:
        patch.setattr(request_runner, broken, fails)
        with pytest.raises(MemoryError, match=broken):
            engine.generate(PROMPT, GREEDY)
    assert engine.generate(PROMPT, GREEDY).token_ids == tuple(plain_answer(PROMPT, 20, (EOS,), 4096)[0])
    assert (engine.stats().failed, engine.stats().finished) == (1, 1)


def test_a_listener_that_fails_or_uses_the_engine_harms_nobody(engine: Any, caplog: Any) -> None:
    handles = [engine.submit(PROMPT, GREEDY) for _ in range(3)]

    def fails() -> None:
        handles[1].cancel()
        engine.stats()
        raise ValueError("a listener's own")

    handles[0].listen(fails)
    assert handles[0].result(SECONDS).token_ids == tuple(plain_answer(PROMPT, 20, (EOS,), 4096)[0])
    assert handles[2].result(SECONDS).token_ids == handles[0].result().token_ids
    assert "a listener of a request failed" in caplog.text


def test_dropping_an_engine_does_not_wait_for_its_step(gate: Any) -> None:
    backend = Gate()
    engine = toy_engine(backend)
    handle = engine.submit(PROMPT, GREEDY)
    assert backend.entered.wait(SECONDS)
    started = time.monotonic()
    del engine, handle
    gc.collect()
    assert time.monotonic() - started < 5
    backend.open.set()


@pytest.mark.parametrize(
    "wrong", [{"timeout": -1}, {"timeout": "1"}, {"timeout": float("nan")}, {"drain": "no"}], ids=str
)
def test_closing_with_wrong_arguments_closes_nothing(engine: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        engine.close(**wrong)
    assert engine.generate(PROMPT, GREEDY, timeout=1e300).finish_reason is not None
    assert engine.submit(PROMPT, GREEDY).result(1e300).finish_reason is not None
