"""Bits that do not depend on how many rows a step has: a row that stands alone gets a dummy beside it in attention.

ONNX Runtime's product of one row adds up in another order than that of several. Where activations are then rounded to
8 bits such a difference in the last bit grows to that of another rounding, so plain decoding would part from a tree's.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from medusa_runtime import contract

from medusa_exporter.graph.edit import constant, insert

INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64
POSITIONS, MASK = 9, 10  # inputs of GroupQueryAttention
LENGTHS = (5, 6)


def pad_single_rows(model: ir.Model) -> None:
    """Behind a step's only row put one of zeros, on the way into every GroupQueryAttention, in place."""
    graph = model.graph
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    if nodes:
        pairs = _Pairs(graph)
        for node in nodes:
            pairs.attend(node)


class _Pairs:
    """What all layers share, and the rewrite of one."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._first = graph, graph[0]
        self._padded: dict[tuple[ir.Value, int], ir.Value] = {}
        self._pads: dict[tuple[int, ...], ir.Value] = {}
        ids = next(value for value in graph.inputs if value.name == contract.INPUT_IDS)
        self._rows = insert(graph, self._first, "Shape", [ids], INT64, {"start": 1, "end": 2})
        self._one, self._zero = (constant(graph, f"lone_row.{one}", np.array([one])) for one in (1, 0))
        alone = insert(graph, self._first, "Equal", [self._rows, self._one], ir.DataType.BOOL)
        # (1,): how many rows are added, 1 or 0
        self._alone, self._alone32 = (
            insert(graph, self._first, "Cast", [alone], to, {"to": to}) for to in (INT64, INT32)
        )

    def attend(self, node: ir.Node) -> None:
        """Add the row to queries, keys and values, to positions, mask and lengths; drop it from what comes out."""
        for index in (0, 1, 2):
            self._pad(node, index, axes=(1,), rank=3)
        self._pad(node, POSITIONS, axes=(1,), rank=2)
        self._pad(node, MASK, axes=(2, 3), rank=4)
        for index in LENGTHS:
            value = node.inputs[index]
            assert value is not None  # noqa: S101 -- the operator demands it
            if (value, 0) not in self._padded:
                self._padded[value, 0] = insert(self._graph, node, "Add", [value, self._alone32], INT32)
            node.replace_input_with(index, self._padded[value, 0])
        output = node.outputs[0]
        kept = ir.node("Slice", [output, self._zero, self._rows, self._one])
        kept.outputs[0].type, kept.outputs[0].shape = output.type, output.shape
        output.shape = None  # of T rows no longer
        ir.convenience.replace_all_uses_with(output, kept.outputs[0])
        kept.replace_input_with(0, output)
        self._graph.insert_after(node, kept)

    def _pad(self, node: ir.Node, index: int, axes: tuple[int, ...], rank: int) -> None:
        value = node.inputs[index]
        if value is None:
            return
        if (value, rank) not in self._padded:
            ends = tuple(int(axis - rank in axes) for axis in range(2 * rank))
            if ends not in self._pads:
                which = constant(self._graph, f"lone_row.{ends}", np.array(ends))
                self._pads[ends] = insert(self._graph, self._first, "Mul", [self._alone, which], INT64)
            assert value.dtype is not None  # noqa: S101 -- the dialect has set it
            self._padded[value, rank] = insert(self._graph, node, "Pad", [value, self._pads[ends]], value.dtype)
        node.replace_input_with(index, self._padded[value, rank])
