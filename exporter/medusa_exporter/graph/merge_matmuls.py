"""Merges matrix multiplications of the same rows into one: queries, keys and values; gate and up projections.

One large multiplication needs fewer operator calls than several small ones and wakes the threads once. The rewrite uses
standard operators only, and every element is computed as before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from medusa_exporter.graph.edit import constant, only_consumer, replace
from medusa_exporter.graph.lazy_weights import ConcatenatedColumns


# Not a pattern rule: the number of multiplications varies, and a pattern has a fixed number of outputs.
def merge_matmuls(graph: ir.Graph) -> None:
    """Merge all MatMuls by constant weights that read the same rows, in place."""
    by_rows: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.op_type == "MatMul" and node.inputs[0] is not None and is_constant(node.inputs[1], rank=2):
            by_rows[node.inputs[0]].append(node)
    for nodes in by_rows.values():
        if len(nodes) > 1:
            _merge(graph, nodes)


def is_constant(value: ir.Value | None, rank: int) -> bool:
    """Return whether a value is a constant of that many dimensions."""
    tensor = None if value is None else value.const_value
    return tensor is not None and len(tensor.shape) == rank


def _merge(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Replace the nodes by one MatMul, one Add of all biases (if each node has one), and a Split."""
    rows, first = nodes[0].inputs[0], nodes[0]
    assert rows is not None  # noqa: S101 -- `merge_matmuls` has checked it
    merged = _insert(graph, first, "MatMul", [rows, _concatenate(graph, [node.inputs[1] for node in nodes])])
    biases = [_bias(node) for node in nodes]
    results = [node.outputs[0] for node in nodes]
    if None not in biases:
        merged = _insert(graph, first, "Add", [merged, _concatenate(graph, biases)])
        results = [next(iter(result.consumers())).outputs[0] for result in results]
    _split(graph, first, merged, results)


def _bias(matmul: ir.Node) -> ir.Value | None:
    """Return the constant vector that is added to a MatMul, if that is the only use of its result."""
    add = only_consumer(matmul.outputs[0], "Add")
    if add is None or matmul.outputs[0].is_graph_output():
        return None
    other = add.inputs[1] if add.inputs[0] is matmul.outputs[0] else add.inputs[0]
    return other if is_constant(other, rank=1) else None


def _concatenate(graph: ir.Graph, values: Sequence[ir.Value | None]) -> ir.Value:
    """Return constants joined along their last axis; they are joined when they are read, so no copy is kept."""
    tensors = [value.const_value for value in values if value is not None and value.const_value is not None]
    name = "|".join(value.name or "" for value in values if value is not None)
    joined = ConcatenatedColumns(tensors, name)
    value = ir.Value(name=name, type=ir.TensorType(joined.dtype), shape=joined.shape, const_value=joined)
    graph.register_initializer(value)
    return value


def _split(graph: ir.Graph, before: ir.Node, merged: ir.Value, results: Sequence[ir.Value]) -> None:
    """Insert a Split of the last axis whose parts replace `results`."""
    name, widths = f"{merged.name}_in_{len(results)}", [_width(result) for result in results]
    sizes = constant(graph, name, np.array(widths))
    node = ir.node("Split", [merged, sizes], attributes={"axis": -1}, num_outputs=len(results), name=name)
    graph.insert_before(before, node)
    for index, (result, part, width) in enumerate(zip(results, node.outputs, widths, strict=True)):
        part.name, part.type = f"{name}_{index}", merged.type
        part.shape = None if merged.shape is None else ir.Shape([*merged.shape[:-1], width])
        replace(result, part)


def _insert(graph: ir.Graph, before: ir.Node, op_type: str, inputs: Sequence[ir.Value | None]) -> ir.Value:
    """Insert a MatMul or Add whose result has the type and leading dimensions of its first input."""
    rows, last = inputs[0], inputs[1]
    assert rows is not None and rows.shape is not None and last is not None  # noqa: S101
    name = f"{before.name}_{op_type}"
    new = ir.node(op_type, inputs, name=name)
    value = new.outputs[0]
    value.name, value.type = f"{name}_all", rows.type
    widest = last.shape[-1] if op_type == "MatMul" and last.shape is not None else rows.shape[-1]
    value.shape = ir.Shape([*rows.shape[:-1], widest])
    graph.insert_before(before, new)
    return value


def _width(value: ir.Value) -> int:
    width = None if value.shape is None else value.shape[-1]
    assert isinstance(width, int)  # noqa: S101 -- a multiplication by a constant has a known width
    return width
