"""Keeps copies of the rows of earlier sequences under a budget of bytes, and finds the longest common prefix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from medusa_runtime.backends.base import IntArray
from medusa_runtime.backends.saved_past import SavedPast

MAX_ENTRIES = 256  # so that a search takes less than a millisecond, however small the rows are


@dataclass(frozen=True, eq=False)
class StoredPrefix:
    """The rows of one sequence.

    Args:
        ids: (N,) token ids whose rows are stored, from the first one of the sequence on.
        past: Their N rows.
        size: Bytes of the rows.
    """

    ids: IntArray
    past: SavedPast
    size: int


class PrefixStore:
    """Rows of sequences by their token ids; the ones that were used least recently make room for new ones.

    Args:
        budget: Bytes that all rows together may have.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._entries: list[StoredPrefix] = []  # the least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return sum(entry.size for entry in self._entries)

    def find(self, ids: IntArray, longer_than: int = 0) -> tuple[StoredPrefix, int] | None:
        """Find the entry with the longest common prefix, the most recently used one among equals, and use it.

        Args:
            ids: (N,) token ids.
            longer_than: Only prefixes of more tokens count.

        Returns:
            The entry and the length of the common prefix; None if there is none.
        """
        best, most = None, longer_than
        for entry in reversed(self._entries):
            common = common_prefix(entry.ids, ids)
            if common > most:
                best, most = entry, common
        if best is None:
            return None
        self._use(best)
        return best, most

    def add(self, ids: IntArray, size: int, save: Callable[[], SavedPast]) -> bool:
        """Store the rows of a sequence in place of those of its prefixes.

        Nothing is copied if the store has these rows already, at the beginning of an entry, which then counts as used,
        or if they exceed the budget.

        Args:
            ids: (N,) token ids.
            size: Bytes of their rows.
            save: Copies the rows. What it raises is passed on; the store then lacks the entries that made room.

        Returns:
            Whether the rows were copied.
        """
        kept = []
        for entry in self._entries:
            common = common_prefix(entry.ids, ids)
            if common == len(ids):
                self._use(entry)
                return False
            if common < len(entry.ids):
                kept.append(entry)
        if size > self.budget:
            return False
        while kept and (len(kept) >= MAX_ENTRIES or sum(entry.size for entry in kept) + size > self.budget):
            del kept[0]
        self._entries = kept  # the memory is free before more of it is needed
        kept.append(StoredPrefix(ids, save(), size))
        return True

    def clear(self) -> None:
        """Forget all rows."""
        self._entries = []

    def _use(self, entry: StoredPrefix) -> None:
        self._entries = [*(other for other in self._entries if other is not entry), entry]


def common_prefix(first: IntArray, second: IntArray) -> int:
    """Return how many leading token ids two arrays have in common."""
    most = min(len(first), len(second))
    differs = first[:most] != second[:most]
    at = int(differs.argmax()) if most else 0
    return at if most and differs[at] else most
