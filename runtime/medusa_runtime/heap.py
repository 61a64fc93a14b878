"""Returns memory that loading has freed to the operating system."""

from __future__ import annotations

import ctypes
import sys


def trim_heap() -> None:
    """Return free pages of the heap to the operating system, which glibc (Linux) otherwise keeps."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries do not have it
        if trim is not None:
            trim(0)
