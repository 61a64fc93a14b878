"""Logits where a step wants them, without a copy: for one sequence the rows of a graph need not be laid flat and back.

As traced the rows of all sequences lie one behind the other, so that an index may choose among them, and what the
lm_head gives is laid out by sequence again: on a GPU a copy of all logits, since they are an output.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from medusa_runtime import contract
from onnx_ir.passes import common

from medusa_exporter.graph.edit import DOMAIN, constant, insert


def straight_logits(model: ir.Model) -> None:
    """Rewrite, in place, the end of a graph for one sequence: hidden (1, T, H) -> logits (1, R, V) in one product."""
    graph = model.graph
    graph.opset_imports[DOMAIN] = 1
    [logits] = [value for value in graph.outputs if value.name == contract.LOGITS]
    [wanted] = [value for value in graph.inputs if value.name == contract.LOGIT_ROWS]
    product = _maker(_maker(logits, "Reshape").inputs[0], "Gemm")
    chosen = _maker(product.inputs[0], "Gather")
    hidden = _maker(chosen.inputs[0], "Reshape").inputs[0]
    assert hidden is not None and hidden.dtype is not None  # noqa: S101 -- typed before
    rows = insert(
        graph, product, "Reshape", [wanted, constant(graph, "logits.flat", np.array([-1]))], ir.DataType.INT32
    )
    picked = insert(graph, product, "Gather", [hidden, rows], hidden.dtype, {"axis": 1})  # (1, R, H)
    new = ir.node("FusedMatMul", [picked, product.inputs[1]], attributes={"transB": 1}, domain=DOMAIN)
    graph.insert_before(product, new)
    result = new.outputs[0]
    result.type = logits.type
    if len(product.inputs) > 2 and product.inputs[2] is not None:
        result = insert(graph, product, "Add", [result, product.inputs[2]], hidden.dtype)
    result.shape, result.name, logits.name = logits.shape, contract.LOGITS, f"{contract.LOGITS}_flat"
    ir.convenience.replace_all_uses_with(logits, result, replace_graph_outputs=True)
    common.RemoveUnusedNodesPass()(model)


def _maker(value: ir.Value | None, op_type: str) -> ir.Node:
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type:
        raise RuntimeError(f"{value} comes of {node}, expected a {op_type} on the way to the logits")
    return node
