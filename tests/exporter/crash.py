"""Runs an operation in child processes that end, as if killed, at its n-th access to the file system, for every n."""

from __future__ import annotations

import builtins
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ENDED, CUT, FAILED = 0, 99, 98
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "ctypes.dlsym"}


class Cutter:
    """Ends the process at the n-th change of the file system; the change does not happen, or only half of a write."""

    def __init__(self, number: int) -> None:
        self._left = number

    def count(self) -> bool:
        """Whether the process is to end now."""
        self._left -= 1
        return self._left < 0

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (opened or event in CHANGES) and self.count():
            os._exit(CUT)

    def open(self, file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **options: Any) -> Any:
        """What `io.open` does, with writes counted too."""
        unseen = options.get("opener")  # an unnamed temporary file, which ends with its process
        if not set(mode) & set("wax+") or not isinstance(file, (str, os.PathLike)) or unseen:
            return _open(file, mode, buffering, *arguments, **options)
        raw = _Raw(file, mode.replace("b", "").replace("t", ""))
        raw.cutter = self
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *arguments, **options)


_open = io.open


class _Raw(io.FileIO):
    cutter: Cutter

    def write(self, data: Any) -> int:
        if self.cutter.count():
            super().write(bytes(data)[: len(data) // 2])
            os._exit(CUT)
        return super().write(data)


def cuts(operation: Callable[[], object]) -> Iterator[int]:
    """Run `operation` in one child after the other, each cut one access later; yield after each that was cut.

    Ends when a child came to its end. Raises AssertionError where the operation raised.
    """
    number = 0
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process of several threads
            child = os.fork()
        if child == 0:
            _run(operation, number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == ENDED:
            assert number > 0, "the operation did not change a file"
            return
        assert code == CUT, f"cut {number}: exit code {code}"
        yield number
        number += 1


def _run(operation: Callable[[], object], number: int) -> None:
    code = FAILED
    try:
        cutter = Cutter(number)
        io.open = builtins.open = cutter.open  # type: ignore[assignment]
        sys.addaudithook(cutter.audit)
        operation()
        code = ENDED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def hidden(parent: Path) -> list[str]:
    """Return the names in a folder that begin with a dot."""
    return sorted(path.name for path in parent.iterdir() if path.name.startswith("."))
