"""Words that depend on numbers."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: "1 token", "2 tokens". noun: a singular whose plural has an s at its end."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
