"""Replaces standard input, so that libraries cannot ask the user questions while a model is loaded."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def empty_stdin() -> Iterator[None]:
    """Make Python's standard input empty in a `with` block, so that piped data cannot answer a library's question."""
    before = sys.stdin
    with Path(os.devnull).open(encoding="utf-8") as empty:
        sys.stdin = empty
        try:
            yield
        finally:
            sys.stdin = before
