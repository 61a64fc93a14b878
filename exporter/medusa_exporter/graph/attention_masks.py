"""Casts attention masks to the type of the rows, as a fused Attention requires; traced masks are always fp32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_exporter.graph.cast_precision import ATTENTION_INPUTS
from medusa_exporter.graph.edit import constant, insert
from medusa_exporter.graph.past_lengths import LOWEST


def cast_masks(graph: ir.Graph) -> None:
    """Cast the mask of each Attention, in place. Hidden scores get the lowest finite value of the type, not infinity.

    A row that sees nothing, as rows that pad a step may, then has a uniform softmax; infinities would make it NaN.
    """
    cast: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Attention":
            continue
        query, _, _, mask = node.inputs[:4]
        assert query is not None and query.dtype is not None and mask is not None  # noqa: S101 -- all are traced so
        if mask.dtype == query.dtype:
            continue
        if mask not in cast:
            lowest = constant(graph, "masks.lowest", np.array(LOWEST[query.dtype], np.float32))
            finite = insert(graph, node, "Max", [mask, lowest], ir.DataType.FLOAT)
            cast[mask] = insert(graph, node, "Cast", [finite], query.dtype, {"to": query.dtype})
            cast[mask].shape = mask.shape
        node.replace_input_with(ATTENTION_INPUTS, cast[mask])
