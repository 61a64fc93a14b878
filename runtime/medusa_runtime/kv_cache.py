"""The past of each sequence: how long it is, how much fits. The only thing in the runtime that mutates it."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakValueDictionary

from medusa_runtime.backends.base import Backend
from medusa_runtime.capacity import grow_by_doubling
from medusa_runtime.errors import CapacityError, MedusaError
from medusa_runtime.exclusive import ExclusiveUse, exclusive

INITIAL_CAPACITY = 256  # rows; doubled as a sequence grows

_OPEN: WeakValueDictionary[int, KvCache] = WeakValueDictionary()  # by the id of its backend, which it keeps alive


class KvCache:
    """Lengths and capacity of the arenas that a backend holds.

    Between steps `length(s)` is one less than the tokens of sequence s: the last token is the next root, whose row
    does not exist yet.
    """

    def __init__(self, backend: Backend, batch: int = 1) -> None:
        """Take over the backend's arenas for `batch` sequences, all empty.

        Raises MedusaError while another cache has them: each would overwrite the other's rows. BusyError while another
        thread is using the backend.
        """
        self._backend = backend
        self._take_over(batch)

    @exclusive
    def _take_over(self, batch: int) -> None:
        backend = self._backend
        if id(backend) in _OPEN:
            raise MedusaError(
                f"the backend {backend.name!r} is in use by another decoder or cache, expected one at a time; go on "
                "with that one (`start` forgets what came before, `use` takes another tree), let it go first, or load "
                "a second backend"
            )
        self.batch = batch
        self.context = backend.model.context  # rows beyond which the model has no positions
        self.capacity = min(INITIAL_CAPACITY, self.context)
        self._lengths = [0] * batch
        self._can_draft = [False] * batch
        backend.allocate(batch, self.capacity)
        _OPEN[id(backend)] = self

    @property
    def exclusive_use(self) -> ExclusiveUse:
        """The backend's: one call at a time."""
        return self._backend.exclusive_use

    def length(self, sequence: int = 0) -> int:
        """Rows of this sequence's past that are real."""
        return self._lengths[sequence]

    def can_draft(self, sequence: int = 0) -> bool:
        """Whether the hidden state of the last row is held, so that the heads can run on it."""
        return self._can_draft[sequence]

    @exclusive
    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows a sequence, keeping what is written.

        Raises CapacityError beyond the model's context.
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
        """Keep the rows of the last step's nodes in `path` (ascending), in that order, behind the past.

        If it fails or is interrupted, the past is what it was; the next step may have to run without a draft.
        """
        if not path:
            return
        length = self._lengths[sequence]
        end = length + len(path)
        if end > self.capacity:
            self.reserve(end)
        self._can_draft[sequence] = False  # until the hidden state is that of the last row again
        self._backend.commit(sequence, path, length)
        self._lengths[sequence] = end
        self._can_draft[sequence] = True

    @exclusive
    def truncate(self, length: int, sequence: int = 0) -> None:
        """Forget all rows from `length` on. The next step runs without a draft: its hidden state is gone."""
        if not 0 <= length <= self._lengths[sequence]:
            raise ValueError(f"cannot truncate a past of {self._lengths[sequence]} rows to {length}")
        if length < self._lengths[sequence]:
            self._can_draft[sequence] = False
            self._lengths[sequence] = length
