"""Locks a folder that a command writes to against all other commands, by a lock file."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import FileLock

POLL = 0.02  # seconds between two attempts to get a lock
VANISHED = 100  # attempts that may fail because another command has just removed the lock file's folder


@contextmanager
def hold_lock(
    file: Path,
    *,
    remove_folder: bool = False,
    on_wait: Callable[[], None] = lambda: None,
    timeout: float = math.inf,
) -> Iterator[None]:
    """Hold the lock `file` while the block runs, and remove the file when it ends.

    A lock file that a killed process has left does not block anyone: the lock ends with the process.

    Args:
        file: The lock file. Its folder is created.
        remove_folder: Whether to remove the file's folder too when the block ends, unless it holds something else.
        on_wait: Called once if another command holds the lock.
        timeout: Seconds to wait for the lock.

    Raises:
        TimeoutError: If another command still holds the lock after `timeout` seconds.
        OSError: If the lock file cannot be created.
    """
    from filelock import FileLock

    lock = FileLock(file)
    _acquire(lock, on_wait, timeout)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()  # while the lock is held, so that no other command's lock file is removed
        lock.release()
        if remove_folder:
            with contextlib.suppress(OSError):
                file.parent.rmdir()


def _acquire(lock: FileLock, on_wait: Callable[[], None], timeout: float) -> None:
    from filelock import Timeout

    file = Path(lock.lock_file)
    deadline, vanished, waits = time.monotonic() + timeout, 0, False
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()  # raises the reason where no file can be created; filelock would wait
            lock.acquire(blocking=False)
        except (FileExistsError, FileNotFoundError):  # the previous holder was just removing the folder
            vanished += 1
            if vanished > VANISHED:
                raise
        except Timeout:  # another command holds the lock
            if time.monotonic() > deadline:
                raise
            if not waits:
                on_wait()
            waits = True
        else:
            return
        time.sleep(POLL)
