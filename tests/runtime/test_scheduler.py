"""One thread does all jobs, in order; a bounded queue; cancelling, deadlines, closing, forks."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from medusa_runtime.errors import (
    CapacityError,
    DeadlineError,
    EngineClosedError,
    ForkedProcessError,
    MedusaError,
    QueueFullError,
    RequestCancelledError,
)
from medusa_runtime.scheduler import THREAD_NAME, Call, Scheduler

SECONDS = 20  # that nothing here may take


class Work:
    """A job that records the thread that did it, and waits until it may go on."""

    def __init__(self, deadline: float | None = None, error: BaseException | None = None, waits: bool = False) -> None:
        self.deadline, self.is_cancelled = deadline, False
        self.thread: str | None = None
        self.error: BaseException | None = None
        self.began, self.may_go_on, self.ended = threading.Event(), threading.Event(), threading.Event()
        self._raises = error
        if not waits:
            self.may_go_on.set()

    def run(self, checkpoint: Callable[[], None]) -> None:
        self.thread = threading.current_thread().name
        self.began.set()
        try:
            if self._raises is not None:
                raise self._raises  # noqa: TRY301
            while not self.may_go_on.is_set():
                checkpoint()
                time.sleep(0.001)
        except Exception as error:
            self.fail(error)
        else:
            self.ended.set()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.ended.set()


@pytest.fixture
def scheduler() -> Any:
    made = Scheduler(3)
    yield made
    made.close(drain=False, timeout=SECONDS)


def running(scheduler: Scheduler, **arguments: Any) -> Work:
    """A job that is at work and waits."""
    work = Work(waits=True, **arguments)
    scheduler.submit(work)
    assert work.began.wait(SECONDS)
    return work


def test_jobs_are_done_in_order_by_one_thread(scheduler: Scheduler) -> None:
    done: list[int] = []
    first = running(scheduler)
    for number in range(3):
        scheduler.submit(Call(lambda _, number=number: done.append(number)))  # type: ignore[misc]
    assert (scheduler.running, scheduler.waiting) == (1, 3)
    assert done == []
    first.may_go_on.set()
    scheduler.close(timeout=SECONDS)
    assert done == [0, 1, 2]
    assert first.thread == THREAD_NAME
    assert (scheduler.running, scheduler.waiting) == (0, 0)


def test_no_thread_is_started_before_there_is_work() -> None:
    before = threading.active_count()
    scheduler = Scheduler(1)
    assert threading.active_count() == before
    scheduler.close()


def test_a_full_queue_refuses_and_keeps_what_it_has(scheduler: Scheduler) -> None:
    first = running(scheduler)
    waiting = [Work() for _ in range(3)]
    for work in waiting:
        scheduler.submit(work)
    with pytest.raises(QueueFullError, match="3 requests wait, expected at most 3"):
        scheduler.submit(Work())
    first.may_go_on.set()
    assert all(work.ended.wait(SECONDS) and work.error is None for work in waiting)
    scheduler.submit(last := Work())
    assert last.ended.wait(SECONDS)


@pytest.mark.parametrize("how", ["cancelled", "abandoned"])
def test_jobs_that_nobody_waits_for_make_room_in_a_full_queue(scheduler: Scheduler, how: str) -> None:
    first = running(scheduler)
    waiting = [Work() for _ in range(3)]
    for work in waiting:
        scheduler.submit(work)
    {"cancelled": scheduler.cancel, "abandoned": scheduler.abandon}[how](waiting[1])
    scheduler.submit(Work())
    assert waiting[1].ended.wait(SECONDS) and isinstance(waiting[1].error, RequestCancelledError)
    assert waiting[1].thread is None
    first.may_go_on.set()
    assert waiting[2].ended.wait(SECONDS) and waiting[2].error is None


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_at_its_next_checkpoint(scheduler: Scheduler) -> None:
    first = running(scheduler)
    scheduler.submit(second := Work())
    scheduler.cancel(second)
    assert second.ended.is_set() and isinstance(second.error, RequestCancelledError)
    scheduler.cancel(first)
    assert first.ended.wait(SECONDS) and isinstance(first.error, RequestCancelledError)
    scheduler.cancel(first)  # nothing is left to cancel


def test_deadlines_end_jobs_at_work_and_jobs_that_wait(scheduler: Scheduler) -> None:
    soon = time.monotonic() + 0.05
    first = running(scheduler)
    scheduler.submit(second := Work(deadline=soon))
    assert second.ended.wait(SECONDS) and isinstance(second.error, DeadlineError)
    assert second.thread is None and not first.ended.is_set()
    scheduler.submit(third := Work(deadline=time.monotonic() + 0.05, waits=True))
    first.may_go_on.set()
    assert third.ended.wait(SECONDS) and isinstance(third.error, DeadlineError)


def test_closing_drains(scheduler: Scheduler) -> None:
    first = running(scheduler)
    scheduler.submit(second := Work())
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    while True:
        try:
            scheduler.submit(Work())
        except (EngineClosedError, QueueFullError) as error:
            if isinstance(error, EngineClosedError):
                break
    first.may_go_on.set()
    closing.join(SECONDS)
    assert not closing.is_alive() and first.error is None and second.error is None
    scheduler.close()
    scheduler.close(drain=False)


def test_closing_without_draining_ends_what_waits_and_what_is_at_work(scheduler: Scheduler) -> None:
    first = running(scheduler)
    scheduler.submit(second := Work())
    scheduler.close(drain=False, timeout=SECONDS)
    for work in (first, second):
        assert work.ended.is_set() and isinstance(work.error, EngineClosedError)


def test_a_drain_that_takes_too_long_can_be_cut_short(scheduler: Scheduler) -> None:
    first = running(scheduler)
    scheduler.close(timeout=0.01)
    assert not first.ended.is_set()
    scheduler.close(drain=False, timeout=SECONDS)
    assert isinstance(first.error, EngineClosedError)


def test_a_job_that_breaks_the_thread_leaves_nobody_waiting(scheduler: Scheduler, caplog: Any) -> None:
    class Breaks(Work):
        def run(self, checkpoint: Callable[[], None]) -> None:
            self.began.set()
            assert self.may_go_on.wait(SECONDS)
            raise SystemExit  # which a thread ends with silently

    broken = Breaks(waits=True)
    scheduler.submit(broken)
    scheduler.submit(second := Work())
    broken.may_go_on.set()
    assert second.ended.wait(SECONDS) and isinstance(second.error, EngineClosedError)
    assert broken.ended.wait(SECONDS) and isinstance(broken.error, EngineClosedError)
    with pytest.raises(EngineClosedError):
        scheduler.submit(Work())
    assert "the thread of the engine ended" in caplog.text


def test_an_idle_thread_keeps_no_job_alive(scheduler: Scheduler) -> None:
    import weakref

    work = Work()
    scheduler.submit(work)
    assert work.ended.wait(SECONDS)
    seen = weakref.ref(work)
    del work
    for _ in range(100):
        gc.collect()
        if seen() is None:
            break
        time.sleep(0.01)
    assert seen() is None


def test_a_call_returns_errors_to_its_caller(scheduler: Scheduler) -> None:
    def fails(_: object) -> None:
        raise MedusaError("no")

    scheduler.submit(call := Call(fails))
    with pytest.raises(MedusaError, match="no"):
        call.wait()
    scheduler.submit(good := Call(lambda _: None))
    good.wait()
    scheduler.close()
    with pytest.raises(EngineClosedError):
        scheduler.submit(Call(lambda _: None))


def test_jobs_that_wait_for_a_long_call_end_at_their_deadline(scheduler: Scheduler) -> None:
    late = Work(deadline=time.monotonic() + 0.05)

    def long(checkpoint: Callable[[], None]) -> None:
        scheduler.submit(late)
        while not late.ended.is_set():
            checkpoint()

    scheduler.submit(call := Call(long))
    call.wait()
    assert isinstance(late.error, DeadlineError) and not late.began.is_set()


def in_child(work: Callable[[], None]) -> int:
    """Run a function in a forked child and return the child's exit code; 99 if it hangs."""
    child = os.fork()
    if child == 0:
        code = 98
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return 99


@contextlib.contextmanager
def held(*locks: Any) -> Iterator[None]:
    """Let another thread hold locks, which a child process then inherits without that thread."""
    taken, may_go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            taken.set()
            assert may_go_on.wait(SECONDS)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(SECONDS)
    yield
    may_go_on.set()
    thread.join(SECONDS)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("locked", [False, True])
def test_a_forked_child_is_refused_by_name_and_never_hangs(scheduler: Scheduler, locked: bool) -> None:
    work = running(scheduler)

    def use() -> None:
        for entry in (lambda: scheduler.submit(Work()), lambda: scheduler.cancel(work), scheduler.check_process):
            with pytest.raises(ForkedProcessError, match=f"{os.getppid()} and is used in its child {os.getpid()}"):
                entry()
        scheduler.abandon(work)
        scheduler.close()
        scheduler.close(drain=False)

    with held(scheduler._lock) if locked else contextlib.nullcontext():
        assert in_child(use) == 0
    assert not work.ended.is_set()


def test_a_thread_that_cannot_be_started_leaves_no_job_behind(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        with pytest.raises(CapacityError, match="the engine's thread cannot be started: can't start new thread"):
            scheduler.submit(Work())
    assert scheduler.waiting == 0
    scheduler.submit(work := Work())
    assert work.ended.wait(SECONDS) and work.error is None


@pytest.mark.parametrize("error", [MemoryError(), ValueError("a bug")])
def test_a_job_that_fails_in_a_way_it_does_not_expect_ends_alone(
    scheduler: Scheduler, error: Exception, caplog: Any
) -> None:
    class Broken(Work):
        def run(self, checkpoint: Callable[[], None]) -> None:
            raise error

    scheduler.submit(broken := Broken())
    scheduler.submit(good := Work())
    assert broken.ended.wait(SECONDS) and broken.error is error
    assert good.ended.wait(SECONDS) and good.error is None
    assert "work of the engine failed" in caplog.text


class Bare:
    """A job without locks of its own, which an interrupt could leave locked."""

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline, self.is_cancelled, self.has_ended = deadline, False, False

    def run(self, checkpoint: Callable[[], None]) -> None:
        self.has_ended = True

    def fail(self, error: BaseException) -> None:
        self.has_ended = True


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
def test_interrupts_leave_nothing_locked_and_lose_no_other_caller_s_job() -> None:
    """Ctrl-C at random moments of one caller's calls, while another caller asks for work of its own."""
    scheduler, stop = Scheduler(4), threading.Event()
    lost: list[Bare] = []
    answered = 0

    def other() -> None:
        nonlocal answered
        while not stop.is_set():
            try:
                scheduler.submit(work := Bare(time.monotonic() + answered % 2 * SECONDS))
            except QueueFullError:
                continue
            until = time.monotonic() + SECONDS
            while not work.has_ended:
                time.sleep(1e-4)
                if time.monotonic() > until:
                    lost.append(work)
                    return
            answered += 1

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    thread = threading.Thread(target=other, daemon=True)
    before = signal.signal(signal.SIGALRM, interrupt)
    rng, interrupts = random.Random(0), 0
    thread.start()
    try:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-5, 3e-4))
                while True:
                    work = Bare()
                    with contextlib.suppress(QueueFullError):
                        scheduler.submit(work)
                    scheduler.cancel(work)
            except KeyboardInterrupt:
                interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    stop.set()
    thread.join(2 * SECONDS)
    assert not thread.is_alive() and not lost
    assert interrupts > 100 and answered > 10
    scheduler.close(timeout=SECONDS)
    assert scheduler.running == scheduler.waiting == 0
