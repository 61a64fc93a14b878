"""Exclusive use of an object: a call during another thread's call fails at once with BusyError instead of waiting."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

from medusa_runtime.errors import BusyError

P = ParamSpec("P")
R = TypeVar("R")


class _Call(NamedTuple):
    """The call that is using the object: the frame of the function that entered, and its thread's name."""

    frame: FrameType
    thread: str


class ExclusiveUse:
    """A lock that never waits, held by one function call at a time.

    The call that invokes `enter` holds it until it invokes `leave`. If that call is interrupted on its way out, before
    `leave`, the lock is released with the call's frame, so an interrupt at any place leaves nothing locked.
    """

    def __init__(self, what: str) -> None:
        """Create an unused lock; `what` names the guarded object in error messages."""
        self._what = what
        self._calls: dict[None, _Call] = {}  # the call that holds the lock, if any; `setdefault` is atomic
        self._ending = threading.Lock()  # held while releasing for a call that ended without `leave`

    def enter(self, *, within: bool = False) -> None:
        """Acquire the lock for the calling function.

        Args:
            within: Whether the calling function may also run inside the call that holds the lock, in the same thread.

        Raises:
            BusyError: Another call holds the lock.
        """
        mine = _Call(sys._getframe(1), threading.current_thread().name)
        for _ in range(2):
            found = self._calls.setdefault(None, mine)
            if found is mine or (within and _runs_inside(mine.frame, found.frame)):
                return
            if _is_running(found.frame) or not self._release(found):
                break
        thread = found.thread
        del found, mine  # so that the error's traceback does not keep the frames alive
        raise BusyError(
            f"{self._what} is at work in thread {thread!r}, expected one call at a time; wait until it has returned, "
            "or load a second engine"
        )

    def leave(self) -> None:
        """Release the lock if the calling function holds it."""
        call = self._calls.get(None)
        if call is not None and call.frame is sys._getframe(1):
            self._calls.clear()

    def _release(self, call: _Call) -> bool:
        """Release the lock of a call that returned without `leave`; return False if another thread is doing so."""
        if not self._ending.acquire(blocking=False):
            return False
        try:
            if self._calls.get(None) is call:
                self._calls.clear()
        finally:
            self._ending.release()
        return True


class _Guarded(Protocol):
    @property
    def exclusive_use(self) -> ExclusiveUse: ...


G = TypeVar("G", bound=_Guarded)


def exclusive(method: Callable[Concatenate[G, P], R]) -> Callable[Concatenate[G, P], R]:
    """Run a method under its object's `exclusive_use`; nested calls in the same thread are allowed.

    The method raises BusyError while another thread's call holds the lock.
    """

    @wraps(method)
    def guarded(self: G, /, *arguments: P.args, **named: P.kwargs) -> R:
        try:
            self.exclusive_use.enter(within=True)
            return method(self, *arguments, **named)
        finally:
            self.exclusive_use.leave()

    return guarded


def strictly_exclusive(method: Callable[Concatenate[G, P], R]) -> Callable[Concatenate[G, P], R]:
    """Like `exclusive`, but nested calls raise BusyError too, for example from a signal handler."""

    @wraps(method)
    def guarded(self: G, /, *arguments: P.args, **named: P.kwargs) -> R:
        try:
            self.exclusive_use.enter()
            return method(self, *arguments, **named)
        finally:
            self.exclusive_use.leave()

    return guarded


def _runs_inside(frame: FrameType, outer: FrameType) -> bool:
    """Whether `outer` is among the callers of `frame`, which belongs to this thread."""
    caller = frame.f_back
    while caller is not None:
        if caller is outer:
            return True
        caller = caller.f_back
    return False


def _is_running(frame: FrameType) -> bool:
    """Whether the function of a frame has not returned yet, in any thread."""
    try:
        frame.clear()  # Python refuses this while the function runs
    except RuntimeError:
        return True
    return False
