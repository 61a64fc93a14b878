"""The KV cache: how many rows of keys and values each sequence has, and for how many there is memory."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakValueDictionary

from medusa_runtime.backends.base import Backend
from medusa_runtime.backends.saved_past import SavedPast
from medusa_runtime.capacity import grow_by_doubling
from medusa_runtime.errors import CapacityError, MedusaError
from medusa_runtime.exclusive import ExclusiveUse, exclusive

INITIAL_CAPACITY = 256  # rows; doubled as a sequence grows

_OPEN: WeakValueDictionary[int, KvCache] = WeakValueDictionary()  # by id(backend), which the cache keeps alive


class KvCache:
    """Lengths and capacity of a backend's key and value buffers; nothing else in the runtime changes them.

    Between steps `length(s)` is one less than the number of tokens of sequence s: the last token is the root of the
    next tree, and its keys and values are computed by that step. Rows of rejected nodes are never kept, so there is no
    rollback.
    """

    def __init__(self, backend: Backend, batch: int = 1) -> None:
        """Allocate a backend's buffers for `batch` empty sequences.

        Raises:
            MedusaError: Another cache uses this backend; the two would overwrite each other's rows.
            BusyError: Another thread is using the backend.
        """
        self._backend = backend
        self._acquire_backend(batch)

    @exclusive
    def _acquire_backend(self, batch: int) -> None:
        backend = self._backend
        if id(backend) in _OPEN:
            raise MedusaError(
                f"the backend {backend.name!r} is in use by another decoder or cache, expected one at a time; "
                "reuse that one (`start` discards the previous answer, `set_profile` changes the tree), delete it "
                "first, or load a second backend"
            )
        self.batch = batch
        self.context = backend.model.context  # rows; the model has no further positions
        self.capacity = min(INITIAL_CAPACITY, self.context)
        self._lengths = [0] * batch
        self._can_draft = [False] * batch
        backend.allocate(batch, self.capacity)
        _OPEN[id(backend)] = self

    @property
    def exclusive_use(self) -> ExclusiveUse:
        """The backend's lock: one call at a time."""
        return self._backend.exclusive_use

    def length(self, sequence: int = 0) -> int:
        """Return the number of valid rows of a sequence's past."""
        return self._lengths[sequence]

    def can_draft(self, sequence: int = 0) -> bool:
        """Whether the hidden state of the last row is available, from which the heads draft."""
        return self._can_draft[sequence]

    @exclusive
    def reserve(self, rows: int) -> None:
        """Grow the buffers to at least `rows` rows per sequence; the rows in use are kept.

        Raises:
            CapacityError: `rows` exceeds the model's context, or memory does not suffice.
        """
        if rows > self.context:
            raise CapacityError(
                f"{rows} tokens do not fit: the model's context is {self.context}; shorten the prompt or the answer"
            )
        if rows > self.capacity:
            capacity = min(grow_by_doubling(self.capacity, rows), self.context)
            self._backend.allocate(self.batch, capacity)
            self.capacity = capacity

    @exclusive
    def commit(self, path: Sequence[int], sequence: int = 0) -> None:
        """Append the rows of the last step's nodes in `path` (ascending) to a sequence's past.

        Example: after a step over 4 nodes behind 5 rows, `commit([0, 1, 2])` makes the past 8 rows long.

        If it fails or is interrupted, the past is unchanged; the next step may have to run without a draft.
        """
        if not path:
            return
        length = self._lengths[sequence]
        end = length + len(path)
        if end > self.capacity:
            self.reserve(end)
        self._can_draft[sequence] = False  # until the hidden state of the last row is available again
        self._backend.commit(sequence, path, length)
        self._lengths[sequence] = end
        self._can_draft[sequence] = True

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self._backend.past_row_bytes

    @exclusive
    def save(self, length: int, sequence: int = 0) -> SavedPast:
        """Return a copy of the first `length` rows of a sequence's past. Raises CapacityError."""
        if not 0 < length <= self._lengths[sequence]:
            raise ValueError(f"cannot save {length} rows of a past of {self._lengths[sequence]}")
        return self._backend.save_past(length, sequence)

    @exclusive
    def restore(self, saved: SavedPast, length: int, sequence: int = 0) -> None:
        """Make the first `length` rows of a copy the past of a sequence; the next step runs without a draft.

        If it fails or is interrupted, the past is unchanged or empty.

        Raises:
            CapacityError: `length` exceeds the model's context, or memory does not suffice.
        """
        self.reserve(length)
        self._can_draft[sequence] = False
        self._lengths[sequence] = 0  # while rows are overwritten
        self._backend.restore_past(saved, length, sequence)
        self._lengths[sequence] = length

    @exclusive
    def truncate(self, length: int, sequence: int = 0) -> None:
        """Shorten a sequence's past to `length` rows; the next step runs without a draft, as it has no hidden state."""
        if not 0 <= length <= self._lengths[sequence]:
            raise ValueError(f"cannot truncate a past of {self._lengths[sequence]} rows to {length}")
        if length < self._lengths[sequence]:
            self._can_draft[sequence] = False
            self._lengths[sequence] = length
