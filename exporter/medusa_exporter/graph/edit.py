"""What rewrites of a graph need: constants, nodes with one result, values put in others' places, who uses one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from medusa_runtime.contract import PAST
from numpy.typing import NDArray

ORT_DOMAIN = "com.microsoft"  # of ONNX Runtime's own operators
SLICE_END = int(np.iinfo(np.int64).max)  # where a Slice goes to the end of an axis


def constant(graph: ir.Graph, name: str, array: NDArray[Any] | ir.TensorProtocol) -> ir.Value:
    """Give the graph a constant, or the one of that name that it has; a tensor is held as it is, by others too."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(array, name=name) if isinstance(array, np.ndarray) else array
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def insert(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    dtype: ir.DataType,
    attributes: Mapping[str, Any] | None = None,
) -> ir.Value:
    """Put a standard node in front of another; return what it gives."""
    node = ir.node(op_type, inputs, attributes=attributes)
    node.outputs[0].type = ir.TensorType(dtype)
    graph.insert_before(before, node)
    return node.outputs[0]


def replace(old: ir.Value, new: ir.Value) -> None:
    """Put `new` wherever `old` was used; an output of the graph keeps its name and shape."""
    if old.is_graph_output():
        old.name, new.name, new.shape = f"{old.name}_before", old.name, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def is_past_input(value: ir.Value) -> bool:
    """Whether a value is one of the contract's inputs of past rows, of whatever type they are."""
    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return (value.name or "").startswith(PAST) and value.dtype in floats


def only_consumer(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the one node that uses `value`, if there is one only and it is of that type."""
    nodes = list(value.consumers())
    return nodes[0] if len(nodes) == 1 and nodes[0].op_type == op_type else None


def past_and_new(rows: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """Return the past rows and the new ones, which the rows that an attention reads are the Concat of."""
    concat = None if rows is None else rows.producer()
    if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 2:
        raise RuntimeError(f"attention over {rows}, expected past and new rows, one behind the other")
    past, new = concat.inputs
    assert past is not None and new is not None  # noqa: S101 -- Concat has no optional inputs
    return past, new


class NodeBuilder:
    """Puts nodes in front of one that they take the place of."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node = graph, node

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add a node whose result is of its first input's type."""
        first = inputs[0]
        assert first is not None and first.dtype is not None  # noqa: S101
        return insert(self._graph, self._node, op_type, inputs, first.dtype, attributes)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Add a Cast, where the value is not of that type already."""
        if value.dtype == dtype:
            return value
        return insert(self._graph, self._node, "Cast", [value], dtype, {"to": dtype})

    def ints(self, *numbers: int) -> ir.Value:
        """Give a constant vector, int64."""
        return constant(self._graph, "ints." + ".".join(map(str, numbers)), np.array(numbers, dtype=np.int64))

    def number(self, value: float) -> ir.Value:
        """Give a constant scalar, fp32."""
        return constant(self._graph, f"number.{value!r}", np.array(value, dtype=np.float32))

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        """Reshape; a 0 takes that size over from the input."""
        return self("Reshape", value, self.ints(*shape))

    def slice(self, value: ir.Value, start: int, end: int) -> ir.Value:
        """Take a range of the last axis."""
        return self("Slice", value, self.ints(start), self.ints(end), self.ints(-1))

    def replace(self, value: ir.Value) -> None:
        """Let `value` be what the node gave, under its name where that is an output of the graph."""
        old = self._node.outputs[0]
        value.shape = old.shape
        replace(old, value)
        self._graph.remove(self._node, safe=True)
