"""Fixes the sizes of a step, for devices that want to know them beforehand: no work on shapes is left in the graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from medusa_runtime.contract import DRAFT_HIDDEN, INPUT_IDS, TOKENS
from onnx_ir.passes import common

from medusa_exporter.graph.cleanup import strip_metadata
from medusa_exporter.graph.edit import constant
from medusa_exporter.library_logging import log_errors_only


def freeze_shapes(model: ir.Model, sizes: Mapping[str, int]) -> ir.Model:
    """Return a copy, for steps of these sizes, of a graph in which all heads run; it shares the tensors.

    sizes: of the contract's dimensions B, T, R and N; P may be left out and stays symbolic. Where N is 0 no head runs,
    `tokens` is `input_ids`, and `draft_hidden` is gone from the inputs.
    """
    found = model.clone()
    graph = found.graph
    if not sizes["N"]:
        remove_draft(graph)
        common.RemoveUnusedNodesPass()(found)
    for value in (*graph.inputs, *graph.outputs):
        value.shape = None if value.shape is None else ir.Shape([_size(one, sizes) for one in value.shape])
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None  # the tracer's names for sizes; what they are now is inferred
    before = set(graph.initializers)
    _fold(found)
    for index, name in enumerate([name for name in graph.initializers if name not in before]):
        graph.initializers[name].name = f"fixed.{index}"  # those of nodes are given anew
    strip_metadata(found)
    return found


def _size(size: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int | ir.SymbolicDim:
    return size if isinstance(size, int) or size.value is None else sizes.get(size.value, size)


def run_all_heads(model: ir.Model, heads: int) -> None:
    """Let all heads run, in place: how many the tree uses is counted from its numbers, on which no shape may depend."""
    graph = model.graph
    largest = [node for node in graph if node.op_type == "ReduceMax"]
    if not largest and heads == 1:
        return
    if len(largest) != 1:
        raise RuntimeError(f"{len(largest)} maxima in the traced graph, expected the one of the tree's candidates")
    value = largest[0].outputs[0]
    for op_type in ("GreaterOrEqual", "Cast", "ReduceSum", "Add"):
        [node] = [use for use in value.consumers() if use.op_type == op_type]
        value = node.outputs[0]
    ir.convenience.replace_all_uses_with(value, constant(graph, "fixed.heads", np.array(heads, dtype=np.int64)))
    common.RemoveUnusedNodesPass()(model)


def remove_draft(graph: ir.Graph) -> None:
    """Leave the draft out, in place: all tokens are literal, and `draft_hidden` is no input any more."""
    given = {value.name: value for value in graph.inputs}
    [tokens] = [value for value in graph.outputs if value.name == TOKENS]
    ids = given[INPUT_IDS]
    same = ir.node("Identity", [ids])
    same.outputs[0].type, same.outputs[0].shape, same.outputs[0].name = tokens.type, tokens.shape, TOKENS
    graph.insert_before(graph[0], same)
    for use in list(tokens.uses()):
        use.node.replace_input_with(use.idx, ids)
    graph.outputs[list(graph.outputs).index(tokens)] = same.outputs[0]
    tokens.name = f"{TOKENS}_drafted"
    graph.inputs.remove(given[DRAFT_HIDDEN])


def _fold(model: ir.Model) -> None:
    """Compute what is known now; constants become initializers."""
    from onnxscript import optimizer

    with log_errors_only("onnxscript.optimizer"):
        optimizer.fold_constants(model, onnx_shape_inference=True)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )(model)
