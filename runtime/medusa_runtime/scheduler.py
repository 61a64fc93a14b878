"""The scheduler: one thread that does all work on a backend, one job after the other, in order of arrival."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from weakref import WeakSet

from medusa_runtime.errors import (
    CapacityError,
    DeadlineError,
    EngineClosedError,
    ForkedProcessError,
    QueueFullError,
    RequestCancelledError,
)
from medusa_runtime.log import LOGGER
from medusa_runtime.request import Checkpoint, Job

THREAD_NAME = "medusa-scheduler"
# After so long an idle thread looks for work that it was not notified of, as the caller was interrupted.
IDLE_SECONDS = 1.0
EXIT_SECONDS = 10.0  # that the end of the program waits for the work in progress

_OPEN: WeakSet[Scheduler] = WeakSet()


class Scheduler:
    """A bounded queue of jobs, and the thread that does them.

    The thread starts with the first job. It is the only one that calls the backend, because libraries keep state for
    each thread. It is a daemon, so that a program that forgets to close its engine can end.

    Args:
        max_waiting: Maximum number of jobs that wait; the one at work does not count.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        # `with` uses the lock itself: an interrupt within a Condition's methods, Python code, could leave it locked.
        self._lock = threading.RLock()  # reentrant, for signal handlers
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._closed = self._aborting = False
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        _OPEN.add(self)

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
        now = time.monotonic()
        with self._lock:
            if self._closed:
                raise EngineClosedError("the engine is closed; expected requests before close: load it again")
            waiting = len(self._waiting)
            if waiting >= self._max_waiting:
                waiting = sum(_end_of(job, now) is None for job in self._waiting)
            if waiting >= self._max_waiting:
                raise QueueFullError(
                    f"{waiting} requests wait, expected at most {self._max_waiting} (max_waiting of Engine.load); try "
                    "again later"
                )
            self._start_thread()
            self._waiting.append(job)
            self._changed.notify_all()

    def _start_thread(self) -> None:
        """Start the thread unless it was started before; on failure the next job tries again."""
        if self._thread is not None:
            return
        thread = self._thread = threading.Thread(target=self._work, name=THREAD_NAME, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self._thread = None
            raise CapacityError(
                f"the engine's thread cannot be started: {error}; end other threads, or allow the process more of them"
            ) from None

    def cancel(self, job: Job) -> None:
        """Cancel a job: at once if it waits, otherwise at its next checkpoint."""
        self.check_process()
        job.is_cancelled = True
        with self._lock:
            is_waiting = job in self._waiting
        if is_waiting:  # the thread takes it out of the queue later
            job.fail(_cancelled())

    def abandon(self, job: Job) -> None:
        """Cancel a job without a lock, as a finaliser may run anywhere; a waiting job is dropped later."""
        job.is_cancelled = True

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Refuse new jobs and end the thread. It may be called more than once, from any thread.

        Args:
            drain: Do all jobs first; otherwise those that wait, and the one at work, fail at its next checkpoint with
                EngineClosedError.
            timeout: Seconds to wait for the thread at most; None waits as long as it takes.
        """
        if os.getpid() != self._process:
            return
        self._aborting = self._aborting or not drain
        self._closed = True
        with self._lock:
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))

    def abort_without_waiting(self) -> None:
        """Refuse new jobs and end those that there are, without a lock, as a finaliser may run anywhere."""
        self._aborting = self._closed = True

    def _work(self) -> None:
        try:
            while (job := self._next()) is not None:
                try:
                    job.run(self._checkpoint(job))
                except Exception as error:  # a bug, or no memory: it ends this job only
                    LOGGER.exception("work of the engine failed")
                    job.fail(error)
                self._current = None
                del job  # an idle thread keeps no request alive
        except BaseException:
            LOGGER.exception("the thread of the engine ended; the engine has to be loaded again")
        finally:
            self._closed = self._aborting = True
            if self._current is not None:
                self._current.fail(EngineClosedError("the engine's thread ended; load the engine again"))
            self._current = None
            self._drop_ended()

    def _next(self) -> Job | None:
        """Wait for a job and return it; None when the scheduler is closed and nothing waits."""
        while True:
            self._drop_ended()
            with self._lock:
                if self._waiting:
                    self._current = self._waiting.popleft()
                    return self._current
                if self._closed:
                    return None
                self._changed.wait(IDLE_SECONDS)

    def _checkpoint(self, job: Job) -> Checkpoint:
        def check() -> None:
            if error := self._reason_to_end(job, time.monotonic()):
                raise error
            if self._waiting:
                self._drop_ended()

        return check

    def _drop_ended(self) -> None:
        """Report to waiting jobs that they have ended, then take them out of the queue; only the thread calls it."""
        now = time.monotonic()
        with self._lock:
            waiting = list(self._waiting)
        ended = []
        for job in waiting:
            if error := self._reason_to_end(job, now):
                job.fail(error)
                ended.append(job)
        if ended:
            with self._lock:
                kept = [job for job in self._waiting if not any(job is one for one in ended)]
                self._waiting.clear()
                self._waiting.extend(kept)

    def _reason_to_end(self, job: Job, now: float) -> Exception | None:
        """Return the error that ends a job now, if there is one."""
        error = _end_of(job, now)
        if error is None and self._aborting:
            error = EngineClosedError("the engine was closed before the answer of this request was complete")
        return error


def _cancelled() -> RequestCancelledError:
    return RequestCancelledError("the request was cancelled before its answer was complete")


def _end_of(job: Job, now: float) -> Exception | None:
    """Return the error that its caller or its deadline ends a job with now, if there is one."""
    if job.is_cancelled:
        return _cancelled()
    if job.deadline is not None and now >= job.deadline:
        return DeadlineError(
            "the deadline of the request passed before its answer was complete; allow more time (timeout), ask for "
            "fewer tokens, or send fewer requests at once"
        )
    return None


@atexit.register
def _close_all() -> None:
    """End the threads before the libraries that they call are unloaded."""
    for scheduler in list(_OPEN):
        scheduler.close(drain=False, timeout=EXIT_SECONDS)


class Call:
    """A function call as a job, whose return is waited for.

    Args:
        function: Called with the checkpoint of the job, which it calls between parts of its work.
    """

    deadline: float | None = None
    is_cancelled = False

    def __init__(self, function: Callable[[Checkpoint], None]) -> None:
        self._function = function
        self._done = threading.Event()
        self._error: BaseException | None = None

    def run(self, checkpoint: Checkpoint) -> None:
        """Call the function and keep its error."""
        try:
            checkpoint()
            self._function(checkpoint)
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
