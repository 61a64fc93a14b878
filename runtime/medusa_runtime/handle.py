"""The handle of a request: read its answer while it is generated, wait for the result, or cancel it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import TracebackType

from medusa_runtime.parameter_checks import as_number
from medusa_runtime.request import Request
from medusa_runtime.results import Chunk, GenerationResult
from medusa_runtime.scheduler import Scheduler


class RequestHandle(Iterator[Chunk]):
    """A request that was submitted, which `Engine.submit` returns; any thread may use it.

    Iterating returns a `Chunk` for every step; it ends behind the last chunk, or raises the error that ended the
    request. A handle that nobody refers to any more cancels its request.

    Example::

        with engine.submit("Why is the sky blue?") as handle:
            for chunk in handle:
                print(chunk.text, end="", flush=True)
        print(handle.result().usage)
    """

    def __init__(self, request: Request, scheduler: Scheduler, engine: object) -> None:
        """Wrap a submitted request.

        Args:
            request: The request.
            scheduler: Works on it.
            engine: Is kept alive, because an engine that nobody refers to is closed.
        """
        self._request, self._scheduler, self._engine = request, scheduler, engine

    @property
    def is_done(self) -> bool:
        """Whether the request has ended; chunks may still be unread."""
        return self._request.mailbox.is_done

    @property
    def number(self) -> int:
        """Number of the request, unique in its engine, as the log names it."""
        return self._request.number

    def __next__(self) -> Chunk:
        """Wait for the next chunk and return it.

        Raises:
            StopIteration: The answer is complete.
            RequestCancelledError: The request was cancelled.
            DeadlineError: Its deadline passed.
            EngineClosedError: The engine was closed.
            MedusaError: Generating failed.
        """
        while True:
            is_complete = self.is_done  # before the last look, so that no chunk is missed
            if (chunk := self.take()) is not None:
                return chunk
            if is_complete:
                raise StopIteration
            self._request.mailbox.wait_for_chunk()

    def take(self) -> Chunk | None:
        """Return the next chunk without waiting, or None if there is none now; errors are those of iterating."""
        self._scheduler.check_process()
        return self._request.mailbox.take()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change, in the engine's thread: a chunk was added, or the request has ended.

        It is called once at the start. It must return at once, raise nothing, and not use the handle.
        """
        self._scheduler.check_process()
        self._request.mailbox.listen(listener)

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for the whole result and return it, whether chunks were read or not.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Raises:
            TimeoutError: The request is not done yet; it goes on, and `result` may be called again.
            MedusaError: As iterating does. `RequestError.result` has what was generated before.
        """
        self._scheduler.check_process()
        seconds = None if timeout is None else as_number("timeout", timeout, 0, math.inf)
        return self._request.mailbox.result(seconds)

    def __repr__(self) -> str:
        return f"<RequestHandle {self.number}, {'done' if self.is_done else 'in progress'}>"

    def cancel(self) -> None:
        """Cancel the request: at once if it waits, otherwise before its next step or part of the prompt.

        Reading it then raises RequestCancelledError. Nothing happens if it has ended.
        """
        self._scheduler.cancel(self._request)

    def __enter__(self) -> RequestHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        """Cancel the request, as nobody can read its answer any more."""
        if scheduler := getattr(self, "_scheduler", None):
            scheduler.abandon(self._request)
