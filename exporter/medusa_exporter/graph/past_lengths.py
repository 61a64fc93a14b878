"""How many rows a graph in place reads: those that are real, or as many as are bound, a size that a host knows.

Shapes: P rows of the past that a step may see, T nodes, S = P + T; the real past is `past_length` rows of those P, and
the step's own rows lie behind them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from medusa_runtime import contract

from medusa_exporter.graph.edit import SLICE_END, constant, insert

BOOL, FLOAT, INT32, INT64 = ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64
# of what a mask hides, by the type of the mask
LOWEST = {ir.DataType.FLOAT16: float(np.finfo(np.float16).min), ir.DataType.BFLOAT16: -3.0e38}


class LengthsFromValues:
    """P is the number of real rows. A CPU counts it as it goes.

    rows: P, (1,) int64. total: S, last: S - 1, (1,) int32.
    """

    def __init__(self, graph: ir.Graph) -> None:
        """Put what is counted in front of all nodes."""
        first, given = graph[0], {value.name: value for value in graph.inputs}
        past_length, ids = given[contract.PAST_LENGTH], given[contract.INPUT_IDS]
        one = constant(graph, "in_place.one", np.ones(1, dtype=np.int32))
        self.rows = insert(graph, first, "Cast", [past_length], INT64, {"to": INT64})
        nodes = insert(graph, first, "Shape", [ids], INT64, {"start": 1, "end": 2})
        nodes32 = insert(graph, first, "Cast", [nodes], INT32, {"to": INT32})
        self.total = insert(graph, first, "Add", [past_length, nodes32], INT32)
        self.last = insert(graph, first, "Sub", [self.total, one], INT32)

    def mask(self, before: ir.Node, mask: ir.Value) -> ir.Value:  # noqa: ARG002
        """Give the mask as it is, (1, 1, T, S)."""
        return mask


class LengthsFromShapes:
    """P is the length of an input of its own, `past_rows`, which a host knows: sizes do not depend on numbers on a GPU.

    rows: P, (1,) int64. total: P + T, (1,) int32, on the host. last: the last real row, (1,) int32, on the device.
    """

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        """Put what is counted in front of all nodes. dtype: of the masks to give."""
        self._graph, self._dtype = graph, dtype
        first, given = graph[0], {value.name: value for value in graph.inputs}
        past_length, ids = given[contract.PAST_LENGTH], given[contract.INPUT_IDS]
        numbers = ir.Value(name=contract.PAST_ROWS, type=ir.TensorType(INT32), shape=ir.Shape(["P"]))
        graph.inputs.append(numbers)

        def add(op_type: str, *inputs: ir.Value, dtype: ir.DataType = INT32, **attributes: int) -> ir.Value:
            return insert(graph, first, op_type, inputs, dtype, attributes)

        zero, one = (constant(graph, f"bound.{n}", np.array(n, dtype=np.int32)) for n in (0, 1))
        start, end = (constant(graph, f"bound.{n}", np.array([n])) for n in (-1, SLICE_END))
        axis, scalar = (
            constant(graph, "bound.axis", np.array([0])),
            constant(graph, "bound.scalar", np.array([], np.int64)),
        )
        self.rows = add("Shape", numbers, dtype=INT64)
        nodes = add("Shape", ids, dtype=INT64, start=1, end=2)
        self.total = add("Cast", add("Add", self.rows, nodes, dtype=INT64), to=INT32)
        # on the device, where the last of 0, 1, … tells how many: a number of the host's would have to be copied there
        columns = add("Range", zero, add("Reshape", self.total, scalar), one)  # (S,)
        end_of = add("Slice", columns, start, end, axis)  # (1,): S - 1
        last_past = add("Slice", numbers, start, end, axis)  # (1,): P - 1
        self.last = add("Add", past_length, add("Sub", add("Sub", end_of, last_past), one))
        # where each column of a buffer stands in a mask over P past rows and T new ones behind them
        moved = add("Add", add("Sub", columns, past_length), add("Add", last_past, one))
        capped = add("Where", add("Less", moved, end_of, dtype=BOOL), moved, end_of)
        self._columns = add("Where", add("Less", columns, past_length, dtype=BOOL), columns, capped)
        self._masks: dict[ir.Value, ir.Value] = {}

    def mask(self, before: ir.Node, mask: ir.Value) -> ir.Value:
        """Lay a mask (1, 1, T, S) over P past rows and T new ones out as a buffer has them, in its type."""
        if mask not in self._masks:
            graph, zero = self._graph, constant(self._graph, "bound.seen", np.array(0, dtype=np.float32))
            hidden = insert(graph, before, "Less", [mask, zero], BOOL)
            hidden = insert(graph, before, "Gather", [hidden, self._columns], BOOL, {"axis": 3})
            kind = self._dtype.numpy()
            none, lowest = (
                constant(graph, f"bound.{name}", np.array(number, dtype=kind))
                for name, number in (("none", 0.0), ("lowest", LOWEST[self._dtype]))
            )
            self._masks[mask] = insert(graph, before, "Where", [hidden, lowest, none], self._dtype)
        return self._masks[mask]
