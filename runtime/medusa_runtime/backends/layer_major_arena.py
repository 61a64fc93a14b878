"""The KV arena with one tensor per layer: graphs read past rows from it and write new rows to a second block."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from medusa_runtime import contract
from medusa_runtime.backends.base import FloatArray
from medusa_runtime.backends.device import Device, DeviceTensor, Memory
from medusa_runtime.backends.element_types import ElementType
from medusa_runtime.backends.kv_arena import contiguous_runs, kv_tensor_names
from medusa_runtime.facts import ModelFacts


class TensorRows(NamedTuple):
    """Where a run of rows is in memory that has the same number of rows for each tensor.

    Args:
        memory: The memory.
        first: First row of the run, counted from the start of a tensor.
        of: Rows of one tensor.
    """

    memory: Memory
    first: int
    of: int


class LayerMajorArena:
    """A past of shape (2 · layers, B, capacity, W) and new rows of shape (2 · layers, B, T, W).

    The 2 · layers tensors are the keys of all layers, then the values of all layers. Only accepted rows are copied from
    the new rows to the past. One copy moves a run of consecutive nodes in all tensors at once, because every tensor has
    the run at the same offset.

    Example: 2 layers, W = 4, float32, 2 sequences, a capacity of 6 rows and a step of 3 nodes. The past is (4, 2, 6, 4)
    and the new rows are (4, 2, 3, 4). Within each of the 4 tensors, row r of sequence b is row 6b + r of the past and
    node n of sequence b is row 3b + n of the new rows. `commit(1, [0, 2], 3, nodes=3)` appends nodes 0 and 2 of
    sequence 1 to its 3 rows: new row 3 goes to past row 9, new row 5 to past row 10. Each of the two copies has 4 rows
    (one per tensor) of 16 bytes, 2·3·16 = 96 bytes apart in the new rows and 2·6·16 = 192 bytes apart in the past.
    """

    def __init__(
        self, device: Device, model: ModelFacts, element: ElementType, batch: int, capacity: int, max_nodes: int
    ) -> None:
        """Allocate the arena, filled with zeros.

        Args:
            device: Where it is allocated.
            model: The model, which determines the numbers of layers and KV heads and the head dimension.
            element: Element type of keys and values.
            batch: Number of sequences.
            capacity: Rows of each sequence.
            max_nodes: Nodes of the largest step.

        Raises:
            CapacityError: The memory is not available.
        """
        self._device, self._model, self._element = device, model, element
        self.batch, self.capacity, self.max_nodes = batch, capacity, max_nodes
        self._tensor_count, width = self._tensor_sizes(model)
        self._row_bytes = width * element.itemsize
        self._past = device.allocate(self._tensor_count * batch * capacity * self._row_bytes)
        self._new = device.allocate(self._tensor_count * batch * max_nodes * self._row_bytes)

    def tensors(self, P: int, T: int) -> tuple[dict[str, DeviceTensor], dict[str, DeviceTensor]]:
        """Return the first P rows of the past as inputs, and the new rows as outputs."""
        onnx_type, B, row_bytes = self._element.onnx_type, self.batch, self._row_bytes
        inputs, outputs = {}, {}
        pairs = kv_tensor_names(self._model.layers, contract.new_key, contract.new_value)
        for index, (past, new) in enumerate(pairs):
            past_address = self._past.address + index * B * self.capacity * row_bytes
            new_address = self._new.address + index * B * T * row_bytes
            inputs[past] = DeviceTensor(onnx_type, (B, P, self._model.kv_row), past_address)
            outputs[new] = DeviceTensor(onnx_type, (B, T, self._model.kv_row), new_address)
        return inputs, outputs

    def commit(self, sequence: int, path: Sequence[int], length: int, nodes: int) -> None:
        """Copy the new rows of `path` behind the first `length` rows of the sequence's past."""
        if length + len(path) > self.capacity:
            raise RuntimeError(
                f"{length} + {len(path)} rows do not fit an arena of {self.capacity}; allocate a larger one first"
            )
        for first, node, count in contiguous_runs(path):
            new = TensorRows(self._new, sequence * nodes + node, self.batch * nodes)
            self._copy(self._past_rows(sequence, length + first), new, count)

    def read_new(self, nodes: int, length: int) -> FloatArray:  # noqa: ARG002
        """Return the new rows of the last step: (2 · layers, B, nodes, W) float32."""
        width = self._row_bytes // self._element.itemsize
        array = np.empty((self._tensor_count, self.batch, nodes, width), self._element.host_dtype)
        self._device.read(array, self._new.address)
        return self._element.to_float32(array)

    def copy_sequences_from(self, other: LayerMajorArena) -> None:
        """Copy the past of the sequences that both arenas have, as many rows as fit."""
        rows = min(self.capacity, other.capacity)
        for sequence in range(min(self.batch, other.batch)):
            self._copy(self._past_rows(sequence), other._past_rows(sequence), rows)

    def save(self, sequence: int, length: int) -> Memory:
        """Copy the first `length` rows of a sequence's past to new memory: (2 · layers, length, W)."""
        saved = self._device.allocate(self._tensor_count * length * self._row_bytes)
        self._copy(TensorRows(saved, 0, length), self._past_rows(sequence), length)
        return saved

    def restore(self, sequence: int, saved: Memory, saved_length: int, length: int) -> None:
        """Copy the first `length` rows of a copy back to the sequence's past."""
        self._copy(self._past_rows(sequence), TensorRows(saved, 0, saved_length), length)

    def with_max_nodes(self, max_nodes: int) -> LayerMajorArena:
        """Return an arena that shares this one's past and has larger new rows. Raises CapacityError."""
        arena = copy.copy(self)
        arena.max_nodes = max_nodes
        arena._new = self._device.allocate(self._tensor_count * self.batch * max_nodes * self._row_bytes)
        return arena

    def _tensor_sizes(self, model: ModelFacts) -> tuple[int, int]:
        """Return the number of tensors, and the elements of one row of a tensor."""
        return 2 * model.layers, model.kv_row

    def _past_rows(self, sequence: int, row: int = 0) -> TensorRows:
        """Return where the rows of a sequence's past are, from row `row` on."""
        return TensorRows(self._past, sequence * self.capacity + row, self.batch * self.capacity)

    def _copy(self, to: TensorRows, source: TensorRows, count: int) -> None:
        """Copy `count` rows of every tensor."""
        self._device.copy_rows(
            to=to.memory.address + to.first * self._row_bytes,
            to_pitch=to.of * self._row_bytes,
            source=source.memory.address + source.first * self._row_bytes,
            source_pitch=source.of * self._row_bytes,
            width=count * self._row_bytes,
            height=self._tensor_count,
        )
