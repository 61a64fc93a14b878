"""Masks in the type of the rows, which a fused attention wants; as traced they are fp32 whatever the rows are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_exporter.graph.cast_precision import ATTENTION_INPUTS
from medusa_exporter.graph.edit import constant, insert
from medusa_exporter.graph.past_lengths import LOWEST


def cast_masks(graph: ir.Graph) -> None:
    """Cast each Attention's mask, in place: what hides a row becomes the lowest number of the type, never infinity.

    A row that sees nothing, as those that pad a step may, is then spread evenly, where infinities would make it NaN.
    """
    made: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Attention":
            continue
        query, _, _, mask = node.inputs[:4]
        assert query is not None and query.dtype is not None and mask is not None  # noqa: S101 -- all are traced so
        if mask.dtype == query.dtype:
            continue
        if mask not in made:
            lowest = constant(graph, "masks.lowest", np.array(LOWEST[query.dtype], np.float32))
            held = insert(graph, node, "Max", [mask, lowest], ir.DataType.FLOAT)
            made[mask] = insert(graph, node, "Cast", [held], query.dtype, {"to": query.dtype})
            made[mask].shape = mask.shape
        node.replace_input_with(ATTENTION_INPUTS, made[mask])
