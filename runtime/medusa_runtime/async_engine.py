"""The engine for asyncio: awaits results and iterates over answers without blocking the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from types import TracebackType
from typing import Any

from medusa_runtime.engine import Engine
from medusa_runtime.errors import MedusaError
from medusa_runtime.handle import RequestHandle
from medusa_runtime.prompt_encoder import Prompt
from medusa_runtime.results import Chunk, GenerationResult
from medusa_runtime.sampling_params import SamplingParams
from medusa_runtime.stats import Stats


class AsyncEngine:
    """An `Engine` whose methods are coroutines. Cancelling a task cancels the request that it waits for.

    Example::

        async with await AsyncEngine.load("bundle") as engine:
            async for chunk in engine.stream("Why is the sky blue?", SamplingParams(temperature=0.7)):
                print(chunk.text, end="", flush=True)

    Attributes:
        engine: The engine, which may be used directly too.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    async def load(cls, bundle: Any, **arguments: Any) -> AsyncEngine:
        """Load a bundle in another thread; arguments and errors are those of `Engine.load`."""
        return cls(await asyncio.to_thread(partial(Engine.load, bundle, **arguments)))

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        **options: Any,
    ) -> GenerationResult:
        """Answer a prompt and return the whole result; arguments and errors are those of `Engine.submit`."""
        handle = await self.submit(prompt, params, timeout=timeout, **options)
        return await handle.result()

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        **options: Any,
    ) -> AsyncIterator[Chunk]:
        """Answer a prompt and yield a chunk for every step; arguments and errors are those of `Engine.submit`.

        The request is cancelled when the iteration ends early.
        """
        async with await self.submit(prompt, params, timeout=timeout, **options) as handle:
            async for chunk in handle:
                yield chunk

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        **options: Any,
    ) -> AsyncRequestHandle:
        """Queue a request; arguments and errors are those of `Engine.submit`, which runs in another thread."""
        submit = partial(self.engine.submit, prompt, params, timeout=timeout, **options)
        return AsyncRequestHandle(await asyncio.to_thread(submit))

    async def warm_up(self) -> None:
        """Prepare for prompts and answers of every length (`Engine.warm_up`)."""
        await asyncio.to_thread(self.engine.warm_up)

    def stats(self) -> Stats:
        """Return the counters since the engine was loaded."""
        return self.engine.stats()

    async def close(self, *, drain: bool = True) -> None:
        """Refuse new requests, and answer those that were submitted or end them (`Engine.close`)."""
        await asyncio.to_thread(partial(self.engine.close, drain=drain))

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close(drain=error is None)


class AsyncRequestHandle:
    """A request that was submitted: iterate over its chunks with `async for`, or await `result()`.

    It belongs to the event loop in which it was created; to wait for it in another one raises MedusaError. If the task
    that waits for it is cancelled, so is the request.
    """

    def __init__(self, handle: RequestHandle) -> None:
        """Wrap a handle in the running event loop."""
        self._handle, self._loop, self._changed = handle, asyncio.get_running_loop(), asyncio.Event()
        loop, event = self._loop, self._changed

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
                loop.call_soon_threadsafe(event.set)

        handle.listen(notify)

    @property
    def is_done(self) -> bool:
        """Whether the request has ended; chunks may still be unread."""
        return self._handle.is_done

    def cancel(self) -> None:
        """Cancel the request (`RequestHandle.cancel`)."""
        self._handle.cancel()

    def __repr__(self) -> str:
        return f"<AsyncRequestHandle {self._handle.number}, {'done' if self.is_done else 'in progress'}>"

    def __aiter__(self) -> AsyncRequestHandle:
        return self

    async def __anext__(self) -> Chunk:
        """Wait for the next chunk and return it; errors are those of `RequestHandle`."""
        while True:
            self._changed.clear()  # before the look, so that no change is missed
            is_complete = self.is_done
            if (chunk := self._handle.take()) is not None:
                return chunk
            if is_complete:
                raise StopAsyncIteration
            await self._wait()

    async def result(self) -> GenerationResult:
        """Wait for the whole result and return it; errors are those of `RequestHandle`."""
        while True:
            self._changed.clear()
            if self.is_done:
                return self._handle.result()
            await self._wait()

    async def _wait(self) -> None:
        if asyncio.get_running_loop() is not self._loop:  # which would never be notified
            raise MedusaError(
                "the request belongs to the event loop in which it was submitted and is awaited in another one; submit "
                "and await it in the same loop, or use an Engine in threads"
            )
        try:
            await self._changed.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def __aenter__(self) -> AsyncRequestHandle:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()
