"""Keys and values in a device's memory where a step itself writes them: behind the real rows, head by head.

One arena (2 · layers, Hkv, C, D) serves as input and output. Of a step's rows the first ones of the tree, its rank-0
chain, lie where they are kept, so the usual path costs no copy; others move down, all layers and heads at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medusa_runtime import contract
from medusa_runtime.backends.base import FloatArray
from medusa_runtime.backends.device import Device
from medusa_runtime.backends.element_types import INT32, Element
from medusa_runtime.backends.kv_arena import Tensor, contiguous_runs, kv_tensor_names
from medusa_runtime.errors import CapacityError
from medusa_runtime.facts import ModelFacts


class InPlaceArena:
    """The arena of one backend and one sequence: `capacity` rows and, behind those that are bound, a step's `nodes`."""

    def __init__(
        self, device: Device, model: ModelFacts, element: Element, batch: int, capacity: int, nodes: int
    ) -> None:
        """element: of which the rows are. Raises CapacityError, for a batch of more than one too."""
        if batch != 1:
            raise CapacityError(
                f"this graph decodes one sequence at a time, got a batch of {batch}; load a backend for each"
            )
        self._device, self._model, self._element = device, model, element
        self.batch, self.capacity, self.nodes = batch, capacity, nodes
        self._rows = capacity + nodes  # C
        self._row = model.head_dim * element.size  # bytes
        self._height = 2 * model.layers * model.kv_heads
        self._past = device.allocate(self._height * self._rows * self._row)
        numbers = np.arange(capacity, dtype=np.int32)
        self._numbers = device.allocate(numbers.nbytes)
        device.write(self._numbers.address, numbers)

    def tensors(self, P: int, T: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # noqa: ARG002
        """What a step reads and writes: the whole arena, of which P rows may be real."""
        model, kind = self._model, self._element.onnx
        shape = (1, model.kv_heads, self._rows, model.head_dim)
        size = model.kv_heads * self._rows * self._row
        given, made = {contract.PAST_ROWS: Tensor(INT32, (P,), self._numbers.address)}, {}
        for number, (past, present) in enumerate(
            kv_tensor_names(model.layers, contract.present_key, contract.present_value)
        ):
            given[past] = made[present] = Tensor(kind, shape, self._past.address + number * size)
        return given, made

    def commit(self, sequence: int, path: Sequence[int], length: int, nodes: int) -> None:  # noqa: ARG002
        """Move the rows of `path`, which a step wrote behind `length` real ones, together."""
        if length + len(path) > self.capacity:
            raise RuntimeError(f"{length} + {len(path)} rows do not fit an arena of {self.capacity}")
        for first, node, count in contiguous_runs(path):
            far = node - first
            for start in range(0, count if far else 0, far or 1):  # so that no copy reads where it writes
                self._move(length + node + start, length + first + start, min(far, count - start))

    def _move(self, source: int, to: int, count: int) -> None:
        pitch = self._rows * self._row
        base, width = self._past.address, count * self._row
        self._device.copy_rows(base + to * self._row, pitch, base + source * self._row, pitch, width, self._height)

    def read_new(self, nodes: int, length: int) -> FloatArray:
        """Return (2 · layers, 1, nodes, W): the rows that the last step wrote behind `length` real ones."""
        heads, size = self._model.kv_heads, self._model.head_dim
        array = np.empty((2 * self._model.layers, heads, nodes, size), self._element.stored)
        width, together = nodes * self._row, self._device.allocate(array.nbytes)  # an array is read in one piece
        source = self._past.address + length * self._row
        self._device.copy_rows(together.address, width, source, self._rows * self._row, width, self._height)
        self._device.read(array, together.address)
        rows = self._element.widened(array).transpose(0, 2, 1, 3)  # (2 · layers, nodes, Hkv, D)
        new: FloatArray = rows.reshape(2 * self._model.layers, 1, nodes, heads * size)
        return new

    def take_over(self, other: InPlaceArena) -> None:
        """Copy all the rows that fit from the arena before."""
        self._device.copy_rows(
            self._past.address,
            self._rows * self._row,
            other._past.address,
            other._rows * other._row,
            min(self.capacity, other.capacity) * self._row,
            self._height,
        )

    def widened(self, nodes: int) -> InPlaceArena:
        """Return a copy with more room behind the rows: they lie head by head, so all of them move."""
        arena = InPlaceArena(self._device, self._model, self._element, self.batch, self.capacity, nodes)
        arena.take_over(self)
        return arena
