"""The KV arena that a graph updates in place: a step writes its new rows directly behind the past."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medusa_runtime import contract
from medusa_runtime.backends.base import FloatArray
from medusa_runtime.backends.device import Device, DeviceTensor, Memory
from medusa_runtime.backends.element_types import INT32, ElementType
from medusa_runtime.backends.kv_arena import contiguous_runs, kv_tensor_names
from medusa_runtime.errors import CapacityError
from medusa_runtime.facts import ModelFacts


class InPlaceArena:
    """Buffers of shape (2 · layers, kv_heads, C, head_dim) for one sequence, with C = capacity + max_nodes rows.

    The same memory is bound as input and as output. A step of T nodes behind `length` rows writes node n to row
    length + n of every buffer. The nodes of the rank-0 chain come first in a tree, so the most common path is already
    in place when it is accepted and no row is copied; the rows of other paths move towards the past.

    Example: 2 layers, 2 KV heads of size 4, float32, a capacity of 12 rows and steps of up to 8 nodes. The arena is
    (4, 2, 20, 4), which is 8 buffers of 20 rows of 16 bytes. Behind 5 rows a step writes nodes 0 to 7 to rows 5 to 12.
    `commit(0, [0, 2, 3], 5, nodes=8)` keeps nodes 0, 2 and 3 as rows 5, 6 and 7: node 0 is in place, nodes 2 and 3 move
    from rows 7 and 8 to rows 6 and 7. A copy must not overlap itself, so at most as many rows are copied at once as
    they move by, here 1: first row 7 to row 6, then row 8 to row 7. Each copy has 8 rows (one per buffer) of 16 bytes,
    20·16 = 320 bytes apart.
    """

    def __init__(
        self, device: Device, model: ModelFacts, element: ElementType, batch: int, capacity: int, max_nodes: int
    ) -> None:
        """Allocate the arena, filled with zeros.

        Args:
            device: Where it is allocated.
            model: The model, which determines the numbers of layers and KV heads and the head dimension.
            element: Element type of keys and values.
            batch: Number of sequences, which must be 1.
            capacity: Rows of the past.
            max_nodes: Nodes of the largest step.

        Raises:
            CapacityError: The memory is not available, or `batch` is more than 1.
        """
        if batch != 1:
            raise CapacityError(
                f"this graph decodes one sequence at a time, got a batch of {batch}; load a backend for each sequence"
            )
        self._device, self._model, self._element = device, model, element
        self.batch, self.capacity, self.max_nodes = batch, capacity, max_nodes
        self._buffer_rows = capacity + max_nodes  # C
        self._row_bytes = model.head_dim * element.itemsize
        self._buffer_count = 2 * model.layers * model.kv_heads
        self._buffers = device.allocate(self._buffer_count * self._buffer_rows * self._row_bytes)
        row_indices = np.arange(capacity, dtype=np.int32)
        self._row_indices = device.allocate(row_indices.nbytes)
        device.write(self._row_indices.address, row_indices)

    def tensors(self, P: int, T: int) -> tuple[dict[str, DeviceTensor], dict[str, DeviceTensor]]:  # noqa: ARG002
        """Return all buffers as inputs and as outputs, and `past_rows`, whose length is the number of rows to read."""
        model, onnx_type = self._model, self._element.onnx_type
        shape = (1, model.kv_heads, self._buffer_rows, model.head_dim)
        layer_bytes = model.kv_heads * self._buffer_rows * self._row_bytes
        inputs = {contract.PAST_ROWS: DeviceTensor(INT32, (P,), self._row_indices.address)}
        outputs = {}
        pairs = kv_tensor_names(model.layers, contract.present_key, contract.present_value)
        for index, (past, present) in enumerate(pairs):
            tensor = DeviceTensor(onnx_type, shape, self._buffers.address + index * layer_bytes)
            inputs[past] = outputs[present] = tensor
        return inputs, outputs

    def commit(self, sequence: int, path: Sequence[int], length: int, nodes: int) -> None:  # noqa: ARG002
        """Move the rows of `path`, which the step wrote behind `length` rows, directly behind these rows."""
        if length + len(path) > self.capacity:
            raise RuntimeError(
                f"{length} + {len(path)} rows do not fit an arena of {self.capacity}; allocate a larger one first"
            )
        for first, node, count in contiguous_runs(path):
            distance = node - first
            if distance == 0:
                continue  # the rows are in place
            for start in range(0, count, distance):
                self._move(length + node + start, length + first + start, min(distance, count - start))

    def _move(self, source_row: int, to_row: int, count: int) -> None:
        """Copy `count` rows of every buffer to another row of the same buffer."""
        pitch, base = self._buffer_rows * self._row_bytes, self._buffers.address
        self._device.copy_rows(
            to=base + to_row * self._row_bytes,
            to_pitch=pitch,
            source=base + source_row * self._row_bytes,
            source_pitch=pitch,
            width=count * self._row_bytes,
            height=self._buffer_count,
        )

    def read_new(self, nodes: int, length: int) -> FloatArray:
        """Return the rows that the last step wrote behind `length` rows: (2 · layers, 1, nodes, W) float32."""
        heads, head_dim = self._model.kv_heads, self._model.head_dim
        array = np.empty((2 * self._model.layers, heads, nodes, head_dim), self._element.host_dtype)
        packed = self._packed(length, nodes)  # `read` needs contiguous memory
        self._device.read(array, packed.address)
        rows = self._element.to_float32(array).transpose(0, 2, 1, 3)  # (2 · layers, nodes, kv_heads, head_dim)
        new: FloatArray = rows.reshape(2 * self._model.layers, 1, nodes, heads * head_dim)
        return new

    def save(self, sequence: int, length: int) -> Memory:  # noqa: ARG002
        """Copy the first `length` rows of every buffer: (2 · layers, kv_heads, length, head_dim)."""
        return self._packed(0, length)

    def restore(self, sequence: int, saved: Memory, saved_length: int, length: int) -> None:  # noqa: ARG002
        """Copy the first `length` rows of a copy back to every buffer."""
        self._device.copy_rows(
            to=self._buffers.address,
            to_pitch=self._buffer_rows * self._row_bytes,
            source=saved.address,
            source_pitch=saved_length * self._row_bytes,
            width=length * self._row_bytes,
            height=self._buffer_count,
        )

    def _packed(self, first: int, count: int) -> Memory:
        """Return a copy of `count` rows of every buffer, from row `first` on, without gaps."""
        width = count * self._row_bytes
        packed = self._device.allocate(self._buffer_count * width)
        self._device.copy_rows(
            to=packed.address,
            to_pitch=width,
            source=self._buffers.address + first * self._row_bytes,
            source_pitch=self._buffer_rows * self._row_bytes,
            width=width,
            height=self._buffer_count,
        )
        return packed

    def copy_sequences_from(self, other: InPlaceArena) -> None:
        """Copy as many rows of the other arena as fit."""
        self._device.copy_rows(
            to=self._buffers.address,
            to_pitch=self._buffer_rows * self._row_bytes,
            source=other._buffers.address,
            source_pitch=other._buffer_rows * other._row_bytes,
            width=min(self.capacity, other.capacity) * self._row_bytes,
            height=self._buffer_count,
        )

    def with_max_nodes(self, max_nodes: int) -> InPlaceArena:
        """Return a copy with more rows in each buffer. All rows move, since the buffers are further apart then."""
        arena = InPlaceArena(self._device, self._model, self._element, self.batch, self.capacity, max_nodes)
        arena.copy_sequences_from(self)
        return arena
