"""Swaps two folders atomically, so that a reader who opens the path finds the old one or the new one."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_SWAP = 2  # RENAME_EXCHANGE of Linux's renameat2(2), RENAME_SWAP of macOS' renamex_np(2)
_AT_FDCWD = -100


def swap_folders(new: Path, place: Path, old: Path) -> None:
    """Move the folder `new` to `place`, and the folder at `place` to `old`. Raises OSError.

    All three paths are on one file system. If it cannot swap atomically, two renames do it, and between them there is
    nothing at `place`.
    """
    if _swap(new, place):
        new.rename(old)
        return
    place.rename(old)
    new.rename(place)


def _swap(one: Path, other: Path) -> bool:
    """Swap two paths atomically; return False if the system cannot."""
    first, second = os.fsencode(one), os.fsencode(other)
    try:
        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return bool(library.renamex_np(first, second, _SWAP) == 0)
        return bool(library.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _SWAP) == 0)
    except (AttributeError, OSError, TypeError):  # no such function, or no such library (Windows)
        return False
