"""Carries what the scheduler's thread generates for one request to whoever reads it, in any thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType

from medusa_runtime.log import LOGGER
from medusa_runtime.results import Chunk, GenerationResult


class Mailbox:
    """Chunks of one request, then its result or its error. The scheduler's thread writes, any thread reads."""

    def __init__(self) -> None:
        # `with` uses the lock itself: an interrupt within a Condition's methods, Python code, could leave it locked.
        self._lock = threading.RLock()  # reentrant, for signal handlers
        self._changed = threading.Condition(self._lock)
        self._chunks: deque[Chunk] = deque()
        self._result: GenerationResult | None = None
        self._error: BaseException | None = None
        self._traceback: TracebackType | None = None  # of the error where it occurred
        self._listener: Callable[[], None] | None = None

    @property
    def is_done(self) -> bool:
        """Whether the result or an error is there; chunks may still be unread."""
        return self._result is not None or self._error is not None

    def put(self, chunk: Chunk) -> None:
        """Add a chunk."""
        with self._lock:
            self._chunks.append(chunk)
            self._changed.notify_all()
        self._call_listener()

    def finish(self, result: GenerationResult, count: Callable[[], None]) -> None:
        """Set the result, unless there was an end before.

        Args:
            result: The result.
            count: Called once if this is the end, before a reader sees it; it must not wait for a reader.
        """
        self._end(result, None, count)

    def fail(self, error: BaseException, count: Callable[[], None]) -> None:
        """Set the error, unless there was an end before; `count` is as in `finish`."""
        self._end(None, error, count)

    def _end(self, result: GenerationResult | None, error: BaseException | None, count: Callable[[], None]) -> None:
        with self._lock:
            if self.is_done:
                return
            count()
            self._traceback = None if error is None else error.__traceback__
            self._result, self._error = result, error
            self._changed.notify_all()
        self._call_listener()

    def take(self) -> Chunk | None:
        """Return the next chunk, or None if there is none now. Raises the request's error behind the last chunk."""
        with self._lock:
            if self._chunks:
                return self._chunks.popleft()
            is_failed = self._error is not None
        if is_failed:  # nothing may follow, so no chunk has come since
            self._raise_error()
        return None

    def wait_for_chunk(self) -> None:
        """Wait until there is a chunk, the result or an error."""
        with self._lock:
            self._changed.wait_for(lambda: bool(self._chunks) or self.is_done)

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for the result and return it.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Raises:
            TimeoutError: The request is not done yet; it goes on.
            BaseException: The request's error.
        """
        seconds = None if timeout is None else min(timeout, threading.TIMEOUT_MAX)
        with self._lock:
            if not self._changed.wait_for(lambda: self.is_done, seconds):
                raise TimeoutError(f"the request was not done within {timeout} seconds; it goes on: ask again")
        self._raise_error()
        assert self._result is not None  # noqa: S101 -- is_done
        return self._result

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change from now on, in the thread that makes it, and once now.

        No lock is held meanwhile. What the listener raises is logged; only in the main thread an interrupt goes on.
        """
        self._listener = listener
        self._call_listener()

    def _raise_error(self) -> None:
        """Raise the request's error, if there is one; its traceback does not grow with each reader."""
        if self._error is not None:
            raise self._error.with_traceback(self._traceback)

    def _call_listener(self) -> None:
        listener = self._listener
        if listener is not None:
            try:
                listener()
            except Exception:
                LOGGER.exception("a listener of a request failed")
            except BaseException:
                LOGGER.exception("a listener of a request ended")
                if threading.current_thread() is threading.main_thread():
                    raise
