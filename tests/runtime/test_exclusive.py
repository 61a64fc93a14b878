"""Exclusive use: which calls are refused, and that no interrupt leaves the lock held."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from medusa_runtime.errors import BusyError
from medusa_runtime.exclusive import ExclusiveUse, exclusive, strictly_exclusive

from .interrupting import elsewhere, interrupted, run_together


class Worker:
    def __init__(self) -> None:
        self.exclusive_use = ExclusiveUse("the worker")

    @exclusive
    def inner(self) -> str:
        return "done"

    @exclusive
    def outer(self, work: Callable[[], Any]) -> Any:
        return work(), self.inner()

    @strictly_exclusive
    def whole(self, work: Callable[[], Any]) -> Any:
        return work()


def test_a_call_inside_of_a_call_shares_its_lock_and_another_threads_is_refused() -> None:
    worker = Worker()
    inside, other = worker.outer(lambda: (worker.inner(), elsewhere(worker.inner)))[0]
    assert inside == "done"
    assert isinstance(other, BusyError)
    assert str(other).startswith(
        "the worker is at work in thread 'MainThread', expected one call at a time; wait until"
    )
    assert elsewhere(worker.inner) == "done"


def test_a_whole_call_is_refused_inside_of_another() -> None:
    worker = Worker()
    with pytest.raises(BusyError, match="is at work in thread 'MainThread'"):
        worker.outer(lambda: worker.whole(lambda: None))
    assert worker.whole(worker.inner) == "done"


def test_a_refused_call_does_not_release_the_lock_of_the_first() -> None:
    worker = Worker()

    def work() -> list[Any]:
        return [elsewhere(worker.inner), elsewhere(worker.inner)]

    assert all(isinstance(error, BusyError) for error in worker.outer(work)[0])


def test_an_error_ends_the_turn() -> None:
    worker = Worker()
    with pytest.raises(ZeroDivisionError):
        worker.outer(lambda: 1 / 0)
    assert elsewhere(worker.inner) == "done"


@pytest.mark.parametrize("event", ["line", "opcode"])
def test_wherever_an_interrupt_comes_the_turn_ends(event: str) -> None:
    number = 0
    worker = Worker()
    while interrupted(lambda: worker.outer(lambda: None), number, ("exclusive.py",), event):
        assert elsewhere(worker.inner) == "done", number
        assert worker.whole(worker.inner) == "done"
        number += 1
    assert number > 20


def test_of_many_threads_one_works_at_a_time() -> None:
    worker, at_work, most, refused, done = Worker(), [0], [0], [0], [0]
    barrier = threading.Barrier(8)

    def work() -> None:
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        time.sleep(1e-4)  # lets other threads run, so that some call meets this one
        at_work[0] -= 1

    def run(_number: int) -> None:
        barrier.wait()
        for _ in range(400):
            try:
                worker.outer(work)
                done[0] += 1
            except BusyError:
                refused[0] += 1

    run_together(run, range(8), 1e-6)
    assert most == [1]
    assert done[0] and refused[0]
