"""Finds the largest of many numbers in two rounds: those of each part, then those of these.

A row's numbers are gone through by one block of a GPU's threads, and a step has few rows; parts of rows are many.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_exporter.graph.edit import constant, insert, replace

INT64 = ir.DataType.INT64
MOST_PARTS = 64  # of a row


def two_stage_topk(graph: ir.Graph) -> None:
    """Rewrite every TopK and ArgMax over a last axis of known length, in place. Of equal numbers the first one wins."""
    for node in list(graph):
        if node.op_type in ("TopK", "ArgMax") and node.attributes["axis"].as_int() == -1:
            _rewrite(graph, node)


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    source, found = node.inputs[0], node.outputs[-1]
    assert source is not None and source.dtype is not None  # noqa: S101
    count, dtype = _count(node), source.dtype
    length = None if source.shape is None else source.shape[-1]
    if count is None or source.shape is None or not isinstance(length, int):
        return
    rows = [0] * (source.shape.rank() - 1)  # sizes that stay
    parts = _parts(length, count)
    if parts < 2 or (node.op_type == "TopK" and (node.outputs[0].uses() or node.outputs[0].is_graph_output())):
        return  # the places alone are found here, which are all that a step asks for

    def reshaped(value: ir.Value, dtype: ir.DataType, *shape: int) -> ir.Value:
        name = "shape." + ".".join(map(str, shape))
        return insert(graph, node, "Reshape", [value, constant(graph, name, np.array(shape, np.int64))], dtype)

    def top(value: ir.Value) -> tuple[ir.Value, ir.Value]:
        number = constant(graph, f"top.{count}", np.array([count], np.int64))
        made = ir.node("TopK", [value, number], attributes={"axis": -1, "largest": 1, "sorted": 1}, num_outputs=2)
        values, places = made.outputs
        values.type, places.type = ir.TensorType(dtype), ir.TensorType(INT64)
        graph.insert_before(node, made)
        return values, places

    best, places = top(reshaped(source, dtype, *rows, parts, length // parts))
    starts = constant(graph, f"parts.{parts}.{length}", np.arange(0, length, length // parts, dtype=np.int64)[:, None])
    places = reshaped(insert(graph, node, "Add", [places, starts], INT64), INT64, *rows, parts * count)
    _, order = top(reshaped(best, dtype, *rows, parts * count))
    chosen = insert(graph, node, "GatherElements", [places, order], INT64, {"axis": -1})
    result = reshaped(chosen, INT64, *rows) if node.op_type == "ArgMax" else chosen
    result.shape = found.shape
    replace(found, result)
    graph.remove(node, safe=True)


def _count(node: ir.Node) -> int | None:
    """How many a node looks for, where that is known and it is done as it is here."""
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    if node.op_type == "ArgMax":
        return None if given.get("keepdims", 1) or given.get("select_last_index") else 1
    number = node.inputs[1].const_value if node.inputs[1] is not None else None
    return int(number.numpy().item()) if number is not None and given.get("largest", 1) else None


def _parts(length: int, count: int) -> int:
    """The most parts of one length, up to MOST_PARTS, that hold `count` numbers each; 1 where there are none."""
    fitting = [parts for parts in range(1, MOST_PARTS + 1) if length % parts == 0 and length // parts >= count]
    return max(fitting, default=1)
