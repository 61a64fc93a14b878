"""Pads single rows in attention, so that a row's bits do not depend on how many rows a step has.

ONNX Runtime's matrix multiplication sums in another order if there is one row only. If activations are then rounded to
8 bits, a difference in the last bit can become another rounding, and plain decoding (one row a step) would produce
other tokens than a tree (several). A step of one row therefore gets a dummy row of zeros in each attention.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from medusa_runtime import contract

from medusa_exporter.graph.edit import constant, insert

INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64
ROWS, LENGTHS, POSITIONS, MASK = (0, 1, 2), (5, 6), 9, 10  # inputs of GroupQueryAttention, by index


def pad_single_rows(model: ir.Model) -> None:
    """Pad the inputs of every GroupQueryAttention with a row of zeros if the step has one row, in place."""
    graph = model.graph
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    if nodes:
        padding = _Padding(graph)
        for node in nodes:
            padding.apply(node)


class _Padding:
    """Pads the attention of one layer after the other; all share the number of rows to add, and padded values."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._first = graph, graph[0]
        self._padded: dict[tuple[ir.Value, int], ir.Value] = {}
        self._pads: dict[tuple[int, ...], ir.Value] = {}
        ids = next(value for value in graph.inputs if value.name == contract.INPUT_IDS)
        self._nodes = insert(graph, self._first, "Shape", [ids], INT64, {"start": 1, "end": 2})
        self._one, self._zero = (constant(graph, f"lone_row.{one}", np.array([one])) for one in (1, 0))
        is_single = insert(graph, self._first, "Equal", [self._nodes, self._one], ir.DataType.BOOL)
        # (1,): how many rows are added, 1 or 0
        self._added, self._added32 = (
            insert(graph, self._first, "Cast", [is_single], to, {"to": to}) for to in (INT64, INT32)
        )

    def apply(self, node: ir.Node) -> None:
        """Add the row to queries, keys, values, positions, mask and lengths, and remove it from the output."""
        for index in ROWS:
            self._pad(node, index, axes=(1,), rank=3)
        self._pad(node, POSITIONS, axes=(1,), rank=2)
        self._pad(node, MASK, axes=(2, 3), rank=4)
        for index in LENGTHS:
            value = node.inputs[index]
            assert value is not None  # noqa: S101 -- the operator requires it
            if (value, 0) not in self._padded:
                self._padded[value, 0] = insert(self._graph, node, "Add", [value, self._added32], INT32)
            node.replace_input_with(index, self._padded[value, 0])
        output = node.outputs[0]
        kept = ir.node("Slice", [output, self._zero, self._nodes, self._one])
        kept.outputs[0].type, kept.outputs[0].shape = output.type, output.shape
        output.shape = None  # it no longer has T rows
        ir.convenience.replace_all_uses_with(output, kept.outputs[0])
        kept.replace_input_with(0, output)
        self._graph.insert_after(node, kept)

    def _pad(self, node: ir.Node, index: int, axes: tuple[int, ...], rank: int) -> None:
        """Pad an input of the node at the end of some axes."""
        value = node.inputs[index]
        if value is None:
            return
        if (value, rank) not in self._padded:
            ends = tuple(int(axis - rank in axes) for axis in range(2 * rank))  # Pad takes all begins, then all ends
            if ends not in self._pads:
                which = constant(self._graph, f"lone_row.{ends}", np.array(ends))
                self._pads[ends] = insert(self._graph, self._first, "Mul", [self._added, which], INT64)
            assert value.dtype is not None  # noqa: S101 -- `write_kv_in_place` has set it
            self._padded[value, rank] = insert(self._graph, node, "Pad", [value, self._pads[ends]], value.dtype)
        node.replace_input_with(index, self._padded[value, rank])
