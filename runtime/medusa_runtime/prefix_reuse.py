"""Prefix reuse: a prompt that begins like an earlier sequence takes over that sequence's rows of keys and values.

The rows come from the KV cache itself, where those of the last sequence still are, or from a store of copies. A
sequence is copied to the store only when another prompt is about to overwrite its rows. All rows count, those of the
prompt and those that were written while its answer was decoded: the next turn of a chat computes only what is new.
"""

from __future__ import annotations

import numpy as np

from medusa_runtime.backends.base import Backend, IntArray
from medusa_runtime.errors import CapacityError
from medusa_runtime.kv_cache import KvCache
from medusa_runtime.prefix_store import PrefixStore, common_prefix
from medusa_runtime.sequence import SequenceState

ROUNDING = frozenset({"fp16", "bf16", "int8", "w8a8", "int4"})  # precisions in which answers depend on reuse
MIN_SAVED_ROWS = 16  # fewer rows are computed again rather than copied with all that are before them


def default_budget(backend: Backend) -> int:
    """Return the bytes for copies where the caller names none: 0 in a precision in which reuse can change a token."""
    return 0 if backend.precision in ROUNDING else backend.default_prefix_bytes()


class PrefixReuse:
    """Knows whose rows are in the KV cache, and brings the rows that a prompt can use into it.

    Rows are claimed only while they are certain: row i of the cache is that of token i of `_held`, for every i below
    the length of the cache. Whatever ends a prompt or a step early leaves that true, because the cache grows only by
    rows that were committed, and a sequence gains a token only after the row before it was.

    Args:
        cache: The KV cache, whose first sequence is used.
        budget: Bytes that the stored copies may have; the cache itself does not count. 0 disables all reuse, also of
            rows in the cache.
    """

    def __init__(self, cache: KvCache, budget: int = 0) -> None:
        self._cache = cache
        self.store = PrefixStore(budget)
        self._held: SequenceState | None = None  # the sequence whose rows are in the cache; None: unknown

    def prepare(self, sequence: SequenceState) -> int:
        """Shorten the cache's past to rows of the sequence's prompt, as many as are known.

        The last token of the prompt is always computed, since its logits and hidden state are needed.

        Args:
            sequence: A sequence without an answer, which from now on is the one in the cache.

        Returns:
            The length of the past.

        Raises:
            CapacityError: The memory for the rows is not available.
        """
        if not self.store.budget:
            self._cache.truncate(0)
            return 0
        held, wanted = self._held_ids(), np.array(sequence.prompt[:-1], dtype=np.int32)
        reused = common_prefix(held, wanted)
        found = self.store.find(wanted, longer_than=reused)
        if len(held) - reused >= MIN_SAVED_ROWS:
            self._save(held)
        self._held = None  # until the cache has rows of the new sequence and no others
        if found is None:
            self._cache.truncate(reused)
        else:
            entry, reused = found
            self._cache.restore(entry.past, reused)
        self._held = sequence
        return reused

    def hold(self, sequence: SequenceState) -> None:
        """Take note that the rows in the cache, which are of the sequence's prompt, will be followed by its own.

        Args:
            sequence: A sequence without an answer.
        """
        self._held = sequence

    def clear(self) -> None:
        """Forget all rows, those in the cache too."""
        self._held = None
        self.store.clear()

    def _held_ids(self) -> IntArray:
        """Return the token ids of the rows in the cache, as far as they are known: (N,) int32."""
        held = self._held
        if held is None:
            return np.zeros(0, dtype=np.int32)
        ids = np.array([*held.prompt, *held.answer], dtype=np.int32)
        return ids[: self._cache.length()]

    def _save(self, ids: IntArray) -> None:
        """Copy the rows in the cache to the store, unless there is no room for them."""
        size = len(ids) * self._cache.row_bytes
        try:
            self.store.add(ids, size, lambda: self._cache.save(len(ids)))
        except CapacityError:  # the rows would only have saved time
            self.store.clear()  # the work at hand needs the memory more
