"""Sizes of buffers that grow by doubling, so that only a few different sizes occur."""

from __future__ import annotations


def grow_by_doubling(size: int, least: int) -> int:
    """Return `size` (at least 1), doubled until it is at least `least`; for example (256, 600) gives 1024."""
    while size < least:
        size *= 2
    return size
