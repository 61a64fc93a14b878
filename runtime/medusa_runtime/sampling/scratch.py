"""Arrays of the vocabulary's size that the draw and the processors overwrite, so that no token allocates them anew."""

from __future__ import annotations

import threading

import numpy as np


class Scratch:
    """The arrays; each use overwrites them, so a user needs them no longer when another one begins.

    Args:
        size: Number of elements of each array, at least the vocabulary's.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.ids = np.arange(size, dtype=np.uint32)  # read only
        self.ids.flags.writeable = False
        self.hashes = np.empty(size, dtype=np.uint32)
        self.shifted = np.empty(size, dtype=np.uint32)
        self.weights = np.empty(size, dtype=np.float32)
        self.logits = np.empty(size, dtype=np.float32)


_OF_THREAD = threading.local()


def thread_scratch(size: int) -> Scratch:
    """Return this thread's arrays, of at least `size` elements; all samplers of a thread share them."""
    found: Scratch | None = getattr(_OF_THREAD, "scratch", None)
    if found is None or found.size < size:
        found = _OF_THREAD.scratch = Scratch(size)
    return found
