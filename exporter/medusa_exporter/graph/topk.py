"""Computes TopK and ArgMax in two stages: the top of each part of a row, then the top of those.

A GPU searches a row with one block of threads, and a step has few rows; their parts are many. For example, ArgMax over
a vocabulary of 49,152 becomes TopK with k = 1 over 64 parts of 768 values, and another over the 64 winners. In each
stage the first of equal values wins, as in the original operators.

On a CPU, ONNX Runtime's ArgMax takes 1.5 ns for each value, its ReduceMax a tenth of that. There ArgMax becomes
ReduceMax over parts, ArgMax over their maxima, and ArgMax over the one part that has the largest: over a vocabulary of
151,936 37 µs in place of 229.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_exporter.graph.edit import constant, insert, int_vector, replace

INT64 = ir.DataType.INT64
MAX_PARTS = 64  # of a row
MAX_PARTS_ON_CPU, MIN_PARTS_ON_CPU = 128, 8


def two_stage_topk(graph: ir.Graph) -> None:
    """Rewrite every TopK whose indices only are used, and every ArgMax, over a last axis of known length, in place."""
    for node in list(graph):
        if node.op_type in ("TopK", "ArgMax") and node.attributes["axis"].as_int() == -1:
            _rewrite(graph, node)


def two_stage_argmax(graph: ir.Graph) -> None:
    """Rewrite every ArgMax over a last axis of known length for a CPU, in place."""
    for node in list(graph):
        if node.op_type == "ArgMax" and node.attributes["axis"].as_int() == -1:
            _rewrite_on_cpu(graph, node)


def _rewrite_on_cpu(graph: ir.Graph, node: ir.Node) -> None:
    rows, result = node.inputs[0], node.outputs[0]
    if rows is None or rows.shape is None or rows.dtype is None or _k(node) is None:
        return
    length, rank = rows.shape[-1], rows.shape.rank()
    parts = _parts(length, 1, MAX_PARTS_ON_CPU) if isinstance(length, int) else 1
    if parts < MIN_PARTS_ON_CPU:
        return
    assert isinstance(length, int)  # noqa: S101 -- checked above
    last, leading = int_vector(graph, [-1]), [0] * (rank - 1)
    divided = insert(graph, node, "Reshape", [rows, int_vector(graph, [*leading, parts, length // parts])], rows.dtype)
    maxima = insert(graph, node, "ReduceMax", [divided, last], rows.dtype, {"keepdims": 0})
    part = insert(graph, node, "ArgMax", [maxima], INT64, {"axis": -1, "keepdims": 1})
    best = insert(graph, node, "GatherND", [divided, part], rows.dtype, {"batch_dims": rank - 1})
    inside = insert(graph, node, "ArgMax", [best], INT64, {"axis": -1, "keepdims": 1})
    start = insert(graph, node, "Mul", [part, int_vector(graph, [length // parts])], INT64)
    index = insert(graph, node, "Squeeze", [insert(graph, node, "Add", [start, inside], INT64), last], INT64)
    index.shape = result.shape
    replace(result, index)
    graph.remove(node, safe=True)


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    source, result = node.inputs[0], node.outputs[-1]
    assert source is not None and source.dtype is not None  # noqa: S101
    k, dtype = _k(node), source.dtype
    length = None if source.shape is None else source.shape[-1]
    if k is None or source.shape is None or not isinstance(length, int):
        return
    leading = [0] * (source.shape.rank() - 1)  # for Reshape: sizes that stay
    parts = _parts(length, k, MAX_PARTS)
    if parts < 2 or (node.op_type == "TopK" and (node.outputs[0].uses() or node.outputs[0].is_graph_output())):
        return

    def reshape(value: ir.Value, dtype: ir.DataType, *shape: int) -> ir.Value:
        name = "shape." + ".".join(map(str, shape))
        return insert(graph, node, "Reshape", [value, constant(graph, name, np.array(shape, np.int64))], dtype)

    def top(value: ir.Value) -> tuple[ir.Value, ir.Value]:
        number = constant(graph, f"top.{k}", np.array([k], np.int64))
        topk = ir.node("TopK", [value, number], attributes={"axis": -1, "largest": 1, "sorted": 1}, num_outputs=2)
        values, indices = topk.outputs
        values.type, indices.type = ir.TensorType(dtype), ir.TensorType(INT64)
        graph.insert_before(node, topk)
        return values, indices

    best, indices = top(reshape(source, dtype, *leading, parts, length // parts))
    starts = constant(graph, f"parts.{parts}.{length}", np.arange(0, length, length // parts, dtype=np.int64)[:, None])
    indices = reshape(insert(graph, node, "Add", [indices, starts], INT64), INT64, *leading, parts * k)
    _, winners = top(reshape(best, dtype, *leading, parts * k))
    chosen = insert(graph, node, "GatherElements", [indices, winners], INT64, {"axis": -1})
    rewritten = reshape(chosen, INT64, *leading) if node.op_type == "ArgMax" else chosen
    rewritten.shape = result.shape
    replace(result, rewritten)
    graph.remove(node, safe=True)


def _k(node: ir.Node) -> int | None:
    """Return how many values a node looks for; None if that is unknown or the node has other options than supported."""
    options = {name: attribute.value for name, attribute in node.attributes.items()}
    if node.op_type == "ArgMax":
        return None if options.get("keepdims", 1) or options.get("select_last_index") else 1
    number = node.inputs[1].const_value if node.inputs[1] is not None else None
    return int(number.numpy().item()) if number is not None and options.get("largest", 1) else None


def _parts(length: int, k: int, most: int) -> int:
    """Return the largest number of equal parts, up to `most`, with at least k values each; 1 if there is none."""
    fitting = [parts for parts in range(1, most + 1) if length % parts == 0 and length // parts >= k]
    return max(fitting, default=1)
