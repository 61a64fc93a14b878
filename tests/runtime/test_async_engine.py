"""The engine under asyncio: streams, results, and tasks whose cancelling cancels their request."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from medusa_runtime.async_engine import AsyncEngine
from medusa_runtime.errors import DeadlineError, EngineClosedError, MedusaError, QueueFullError, RequestCancelledError
from medusa_runtime.sampling_params import SamplingParams

from .fake_backend import EOS, plain_answer
from .test_engine_ends import Gate
from .toy_engine import text_of, toy_engine

PROMPT = [6, 6]
GREEDY = SamplingParams(max_tokens=20)
ENDLESS = SamplingParams(max_tokens=4000, ignore_eos=True)
EXPECTED = plain_answer(PROMPT, 20, (EOS,), 4096)[0]
SECONDS = 20


def run(work: Callable[[AsyncEngine], Coroutine[Any, Any, None]], engine: Any = None) -> None:
    async def main() -> None:
        async with AsyncEngine(toy_engine() if engine is None else engine) as wrapped:
            await asyncio.wait_for(work(wrapped), SECONDS)

    asyncio.run(main())


def test_a_request_cannot_be_awaited_in_another_event_loop() -> None:
    backend = Gate()
    engine = AsyncEngine(toy_engine(backend))

    async def begin() -> Any:
        return await engine.submit(PROMPT, GREEDY)

    handle = asyncio.run(begin())
    assert "AsyncRequestHandle 1, in progress" in repr(handle)
    for wait in (handle.result, handle.__anext__):
        with pytest.raises(MedusaError, match="belongs to the event loop in which it was submitted"):
            asyncio.run(asyncio.wait_for(wait(), SECONDS))
    backend.open.set()
    engine.engine.close(timeout=SECONDS)
    assert list(asyncio.run(handle.result()).token_ids) == EXPECTED  # it is there, so nothing is waited for
    assert "done" in repr(handle)


def test_a_stream_is_the_whole_answer() -> None:
    async def work(engine: AsyncEngine) -> None:
        chunks = [chunk async for chunk in engine.stream(PROMPT, GREEDY)]
        result = await engine.generate(PROMPT, GREEDY)
        assert [token for chunk in chunks for token in chunk.token_ids] == EXPECTED == list(result.token_ids)
        assert "".join(chunk.text for chunk in chunks) == text_of(EXPECTED) == result.text
        assert len(chunks) == result.steps + 1

    run(work)


def test_many_tasks_get_their_own_answers_and_the_loop_is_never_blocked() -> None:
    async def work(engine: AsyncEngine) -> None:
        turns = 0

        async def ticks() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(ticks())
        prompts = [[1 + number, 2] for number in range(20)]
        results = await asyncio.gather(*(engine.generate(prompt, GREEDY) for prompt in prompts))
        ticking.cancel()
        for prompt, result in zip(prompts, results, strict=True):
            assert list(result.token_ids) == plain_answer(prompt, 20, (EOS,), 4096)[0]
        assert turns > 20

    run(work)


@pytest.mark.parametrize("how", ["generate", "stream", "submit"])
def test_cancelling_the_task_cancels_the_request(how: str) -> None:
    async def work(engine: AsyncEngine) -> None:
        begun = asyncio.Event()

        async def ask() -> None:
            if how == "generate":
                begun.set()
                await engine.generate(PROMPT, ENDLESS)
            elif how == "stream":
                async for _chunk in engine.stream(PROMPT, ENDLESS):
                    begun.set()
            else:
                async for _chunk in await engine.submit(PROMPT, ENDLESS):
                    begun.set()

        task = asyncio.create_task(ask())
        await begun.wait()
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        gc.collect()
        result = await engine.generate(PROMPT, GREEDY)  # behind the other one, which is not answered to its end
        assert list(result.token_ids) == EXPECTED
        assert engine.stats().cancelled == 1 and engine.stats().finished == 1

    run(work)


def test_a_stream_that_is_left_early_is_cancelled() -> None:
    async def work(engine: AsyncEngine) -> None:
        async for _chunk in engine.stream(PROMPT, ENDLESS):
            break
        gc.collect()
        assert list((await engine.generate(PROMPT, GREEDY)).token_ids) == EXPECTED
        async with await engine.submit(PROMPT, ENDLESS) as handle:
            await anext(handle)
        assert list((await engine.generate(PROMPT, GREEDY)).token_ids) == EXPECTED
        assert engine.stats().cancelled == 2

    run(work)


def test_errors_arrive_where_the_request_is_awaited() -> None:
    backend = Gate()

    async def work(engine: AsyncEngine) -> None:
        first = await engine.submit(PROMPT, ENDLESS)
        while not backend.entered.is_set():
            await asyncio.sleep(0.001)
        late = await engine.submit(PROMPT, GREEDY, timeout=0.01)
        await engine.submit(PROMPT, GREEDY)
        await asyncio.sleep(0.02)
        backend.open.set()
        with pytest.raises(DeadlineError):
            await late.result()
        first.cancel()
        with pytest.raises(RequestCancelledError):
            async for _chunk in first:
                pass
        assert first.is_done
        with pytest.raises(RequestCancelledError):
            await first.result()
        await engine.close()
        with pytest.raises(EngineClosedError):
            await engine.generate(PROMPT)

    run(work, toy_engine(backend, max_waiting=2))


def test_a_full_queue_is_an_error_of_submit() -> None:
    backend = Gate()

    async def work(engine: AsyncEngine) -> None:
        handles = [await engine.submit(PROMPT, GREEDY)]
        while not backend.entered.is_set():
            await asyncio.sleep(0.001)
        handles.append(await engine.submit(PROMPT, GREEDY))
        with pytest.raises(QueueFullError):
            await engine.submit(PROMPT, GREEDY)
        backend.open.set()
        for handle in handles:
            assert list((await handle.result()).token_ids) == EXPECTED

    run(work, toy_engine(backend, max_waiting=1))


def test_a_loop_that_ended_stops_nothing_else() -> None:
    engine = toy_engine()

    async def leave() -> None:
        handles.append(await AsyncEngine(engine).submit(PROMPT, GREEDY))

    handles: list[Any] = []
    asyncio.run(leave())
    assert list(engine.generate(PROMPT, GREEDY).token_ids) == EXPECTED
    assert engine.stats().finished == 2
    engine.close()
    assert not engine._scheduler._thread.is_alive()


def test_a_real_bundle(tiny_bundle: Path) -> None:
    async def main() -> None:
        async with await AsyncEngine.load(tiny_bundle, threads=1, profile="tree-8") as engine:
            await engine.warm_up()
            texts = [chunk.text async for chunk in engine.stream("Hello there", GREEDY)]
            assert "".join(texts) == (await engine.generate("Hello there", GREEDY)).text

    asyncio.run(main())
