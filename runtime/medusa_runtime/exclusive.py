"""One call at a time: a call that comes while another one is at work is refused at once, it does not wait."""

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
    """A call that has the turn: the frame of the function that entered, and the name of its thread."""

    frame: FrameType
    thread: str


class ExclusiveUse:
    """Lets one call at a time use what it guards.

    The turn belongs to the function that calls `enter`, and ends with `leave`. If that function was interrupted on its
    way out, before `leave`, the turn ends with its frame: no interrupt, wherever it comes, leaves the turn taken.
    """

    def __init__(self, what: str) -> None:
        """what: the name of what is guarded, for the message of the error."""
        self._what = what
        self._calls: dict[None, _Call] = {}  # the call at work, if there is one; `setdefault` is atomic
        self._ending = threading.Lock()  # held by who ends the turn of a call that did not do so itself

    def enter(self, *, within: bool = False) -> None:
        """Take the turn for the calling function.

        within: whether the function may also run inside of the call that has the turn, in the same thread; it then
        shares that turn. Raises BusyError while another call has it.
        """
        mine = _Call(sys._getframe(1), threading.current_thread().name)
        for _ in range(2):
            found = self._calls.setdefault(None, mine)
            if found is mine or (within and _runs_inside(mine.frame, found.frame)):
                return
            if _is_running(found.frame) or not self._end(found):
                break
        thread = found.thread
        del found, mine  # the frames are not to live on in this error's traceback
        raise BusyError(
            f"{self._what} is at work in thread {thread!r}, expected one call at a time; wait until it has returned, "
            "or load a second engine"
        )

    def leave(self) -> None:
        """End the turn of the calling function, if it has one."""
        call = self._calls.get(None)
        if call is not None and call.frame is sys._getframe(1):
            self._calls.clear()

    def _end(self, call: _Call) -> bool:
        """End the turn of a call that has returned without `leave`; return whether nobody else was about to."""
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
    """Guard a method by its object's `turn`; a call inside of the call that has the turn shares it.

    The method raises BusyError while another call has the turn.
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
    """Guard a method as `exclusive` does, but refuse calls inside of another one too: from a signal's handler, say."""

    @wraps(method)
    def guarded(self: G, /, *arguments: P.args, **named: P.kwargs) -> R:
        try:
            self.exclusive_use.enter()
            return method(self, *arguments, **named)
        finally:
            self.exclusive_use.leave()

    return guarded


def _runs_inside(frame: FrameType, outer: FrameType) -> bool:
    """Whether `outer` is among the callers of `frame`, which runs in this thread."""
    caller = frame.f_back
    while caller is not None:
        if caller is outer:
            return True
        caller = caller.f_back
    return False


def _is_running(frame: FrameType) -> bool:
    """Whether a function has not returned yet, in whichever thread."""
    try:
        frame.clear()  # Python refuses it for as long as the function runs
    except RuntimeError:
        return True
    return False
