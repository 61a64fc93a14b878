"""Decomposes RMSNormalization and LayerNormalization into primitive operators, with statistics in fp32."""

from __future__ import annotations

import onnx_ir as ir

from medusa_exporter.graph.edit import NodeBuilder, insert, int_attribute

FLOAT = ir.DataType.FLOAT
DOWNSCALE = 256.0  # a row divided by this has no element whose square overflows fp16
MAX_SQUARE_SUM = 0.9  # if the squares of a downscaled row sum up to less, no square of the row itself overflows fp16


def decompose_norm(graph: ir.Graph, node: ir.Node, *, may_run_in_fp16: bool) -> None:
    """Replace a norm by x / sqrt(mean(x^2) + epsilon) * gain. LayerNormalization subtracts the mean and adds a bias.

    Args:
        graph: The graph of the node.
        node: An RMSNormalization or LayerNormalization over the last axis.
        may_run_in_fp16: The backend may compute in fp16 all the same, where the square of a large element overflows.
            Both the mean square of the row and that of the row divided by DOWNSCALE are then computed, and the graph
            selects the first unless it may have overflowed.
    """
    add, (rows, gain) = NodeBuilder(graph, node), node.inputs[:2]
    assert rows is not None and rows.dtype is not None  # noqa: S101
    if int_attribute(node, "axis", -1) != -1:
        raise RuntimeError(f"norm {node.name} is over axis {int_attribute(node, 'axis')}, expected the last one, -1")
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    wide = add.cast(rows, FLOAT)
    if node.op_type == "LayerNormalization":
        wide = add("Sub", wide, add("ReduceMean", wide, axes=[-1], keepdims=1))
    divisor = add("Sqrt", add("Add", _mean_square(add, wide), add.scalar(epsilon)))
    if may_run_in_fp16:
        width = gain.shape[0] if gain is not None and gain.shape is not None else None
        assert isinstance(width, int)  # noqa: S101 -- a gain is a constant
        downscaled = _mean_square(add, add("Mul", wide, add.scalar(1 / DOWNSCALE)))  # epsilon is negligible here
        large = add("Mul", add("Sqrt", downscaled), add.scalar(DOWNSCALE))
        fits = insert(graph, node, "Less", [downscaled, add.scalar(MAX_SQUARE_SUM / width)], ir.DataType.BOOL)
        divisor = insert(graph, node, "Where", [fits, divisor, large], FLOAT)
    normed = add("Mul", add.cast(add("Div", wide, divisor), rows.dtype), gain)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    add.replace(normed if bias is None else add("Add", normed, bias))


def _mean_square(add: NodeBuilder, values: ir.Value) -> ir.Value:
    return add("ReduceMean", add("Mul", values, values), axes=[-1], keepdims=1)
