"""Keys and values as rows in a device's memory: the past, and beside it the rows that a step gives.

All layers' past lies in one arena (2 · layers, B, capacity, W), a step's new rows in another (2 · layers, B, T, W): a
run of kept rows of one sequence is one 2-D copy for all layers, and a rejected row is never copied at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from medusa_runtime.backends.device import Device
from medusa_runtime.facts import ModelFacts


class RowArena:
    """The arenas of one backend, laid out for `batch` sequences of `capacity` rows and steps of `nodes` nodes."""

    def __init__(self, device: Device, model: ModelFacts, itemsize: int, batch: int, capacity: int, nodes: int) -> None:
        """itemsize: bytes of one element. Raises CapacityError."""
        self._device = device
        self.batch, self.capacity, self.nodes = batch, capacity, nodes
        self.row = model.kv_row * itemsize  # bytes
        self.tensors = 2 * model.layers
        self._past = device.allocate(self.tensors * batch * capacity * self.row)
        self._new = device.allocate(self.tensors * batch * nodes * self.row)

    def past(self, tensor: int) -> int:
        """Address of one tensor of the past: keys of layer i are number i, its values layers + i."""
        return self._past.address + tensor * self.batch * self.capacity * self.row

    def new(self, tensor: int, nodes: int) -> int:
        """Address of one tensor of new rows in a step of `nodes` nodes."""
        return self._new.address + tensor * self.batch * nodes * self.row

    def commit(self, sequence: int, path: Sequence[int], length: int, nodes: int) -> None:
        """Copy the rows of `path`, of a step of `nodes` nodes, behind the first `length` rows of a sequence."""
        if length + len(path) > self.capacity:
            raise RuntimeError(f"{length} + {len(path)} rows do not fit an arena of {self.capacity}")
        for first, node, count in runs(path):
            self._device.copy_rows(
                self.past(0) + (sequence * self.capacity + length + first) * self.row,
                self.batch * self.capacity * self.row,
                self.new(0, nodes) + (sequence * nodes + node) * self.row,
                self.batch * nodes * self.row,
                count * self.row,
                self.tensors,
            )

    def take_over(self, other: RowArena) -> None:
        """Copy all that fits from the arena before: sequences and rows."""
        rows = min(self.capacity, other.capacity)
        for sequence in range(min(self.batch, other.batch)):
            self._device.copy_rows(
                self.past(0) + sequence * self.capacity * self.row,
                self.batch * self.capacity * self.row,
                other.past(0) + sequence * other.capacity * other.row,
                other.batch * other.capacity * other.row,
                rows * self.row,
                self.tensors,
            )


def runs(path: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cut an ascending path into runs of neighbours: (where it begins in the path, its first node, how many)."""
    first = 0
    for index in range(1, len(path) + 1):
        if index == len(path) or path[index] != path[index - 1] + 1:
            yield first, path[first], index - first
            first = index
