"""Keys and values of all layers side by side, a token a row: what TensorRT's engines read and write.

One arena (B, capacity, 2 · layers · W) is the past, another (B, T, 2 · layers · W) what a step gives: a run of kept
rows of one sequence is one piece of memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medusa_runtime import contract
from medusa_runtime.backends.arena import Tensor, runs
from medusa_runtime.backends.base import FloatArray
from medusa_runtime.backends.device import Device
from medusa_runtime.backends.elements import Element
from medusa_runtime.facts import ModelFacts


class TokenArena:
    """The arenas of one backend, laid out for `batch` sequences of `capacity` rows and steps of `nodes` nodes."""

    def __init__(
        self, device: Device, model: ModelFacts, element: Element, batch: int, capacity: int, nodes: int
    ) -> None:
        """element: of which the rows are. Raises CapacityError."""
        self._device, self._model, self._element = device, model, element
        self.batch, self.capacity, self.nodes = batch, capacity, nodes
        self._row = model.kv_bytes_per_token(element.size)
        self._past = device.allocate(batch * capacity * self._row)
        self._new = device.allocate(batch * nodes * self._row)

    def tensors(self, P: int, T: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What a step of T nodes reads, the first P rows of the past, and the new rows that it gives."""
        width = self._row // self._element.size
        past, new = (
            Tensor(self._element.onnx, (self.batch, rows, width), memory.address)
            for rows, memory in ((P, self._past), (T, self._new))
        )
        return {contract.PAST: past}, {contract.NEW: new}

    def commit(self, sequence: int, path: Sequence[int], length: int, nodes: int) -> None:
        """Copy the rows of `path`, of a step of `nodes` nodes, behind the first `length` rows of a sequence."""
        if length + len(path) > self.capacity:
            raise RuntimeError(f"{length} + {len(path)} rows do not fit an arena of {self.capacity}")
        for first, node, count in runs(path):
            self._copy(
                self._past.address + (sequence * self.capacity + length + first) * self._row,
                self._new.address + (sequence * nodes + node) * self._row,
                count,
            )

    def read_new(self, nodes: int, length: int) -> FloatArray:  # noqa: ARG002
        """Return (2 · layers, B, nodes, W): the rows that the last step gave."""
        array = np.empty((self.batch, nodes, 2 * self._model.layers, self._model.kv_row), self._element.stored)
        self._device.read(array, self._new.address)
        new: FloatArray = self._element.widened(array).transpose(2, 0, 1, 3)
        return new

    def take_over(self, other: TokenArena) -> None:
        """Copy all that fits from the arena before: sequences and rows."""
        for sequence in range(min(self.batch, other.batch)):
            self._copy(
                self._past.address + sequence * self.capacity * self._row,
                other._past.address + sequence * other.capacity * other._row,
                min(self.capacity, other.capacity),
            )

    def _copy(self, to: int, source: int, rows: int) -> None:
        self._device.copy_rows(to, self._row, source, self._row, self._row, rows)  # no pitch may be beyond 2 GiB
