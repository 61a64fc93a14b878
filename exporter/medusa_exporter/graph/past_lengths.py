"""Computes how many rows of the KV buffers a step reads, for graphs that write keys and values in place.

A buffer has room for C rows. Its first L = `past_length` rows are the real past; a step of T nodes writes its own rows
right behind them, to L ... L + T - 1. P is the number of past rows that the graph's masks cover.

On a CPU P = L: sizes may depend on values (`LengthsFromValues`). On a GPU a size that depends on values would have to
be copied to the host first, so P is the length of one more input, `past_rows`; it is at least L, and usually larger
(`LengthsFromShapes`). The mask, computed for P past rows followed by T new ones, must then be rearranged as the buffer
is.

Example: L = 2 real rows, P = 4 and T = 3 nodes, so that S = P + T = 7::

    column of the mask:      0     1     2     3     4     5     6
    what it is for:          past  past  -     -     node0 node1 node2
    row of the buffer:       0     1     2     3     4     5     6
    what it holds:           past  past  node0 node1 node2 -     -
    mask column to read:     0     1     4     5     6     6     6

A buffer row c before L reads mask column c. Any other row reads column c - L + P, but at most S - 1; the rows from L +
T on hold nothing, and attention does not read them because `last` = L + T - 1 = 4 is the last row that it does read.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from medusa_runtime import contract

from medusa_exporter.graph.edit import SLICE_END, constant, insert

BOOL, FLOAT, INT32, INT64 = ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64
# The value that a mask of each type adds to hidden scores: the lowest finite one (of bf16, nearly)
LOWEST = {ir.DataType.FLOAT16: float(np.finfo(np.float16).min), ir.DataType.BFLOAT16: -3.0e38}


class LengthsFromValues:
    """Lengths for a CPU, where P is the number of real rows.

    Attributes:
        rows: P, int64 (1,).
        total: S = P + T, int32 (1,).
        last: S - 1, int32 (1,).
    """

    def __init__(self, graph: ir.Graph) -> None:
        """Insert the computation before all nodes of the graph."""
        first, inputs = graph[0], {value.name: value for value in graph.inputs}
        past_length, ids = inputs[contract.PAST_LENGTH], inputs[contract.INPUT_IDS]
        one = constant(graph, "in_place.one", np.ones(1, dtype=np.int32))
        self.rows = insert(graph, first, "Cast", [past_length], INT64, {"to": INT64})
        nodes = insert(graph, first, "Shape", [ids], INT64, {"start": 1, "end": 2})
        nodes32 = insert(graph, first, "Cast", [nodes], INT32, {"to": INT32})
        self.total = insert(graph, first, "Add", [past_length, nodes32], INT32)
        self.last = insert(graph, first, "Sub", [self.total, one], INT32)

    def mask(self, before: ir.Node, mask: ir.Value) -> ir.Value:  # noqa: ARG002
        """Return the mask (1, 1, T, S) unchanged: with P = L both orders are the same."""
        return mask


class LengthsFromShapes:
    """Lengths for a GPU, where P is the length of the input `past_rows`, which holds 0, 1, ..., P - 1.

    Attributes:
        rows: P, int64 (1,).
        total: S = P + T, int32 (1,), on the host.
        last: L + T - 1, the last row that attention reads, int32 (1,), on the device.
    """

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        """Insert the computation before all nodes of the graph. `dtype` is the type of masks that attention reads."""
        self._graph, self._dtype = graph, dtype
        first, inputs = graph[0], {value.name: value for value in graph.inputs}
        past_length, ids = inputs[contract.PAST_LENGTH], inputs[contract.INPUT_IDS]
        past_rows = ir.Value(name=contract.PAST_ROWS, type=ir.TensorType(INT32), shape=ir.Shape(["P"]))
        graph.inputs.append(past_rows)

        def add(op_type: str, *inputs: ir.Value, dtype: ir.DataType = INT32, **attributes: int) -> ir.Value:
            return insert(graph, first, op_type, inputs, dtype, attributes)

        zero, one = (constant(graph, f"bound.{n}", np.array(n, dtype=np.int32)) for n in (0, 1))
        start, end = (constant(graph, f"bound.{n}", np.array([n])) for n in (-1, SLICE_END))
        axis, scalar = (
            constant(graph, "bound.axis", np.array([0])),
            constant(graph, "bound.scalar", np.array([], np.int64)),
        )
        self.rows = add("Shape", past_rows, dtype=INT64)
        nodes = add("Shape", ids, dtype=INT64, start=1, end=2)
        self.total = add("Cast", add("Add", self.rows, nodes, dtype=INT64), to=INT32)
        # The last elements of 0, 1, ... are read on the device; P and S themselves would have to be copied there.
        columns = add("Range", zero, add("Reshape", self.total, scalar), one)  # (S,): 0 ... S - 1
        last_column = add("Slice", columns, start, end, axis)  # (1,): S - 1
        last_past = add("Slice", past_rows, start, end, axis)  # (1,): P - 1
        self.last = add("Add", past_length, add("Sub", add("Sub", last_column, last_past), one))
        shifted = add("Add", add("Sub", columns, past_length), add("Add", last_past, one))  # c - L + P
        clamped = add("Where", add("Less", shifted, last_column, dtype=BOOL), shifted, last_column)
        self._mask_columns = add("Where", add("Less", columns, past_length, dtype=BOOL), columns, clamped)
        self._masks: dict[ir.Value, ir.Value] = {}

    def mask(self, before: ir.Node, mask: ir.Value) -> ir.Value:
        """Return a mask (1, 1, T, S) with its columns in the order of the buffer, in the type of the rows."""
        if mask not in self._masks:
            graph, zero = self._graph, constant(self._graph, "bound.seen", np.array(0, dtype=np.float32))
            hidden = insert(graph, before, "Less", [mask, zero], BOOL)
            hidden = insert(graph, before, "Gather", [hidden, self._mask_columns], BOOL, {"axis": 3})
            numpy_type = self._dtype.numpy()
            visible, lowest = (
                constant(graph, f"bound.{name}", np.array(number, dtype=numpy_type))
                for name, number in (("none", 0.0), ("lowest", LOWEST[self._dtype]))
            )
            self._masks[mask] = insert(graph, before, "Where", [hidden, lowest, visible], self._dtype)
        return self._masks[mask]
