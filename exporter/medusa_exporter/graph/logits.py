"""Writes the logits of a single sequence without a copy.

As traced, the rows of all sequences are flattened so that one index can select among them, and the lm_head's result is
reshaped to sequences again. That last reshape is a copy of all logits, because they are an output. With one sequence
there is nothing to flatten.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from medusa_runtime import contract
from onnx_ir.passes import common

from medusa_exporter.graph.edit import ORT_DOMAIN, constant, insert, replace

ELEMENTWISE = ("Mul", "Div", "Tanh")  # how some families scale or cap logits


# Not a pattern rule: how many elementwise operators follow the lm_head differs between families.
def single_sequence_logits(model: ir.Model) -> None:
    """Rewrite the end of a graph for one sequence, in place: one multiplication from `hidden` to `logits` (1, R, V).

    Raises:
        RuntimeError: The logits are computed in another way than `Step` does.
    """
    graph = model.graph
    graph.opset_imports[ORT_DOMAIN] = 1
    [logits] = [value for value in graph.outputs if value.name == contract.LOGITS]
    [logit_rows] = [value for value in graph.inputs if value.name == contract.LOGIT_ROWS]
    end = _producer(logits, "Reshape").inputs[0]  # the lm_head's result, or what scales or caps it
    lm_head = _lm_head(end)
    selected = _producer(lm_head.inputs[0], "Gather")
    hidden = _producer(selected.inputs[0], "Reshape").inputs[0]
    assert hidden is not None and hidden.dtype is not None  # noqa: S101 -- `cast_precision` has set it
    flat = constant(graph, "logits.flat", np.array([-1]))
    rows = insert(graph, lm_head, "Reshape", [logit_rows, flat], ir.DataType.INT32)
    picked = insert(graph, lm_head, "Gather", [hidden, rows], hidden.dtype, {"axis": 1})  # (1, R, H)
    new = ir.node("FusedMatMul", [picked, lm_head.inputs[1]], attributes={"transB": 1}, domain=ORT_DOMAIN)
    graph.insert_before(lm_head, new)
    result = new.outputs[0]
    result.type = logits.type
    if len(lm_head.inputs) > 2 and lm_head.inputs[2] is not None:
        result = insert(graph, lm_head, "Add", [result, lm_head.inputs[2]], hidden.dtype)
    if end is not lm_head.outputs[0]:
        ir.convenience.replace_all_uses_with(lm_head.outputs[0], result)
        assert end is not None  # noqa: S101 -- `_lm_head` has followed it
        for value in [result, *_between(end, result)]:
            value.shape = logits.shape
        result = end
    result.shape, result.name, logits.name = logits.shape, contract.LOGITS, f"{contract.LOGITS}_flat"
    ir.convenience.replace_all_uses_with(logits, result, replace_graph_outputs=True)
    common.RemoveUnusedNodesPass()(model)


def single_sequence_rows(model: ir.Model) -> None:
    """Select rows of one sequence for the lm_head of a CPU graph, in place: (1, R, H) in place of (R, H).

    All operators between the rows and the logits must accept rows of any rank, as quantised ones do. A Gemm does not:
    then only the index becomes simpler.

    Raises:
        RuntimeError: The logits are computed in another way than `Step` does.
    """
    graph = model.graph
    [logits] = [value for value in graph.outputs if value.name == contract.LOGITS]
    [logit_rows] = [value for value in graph.inputs if value.name == contract.LOGIT_ROWS]
    end = _producer(logits, "Reshape").inputs[0]
    selected, kinds = end, []
    while (node := None if selected is None else selected.producer()) is not None and node.op_type != "Gather":
        kinds.append(node.op_type)
        selected = node.inputs[0]
    gather = _producer(selected, "Gather")
    flat = _producer(gather.inputs[0], "Reshape")
    hidden = flat.inputs[0]
    assert end is not None and hidden is not None and hidden.dtype is not None  # noqa: S101 -- followed above
    rows = insert(
        graph, gather, "Reshape", [logit_rows, constant(graph, "logits.flat", np.array([-1]))], ir.DataType.INT32
    )
    if "Gemm" in kinds:
        gather.replace_input_with(1, rows)
    else:
        picked = insert(graph, gather, "Gather", [hidden, rows], hidden.dtype, {"axis": 1})
        ir.convenience.replace_all_uses_with(gather.outputs[0], picked)
        for value in _between(end, picked):
            value.shape = None
        replace(logits, end)
    common.RemoveUnusedNodesPass()(model)


def _lm_head(end: ir.Value | None) -> ir.Node:
    """Return the lm_head's Gemm, which computes `end` directly or followed by elementwise operators."""
    node = None if end is None else end.producer()
    while node is not None and node.op_type in ELEMENTWISE:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or node.op_type != "Gemm":
        raise RuntimeError(f"{end} is computed by {node}, expected a Gemm on the way to the logits")
    return node


def _between(end: ir.Value, start: ir.Value) -> list[ir.Value]:
    """Return the values from `end` back to `start`, without `start`."""
    values, value = [], end
    while value is not start:
        values.append(value)
        node = value.producer()
        assert node is not None and node.inputs[0] is not None  # noqa: S101 -- `_lm_head` has followed it
        value = node.inputs[0]
    return values


def _producer(value: ir.Value | None, op_type: str) -> ir.Node:
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type:
        raise RuntimeError(f"{value} is computed by {node}, expected a {op_type} on the way to the logits")
    return node
