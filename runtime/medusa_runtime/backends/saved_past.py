"""Copies of a past: what a backend does so that the rows of a sequence outlive it in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, eq=False)
class SavedPast:
    """A copy of the first rows of one sequence's past. Only the backend that copied them can read them.

    Args:
        length: Number of rows.
        data: Keys and values of all layers, in the backend's layout: host memory on a CPU, device memory on a GPU. It
            is freed with this object.
    """

    length: int
    data: Any


class PastCopies(Protocol):
    """Copies rows out of the KV cache and back into it (part of `medusa_runtime.backends.base.Backend`).

    Attributes:
        past_row_bytes: Bytes of one row of a past: the keys and values of one token, all layers.
    """

    past_row_bytes: int

    def default_prefix_bytes(self) -> int:
        """Return the bytes that copies of pasts may use unless the caller of `Engine.load` chooses."""

    def save_past(self, length: int, sequence: int = 0) -> SavedPast:
        """Copy the first rows of a sequence's past; the past, and the results of the last run, stay as they are.

        Args:
            length: Number of rows, at least one.
            sequence: Index of the sequence.

        Raises:
            CapacityError: The memory is not available.
            BusyError: Another thread's call is at work.
            RuntimeError: Fewer rows are allocated.
        """

    def restore_past(self, saved: SavedPast, length: int, sequence: int = 0) -> None:
        """Overwrite the first rows of a sequence's past with rows that `save_past` copied.

        The state that the next draft starts from stays that of the last commit. After a failure or an interrupt the
        past has no valid row.

        Args:
            saved: The copy, of any earlier moment and capacity.
            length: Rows to restore: at least one, at most `saved.length`.
            sequence: Index of the sequence.

        Raises:
            BusyError: Another thread's call is at work.
            RuntimeError: Fewer rows are allocated, or the copy has fewer.
        """


def check_length(length: int, capacity: int, saved: SavedPast | None = None) -> None:
    """Raise RuntimeError unless `length` rows are allocated, and the copy, if there is one, has as many.

    Args:
        length: Rows to copy.
        capacity: Rows of the arena.
        saved: The copy to restore.
    """
    if not 0 < length <= capacity:
        raise RuntimeError(f"got {length} rows to copy, expected 1 to {capacity}, the rows of the arena; allocate more")
    if saved is not None and length > saved.length:
        raise RuntimeError(f"got {length} rows to restore, expected at most {saved.length}, the rows of the copy")
