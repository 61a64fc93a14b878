"""Keys and values as rows in a device's memory: the past, and beside it the rows that a step gives.

All layers' past lies in one arena (2 · layers, B, capacity, W), a step's new rows in another (2 · layers, B, T, W): a
run of kept rows of one sequence is one 2-D copy for all layers, and a rejected row is never copied at all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from medusa_runtime import contract
from medusa_runtime.backends.base import FloatArray
from medusa_runtime.backends.device import Device, Memory
from medusa_runtime.backends.element_types import Element
from medusa_runtime.facts import ModelFacts


class Tensor(NamedTuple):
    """A tensor where it lies. number: ONNX's for its type."""

    number: int
    shape: tuple[int, ...]
    address: int


class KvArena(Protocol):
    """Where keys and values lie: `batch` sequences of `capacity` rows, and room for steps of `nodes` nodes."""

    batch: int
    capacity: int
    nodes: int

    def tensors(self, P: int, T: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What a step of T nodes reads, P rows of the past, and what it writes, by the contract's names."""

    def commit(self, sequence: int, path: Sequence[int], length: int, nodes: int) -> None:
        """Keep the rows of `path`, of a step of `nodes` nodes, behind the first `length` rows of a sequence."""

    def read_new(self, nodes: int, length: int) -> FloatArray:
        """Return (2 · layers, B, nodes, W): the rows that a step of `nodes` nodes gave behind `length` real ones."""

    def take_over(self, other: Any) -> None:
        """Copy all that fits from an arena of the same kind."""

    def widened(self, nodes: int) -> KvArena:
        """Return an arena of the same rows with room for steps of `nodes` nodes; this one stays as it is.

        Raises CapacityError.
        """


ArenaFactory = Callable[[Device, ModelFacts, Element, int, int, int], KvArena]  # batch, capacity and nodes last


class LayerMajorArena:
    """The arenas of one backend, laid out for `batch` sequences of `capacity` rows and steps of `nodes` nodes."""

    def __init__(
        self, device: Device, model: ModelFacts, element: Element, batch: int, capacity: int, nodes: int
    ) -> None:
        """element: of which the rows are. Raises CapacityError."""
        self._device, self._model, self._element = device, model, element
        self.batch, self.capacity, self.nodes = batch, capacity, nodes
        self._tensors, width = self._layout(model)
        self._row = width * element.size  # bytes
        self._past = device.allocate(self._tensors * batch * capacity * self._row)
        self._new = device.allocate(self._tensors * batch * nodes * self._row)

    def tensors(self, P: int, T: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What a step of T nodes reads, the first P rows of the past, and the new rows that it gives."""
        kind, B, row = self._element.onnx, self.batch, self._row
        given, made = {}, {}
        for number, (past, new) in enumerate(kv_tensor_names(self._model.layers, contract.new_key, contract.new_value)):
            address = self._past.address + number * B * self.capacity * row
            given[past] = Tensor(kind, (B, P, self._model.kv_row), address)
            made[new] = Tensor(kind, (B, T, self._model.kv_row), self._new.address + number * B * T * row)
        return given, made

    def commit(self, sequence: int, path: Sequence[int], length: int, nodes: int) -> None:
        """Copy the rows of `path`, of a step of `nodes` nodes, behind the first `length` rows of a sequence."""
        if length + len(path) > self.capacity:
            raise RuntimeError(f"{length} + {len(path)} rows do not fit an arena of {self.capacity}")
        for first, node, count in contiguous_runs(path):
            to = sequence * self.capacity + length + first
            self._copy(to, self._new, sequence * nodes + node, self.batch * nodes, count)

    def read_new(self, nodes: int, length: int) -> FloatArray:  # noqa: ARG002
        """Return (2 · layers, B, nodes, W): the rows that the last step gave."""
        width = self._row // self._element.size
        array = np.empty((self._tensors, self.batch, nodes, width), self._element.stored)
        self._device.read(array, self._new.address)
        return self._element.widened(array)

    def take_over(self, other: LayerMajorArena) -> None:
        """Copy all that fits from the arena before: sequences and rows."""
        rows = min(self.capacity, other.capacity)
        for sequence in range(min(self.batch, other.batch)):
            to, first = sequence * self.capacity, sequence * other.capacity
            self._copy(to, other._past, first, other.batch * other.capacity, rows)

    def widened(self, nodes: int) -> LayerMajorArena:
        """Return an arena with the same past, which both hold, and room for new rows of its own."""
        arena = copy.copy(self)
        arena.nodes, arena._new = nodes, self._device.allocate(self._tensors * self.batch * nodes * self._row)
        return arena

    def _layout(self, model: ModelFacts) -> tuple[int, int]:
        """How many tensors there are, and how many elements a row of one has."""
        return 2 * model.layers, model.kv_row

    def _copy(self, to: int, source: Memory, first: int, rows: int, count: int) -> None:
        """Copy `count` rows of every tensor to row `to` of the past; in `source` a tensor has `rows` rows."""
        self._device.copy_rows(
            self._past.address + to * self._row,
            self.batch * self.capacity * self._row,
            source.address + first * self._row,
            rows * self._row,
            count * self._row,
            self._tensors,
        )


def kv_tensor_names(layers: int, key: Callable[[int], str], value: Callable[[int], str]) -> Iterator[tuple[str, str]]:
    """Name the tensors of an arena in order: what a step reads, and what it gives for it; keys first."""
    for past, given in ((contract.past_key, key), (contract.past_value, value)):
        for layer in range(layers):
            yield past(layer), given(layer)


def contiguous_runs(path: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cut an ascending path into runs of neighbours: (where it begins in the path, its first node, how many)."""
    first = 0
    for index in range(1, len(path) + 1):
        if index == len(path) or path[index] != path[index - 1] + 1:
            yield first, path[first], index - first
            first = index
