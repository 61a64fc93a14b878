"""The scheduler: one thread that does all work on a backend, one job after the other, in order of arrival."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable

from medusa_runtime.errors import (
    DeadlineError,
    EngineClosedError,
    ForkedProcessError,
    QueueFullError,
    RequestCancelledError,
)
from medusa_runtime.log import LOGGER
from medusa_runtime.request import Checkpoint, Job

THREAD_NAME = "medusa-scheduler"


class Scheduler:
    """A bounded queue of jobs, and the thread that does them.

    The thread starts with the first job. It is the only one that calls the backend, because libraries keep state for
    each thread. It is a daemon, so that a program that forgets to close its engine can end.

    Args:
        max_waiting: Maximum number of jobs that wait; the one at work does not count.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._closed = self._aborting = False
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    @property
    def waiting(self) -> int:
        """Number of jobs that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of jobs at work: 0 or 1."""
        return int(self._current is not None)

    def check_process(self) -> None:
        """Raise ForkedProcessError in a child process, where the thread does not exist and locks may be held."""
        if os.getpid() != self._process:
            raise ForkedProcessError(
                f"this engine was loaded in process {self._process} and is used in its child {os.getpid()}, expected "
                "the process that loaded it; load an engine in each process (start workers with 'spawn', or load after "
                "the fork)"
            )

    def submit(self, job: Job) -> None:
        """Add a job to the queue.

        Raises:
            QueueFullError: `max_waiting` jobs wait.
            EngineClosedError: The scheduler was closed.
            ForkedProcessError: This is a child process.
        """
        self.check_process()
        with self._changed:
            if self._closed:
                raise EngineClosedError("the engine is closed; expected requests before close: load it again")
            if len(self._waiting) >= self._max_waiting:
                self._drop_ended(time.monotonic())
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait, expected at most {self._max_waiting} (max_waiting of "
                    "Engine.load); try again later"
                )
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=THREAD_NAME, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Cancel a job: at once if it waits, otherwise at its next checkpoint."""
        self.check_process()
        job.is_cancelled = True
        with self._changed:
            self._drop_ended(time.monotonic())

    def abandon(self, job: Job) -> None:
        """Cancel a job without a lock, as a finaliser may run anywhere; a waiting job is dropped later."""
        job.is_cancelled = True

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Refuse new jobs and end the thread. It may be called more than once, from any thread.

        Args:
            drain: Do all jobs first; otherwise those that wait fail at once, and the one at work at its next
                checkpoint, with EngineClosedError.
            timeout: Seconds to wait for the thread at most; None waits as long as it takes.
        """
        if os.getpid() != self._process:
            return
        with self._changed:
            self._closed = True
            if not drain:
                self._aborting = True
                self._fail_waiting("the engine was closed before it began to work on this request")
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _work(self) -> None:
        try:
            while (job := self._next()) is not None:
                job.run(self._checkpoint(job))
                with self._changed:
                    self._current = None
                del job  # an idle thread keeps no request alive
        except BaseException:
            LOGGER.exception("the thread of the engine ended; the engine has to be loaded again")
        finally:
            with self._changed:
                self._closed = True
                if self._current is not None:
                    self._current.fail(EngineClosedError("the engine's thread ended; load the engine again"))
                self._current = None
                self._fail_waiting("the engine's thread has ended; load the engine again")

    def _next(self) -> Job | None:
        """Wait for a job and return it; None when the scheduler is closed and nothing waits."""
        with self._changed:
            while True:
                self._drop_ended(time.monotonic())
                if self._waiting:
                    self._current = self._waiting.popleft()
                    return self._current
                if self._closed:
                    return None
                self._changed.wait()

    def _checkpoint(self, job: Job) -> Checkpoint:
        def check() -> None:
            now = time.monotonic()
            if error := _end_of(job, now):
                raise error
            if self._aborting:
                raise EngineClosedError("the engine was closed while it worked on this request")
            if self._waiting:
                with self._changed:
                    self._drop_ended(now)

        return check

    def _drop_ended(self, now: float) -> None:
        """Take jobs that were cancelled, or whose deadline has passed, out of the queue and report it to them."""
        for job in [job for job in self._waiting if job.is_cancelled or _is_late(job, now)]:
            self._waiting.remove(job)
            if error := _end_of(job, now):
                job.fail(error)

    def _fail_waiting(self, reason: str) -> None:
        while self._waiting:
            self._waiting.popleft().fail(EngineClosedError(reason))


def _is_late(job: Job, now: float) -> bool:
    return job.deadline is not None and now >= job.deadline


def _end_of(job: Job, now: float) -> Exception | None:
    """Return the error that ends a job now, if there is one."""
    if job.is_cancelled:
        return RequestCancelledError("the request was cancelled before its answer was complete")
    if _is_late(job, now):
        return DeadlineError(
            "the deadline of the request passed before its answer was complete; allow more time (timeout), ask for "
            "fewer tokens, or send fewer requests at once"
        )
    return None


class Call:
    """A function call as a job, whose return is waited for."""

    deadline: float | None = None
    is_cancelled = False

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._done = threading.Event()
        self._error: BaseException | None = None

    def run(self, checkpoint: Checkpoint) -> None:
        """Call the function and keep its error."""
        try:
            checkpoint()
            self._function()
        except Exception as error:
            self._error = error
        finally:
            self._done.set()

    def fail(self, error: BaseException) -> None:
        """Report the error that kept the function from being called."""
        self._error = error
        self._done.set()

    def wait(self) -> None:
        """Wait for the end; raise the function's error."""
        self._done.wait()
        if self._error is not None:
            raise self._error
