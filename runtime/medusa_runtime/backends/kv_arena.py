"""KV arenas: the KV cache of a GPU backend in one block of device memory.

Three layouts exist, because each kind of graph reads the cache in its own way:

- `LayerMajorArena`: one tensor per layer for keys and one for values, one token per row.
- `TokenMajorArena`: one tensor, whose rows hold a token's keys and values of all layers.
- `InPlaceArena`: one tensor per layer and KV head; a step writes its new rows into the cache itself.

This module has their common protocol and the helpers that they share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from medusa_runtime import contract
from medusa_runtime.backends.base import FloatArray
from medusa_runtime.backends.device import Device, DeviceTensor, Memory
from medusa_runtime.backends.element_types import ElementType
from medusa_runtime.facts import ModelFacts


class KvArena(Protocol):
    """Keys and values of `batch` sequences.

    W = kv_heads · head_dim is the width of one token's key (or value) of one layer.
    """

    batch: int
    capacity: int  # rows (tokens) of each sequence
    max_nodes: int  # nodes of the largest step that there is room for

    def tensors(self, P: int, T: int) -> tuple[dict[str, DeviceTensor], dict[str, DeviceTensor]]:
        """Return the graph's KV inputs and outputs for a step.

        Args:
            P: Rows of the past that the step reads, at most `capacity`.
            T: Nodes of the step, at most `max_nodes`.

        Returns:
            Inputs and outputs, each by the names of `medusa_runtime.contract`.
        """

    def commit(self, sequence: int, path: Sequence[int], length: int, nodes: int) -> None:
        """Append the rows of accepted nodes to the past of a sequence.

        Args:
            sequence: Index of the sequence in the batch.
            path: Accepted nodes, ascending.
            length: Rows that the sequence's past has; the accepted rows follow them.
            nodes: Number of nodes that the step ran with, padding included.
        """

    def read_new(self, nodes: int, length: int) -> FloatArray:
        """Return the rows that the last step computed: (2 · layers, B, nodes, W) float32, all keys before all values.

        Args:
            nodes: Number of nodes that the step ran with.
            length: Rows of the past that the step ran behind.
        """

    def copy_sequences_from(self, other: Any) -> None:
        """Copy the past of an arena of the same layout: the sequences that both have, as many rows as fit."""

    def save(self, sequence: int, length: int) -> Memory:
        """Copy the first `length` rows of a sequence's past to new memory, without gaps. Raises CapacityError."""

    def restore(self, sequence: int, saved: Memory, saved_length: int, length: int) -> None:
        """Copy rows that `save` copied back to where they were.

        Args:
            sequence: Index of the sequence in the batch.
            saved: The copy, of this arena or of one with the same layout and another capacity.
            saved_length: Rows of the copy.
            length: Rows to restore, at most `saved_length`.
        """

    def with_max_nodes(self, max_nodes: int) -> KvArena:
        """Return an arena with the same past and room for steps of `max_nodes` nodes; this one stays valid.

        Raises CapacityError where the memory is not available.
        """


# Arguments: device, model, element type, batch, capacity, max_nodes. Raises CapacityError.
ArenaFactory = Callable[[Device, ModelFacts, ElementType, int, int, int], KvArena]


def kv_tensor_names(
    layers: int, new_key: Callable[[int], str], new_value: Callable[[int], str]
) -> Iterator[tuple[str, str]]:
    """Yield the names of the KV tensors in the order in which an arena stores them: all keys, then all values.

    For two layers and the contract's `new_key` and `new_value`: ("past_key_0", "new_key_0"), ("past_key_1",
    "new_key_1"), ("past_value_0", "new_value_0"), ("past_value_1", "new_value_1").

    Args:
        layers: Number of decoder layers.
        new_key: Returns the name of the output with a layer's keys.
        new_value: Returns the name of the output with a layer's values.

    Yields:
        The name of an input and of the output that extends it.
    """
    for past, new in ((contract.past_key, new_key), (contract.past_value, new_value)):
        for layer in range(layers):
            yield past(layer), new(layer)


def contiguous_runs(path: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Split an ascending path into runs of consecutive nodes, each of which is copied at once.

    For example [0, 2, 3, 7] yields (0, 0, 1), (1, 2, 2) and (3, 7, 1).

    Yields:
        Position of the run in the path, its first node, its number of nodes.
    """
    first = 0
    for index in range(1, len(path) + 1):
        if index == len(path) or path[index] != path[index - 1] + 1:
            yield first, path[first], index - first
            first = index
