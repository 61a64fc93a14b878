"""Libraries that would ask the user a question get no answer."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def empty_stdin() -> Iterator[None]:
    """Let Python's standard input be at its end while the block runs, so that nothing piped in answers a library."""
    before = sys.stdin
    with Path(os.devnull).open(encoding="utf-8") as empty:
        sys.stdin = empty
        try:
            yield
        finally:
            sys.stdin = before
