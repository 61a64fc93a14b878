"""Helpers that all graph rewrites share: add constants and nodes, replace values, look up producers and consumers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from medusa_runtime.contract import PAST
from numpy.typing import NDArray

ORT_DOMAIN = "com.microsoft"  # the domain of ONNX Runtime's own operators
SLICE_END = int(np.iinfo(np.int64).max)  # the end of a Slice that keeps everything up to the end of the axis


def constant(graph: ir.Graph, name: str, array: NDArray[Any] | ir.TensorProtocol) -> ir.Value:
    """Return the graph's initializer `name`, adding it if the graph does not have one of that name.

    A tensor is referenced, not copied, so several graphs can share it.
    """
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(array, name=name) if isinstance(array, np.ndarray) else array
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def int_vector(graph: ir.Graph, numbers: Sequence[int]) -> ir.Value:
    """Return an int64 vector constant."""
    return constant(graph, "ints." + ".".join(map(str, numbers)), np.array(numbers, dtype=np.int64))


def insert(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    dtype: ir.DataType,
    attributes: Mapping[str, Any] | None = None,
) -> ir.Value:
    """Insert a standard ONNX node before the node `before` and return its output, whose element type is `dtype`."""
    node = ir.node(op_type, inputs, attributes=attributes)
    node.outputs[0].type = ir.TensorType(dtype)
    graph.insert_before(before, node)
    return node.outputs[0]


def replace(old: ir.Value, new: ir.Value) -> None:
    """Use `new` wherever `old` was used. If `old` is a graph output, `new` takes its name and shape."""
    if old.is_graph_output():
        old.name, new.name, new.shape = f"{old.name}_before", old.name, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def is_past_input(value: ir.Value) -> bool:
    """Return whether a value is one of the contract's inputs for past keys and values, in any float type."""
    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return (value.name or "").startswith(PAST) and value.dtype in floats


def producer_of_type(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node that produces `value` if it is an `op_type`, else None."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def only_consumer(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the node that consumes `value` if it is the only consumer and an `op_type`, else None."""
    nodes = list(value.consumers())
    return nodes[0] if len(nodes) == 1 and nodes[0].op_type == op_type else None


def int_attribute(node: ir.Node, name: str, default: int = 0) -> int:
    """Return an integer attribute of a node, or `default` if the node does not have it."""
    return node.attributes[name].as_int() if name in node.attributes else default


def past_and_new(rows: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """Return the two inputs of the Concat that an attention reads its keys or values from: past rows and new rows."""
    concat = producer_of_type(rows, "Concat")
    if concat is None or len(concat.inputs) != 2:
        raise RuntimeError(f"attention reads {rows}, expected a Concat of past and new rows")
    past, new = concat.inputs
    assert past is not None and new is not None  # noqa: S101 -- Concat has no optional inputs
    return past, new


class NodeBuilder:
    """Inserts nodes before one node of a graph, usually the node that they are about to replace."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node = graph, node

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Insert a node and return its output, which has the element type of the first input."""
        first = inputs[0]
        assert first is not None and first.dtype is not None  # noqa: S101
        return insert(self._graph, self._node, op_type, inputs, first.dtype, attributes)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Insert a Cast to `dtype` unless the value already has that type."""
        if value.dtype == dtype:
            return value
        return insert(self._graph, self._node, "Cast", [value], dtype, {"to": dtype})

    def ints(self, *numbers: int) -> ir.Value:
        """Return an int64 vector constant."""
        return int_vector(self._graph, numbers)

    def scalar(self, value: float) -> ir.Value:
        """Return an fp32 scalar constant."""
        return constant(self._graph, f"number.{value!r}", np.array(value, dtype=np.float32))

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        """Insert a Reshape; a size of 0 copies that size from the input."""
        return self("Reshape", value, self.ints(*shape))

    def slice(self, value: ir.Value, start: int, end: int) -> ir.Value:
        """Insert a Slice of the last axis."""
        return self("Slice", value, self.ints(start), self.ints(end), self.ints(-1))

    def replace(self, value: ir.Value) -> None:
        """Use `value` in place of the node's output and remove the node. A graph output keeps its name."""
        old = self._node.outputs[0]
        value.shape = old.shape
        replace(old, value)
        self._graph.remove(self._node, safe=True)


class BranchBuilder:
    """Adds nodes to a graph or to the branch of an If; constants belong to the graph.

    Args:
        graph: The graph.
        add: Adds a node.
        prefix: Begins the names of results, which in a branch differ from all others; None for names given later.
    """

    def __init__(self, graph: ir.Graph, add: Callable[[ir.Node], None], prefix: str | None = None) -> None:
        self._graph, self._add, self._prefix, self._count = graph, add, prefix, 0

    def __call__(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        dtype: ir.DataType = ir.DataType.INT64,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Add a node and return its result."""
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain)
        result, self._count = node.outputs[0], self._count + 1
        result.type = ir.TensorType(dtype)
        if self._prefix is not None:
            result.name = f"{self._prefix}.{self._count}"
        self._add(node)
        return result

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Return a constant of the graph."""
        return constant(self._graph, name, array)

    def ints(self, *numbers: int) -> ir.Value:
        """Return a vector of constants."""
        return int_vector(self._graph, numbers)

    def range(self, count: ir.Value) -> ir.Value:
        """Return 0 … count - 1, for a count (1,)."""
        begin, step = (self.constant(f"range.{n}", np.array(n)) for n in (0, 1))
        return self("Range", begin, self("Squeeze", count, self.ints(0)), step)
