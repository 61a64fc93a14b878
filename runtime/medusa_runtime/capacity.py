"""Sizes that grow by doubling, so that few of them ever come up."""

from __future__ import annotations


def grow_by_doubling(size: int, least: int) -> int:
    """Return `size` (1 at least), doubled until it is no less than `least`."""
    while size < least:
        size *= 2
    return size
