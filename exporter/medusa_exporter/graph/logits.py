"""Logits where a step wants them, without a copy: for one sequence the rows of a graph need not be laid flat and back.

As traced the rows of all sequences lie one behind the other, so that an index may choose among them, and what the
lm_head gives is laid out by sequence again: on a GPU a copy of all logits, since they are an output.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from medusa_runtime import contract
from onnx_ir.passes import common

from medusa_exporter.graph.edit import ORT_DOMAIN, constant, insert

ELEMENTWISE = ("Mul", "Div", "Tanh")  # what families do to logits: a scale, a cap


def single_sequence_logits(model: ir.Model) -> None:
    """Rewrite, in place, the end of a graph for one sequence: hidden (1, T, H) -> logits (1, R, V) in one product."""
    graph = model.graph
    graph.opset_imports[ORT_DOMAIN] = 1
    [logits] = [value for value in graph.outputs if value.name == contract.LOGITS]
    [wanted] = [value for value in graph.inputs if value.name == contract.LOGIT_ROWS]
    end = _maker(logits, "Reshape").inputs[0]  # of the product, or of what scales or caps it
    product = _product(end)
    chosen = _maker(product.inputs[0], "Gather")
    hidden = _maker(chosen.inputs[0], "Reshape").inputs[0]
    assert hidden is not None and hidden.dtype is not None  # noqa: S101 -- typed before
    rows = insert(
        graph, product, "Reshape", [wanted, constant(graph, "logits.flat", np.array([-1]))], ir.DataType.INT32
    )
    picked = insert(graph, product, "Gather", [hidden, rows], hidden.dtype, {"axis": 1})  # (1, R, H)
    new = ir.node("FusedMatMul", [picked, product.inputs[1]], attributes={"transB": 1}, domain=ORT_DOMAIN)
    graph.insert_before(product, new)
    result = new.outputs[0]
    result.type = logits.type
    if len(product.inputs) > 2 and product.inputs[2] is not None:
        result = insert(graph, product, "Add", [result, product.inputs[2]], hidden.dtype)
    if end is not product.outputs[0]:
        ir.convenience.replace_all_uses_with(product.outputs[0], result)
        assert end is not None  # noqa: S101 -- `_product` has walked from it
        for value in [result, *_between(end, result)]:
            value.shape = logits.shape
        result = end
    result.shape, result.name, logits.name = logits.shape, contract.LOGITS, f"{contract.LOGITS}_flat"
    ir.convenience.replace_all_uses_with(logits, result, replace_graph_outputs=True)
    common.RemoveUnusedNodesPass()(model)


def _product(end: ir.Value | None) -> ir.Node:
    """The lm_head's product that `end` comes of: itself, or through operators on each element alone."""
    node = None if end is None else end.producer()
    while node is not None and node.op_type in ELEMENTWISE:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or node.op_type != "Gemm":
        raise RuntimeError(f"{end} comes of {node}, expected a Gemm on the way to the logits")
    return node


def _between(end: ir.Value, start: ir.Value) -> list[ir.Value]:
    """The values from `end` back to `start`, which is left out."""
    found, value = [], end
    while value is not start:
        found.append(value)
        node = value.producer()
        assert node is not None and node.inputs[0] is not None  # noqa: S101 -- `_product` has walked here
        value = node.inputs[0]
    return found


def _maker(value: ir.Value | None, op_type: str) -> ir.Node:
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type:
        raise RuntimeError(f"{value} comes of {node}, expected a {op_type} on the way to the logits")
    return node
