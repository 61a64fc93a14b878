"""Ctrl-C at every place: a KeyboardInterrupt raised at the n-th line, or bytecode, that runs in the files named."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any


def interrupted(work: Callable[[], Any], number: int, files: tuple[str, ...], event: str = "line") -> bool:
    """Do the work, interrupted at event `number` (from 0) in files of these names; return whether it came that far."""
    left = number

    def trace(frame: Any, kind: str, _argument: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(files):
            return None
        frame.f_trace_opcodes = event == "opcode"
        if kind == event:
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def elsewhere(work: Callable[[], Any]) -> Any:
    """What `work` gives in another thread, or what it raises there."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, name="second")
    thread.start()
    thread.join()
    return found[0]


def run_together(target: Callable[[int], None], arguments: range, interval: float) -> None:
    """Run `target(argument)` for each argument in a thread of its own, with threads switched every `interval` s."""
    threads = [threading.Thread(target=target, args=(argument,)) for argument in arguments]
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
