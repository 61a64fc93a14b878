"""Fixes the sizes of a step, for devices that need static shapes: no computation on shapes is left in the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from medusa_runtime.contract import DRAFT_HIDDEN, INPUT_IDS, TOKENS
from onnx_ir.passes import common
from onnxscript import optimizer
from onnxscript.rewriter import pattern

from medusa_exporter.graph.cleanup import strip_metadata
from medusa_exporter.graph.edit import constant
from medusa_exporter.library_logging import log_errors_only


def freeze_shapes(model: ir.Model, sizes: Mapping[str, int]) -> ir.Model:
    """Return a copy of the graph whose steps have these sizes; weights are shared, not copied.

    All heads of the graph must run (see `run_all_heads`).

    Args:
        model: A graph with the contract's symbolic dimensions.
        sizes: The sizes of B, T, R and N. Without P, it stays symbolic. If N is 0, no head runs: `tokens` is
            `input_ids`, and the input `draft_hidden` is removed.
    """
    frozen = model.clone()
    graph = frozen.graph
    if not sizes["N"]:
        remove_draft(graph)
        common.RemoveUnusedNodesPass()(frozen)
    for value in (*graph.inputs, *graph.outputs):
        value.shape = None if value.shape is None else ir.Shape([_size(one, sizes) for one in value.shape])
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None  # it has symbolic dimensions of the trace; the fixed shape is inferred below
    before = set(graph.initializers)
    _fold_constants(frozen)
    for index, name in enumerate([name for name in graph.initializers if name not in before]):
        graph.initializers[name].name = f"fixed.{index}"  # `strip_metadata` renames the outputs of nodes only
    strip_metadata(frozen)
    return frozen


def _size(size: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int | ir.SymbolicDim:
    return size if isinstance(size, int) or size.value is None else sizes.get(size.value, size)


def _heads_used(op: Any, candidates: Any, first_candidates: Any) -> Any:
    """Match how `Step` counts the heads that a tree uses: one, and one more for each whose candidates it reaches."""
    reached = op.GreaterOrEqual(op.ReduceMax(candidates), first_candidates)
    return op.Add(op.ReduceSum(op.Cast(reached)), pattern.ANY_VALUE)


_HEADS_USED = pattern.Pattern(_heads_used)


def run_all_heads(model: ir.Model, heads: int) -> None:
    """Let all heads run, in place.

    As traced, a graph with several heads runs only those whose candidates are in the tree. Their number depends on the
    values of `input_ids`, and a graph of fixed shapes must not depend on values.
    """
    graph = model.graph
    counts = [
        node.outputs[0]
        for node in graph
        if node.op_type == "Add" and _HEADS_USED.match(model, graph, node, check_nodes_are_removable=False)
    ]
    if not counts and heads <= 1:
        return
    if len(counts) != 1:
        raise RuntimeError(f"the traced graph counts the heads that a tree uses {len(counts)} times, expected once")
    all_heads = constant(graph, "fixed.heads", np.array(heads, dtype=np.int64))
    ir.convenience.replace_all_uses_with(counts[0], all_heads)
    common.RemoveUnusedNodesPass()(model)


def remove_draft(graph: ir.Graph) -> None:
    """Remove the heads, in place: `tokens` becomes a copy of `input_ids`, and the input `draft_hidden` is removed."""
    inputs = {value.name: value for value in graph.inputs}
    [tokens] = [value for value in graph.outputs if value.name == TOKENS]
    ids = inputs[INPUT_IDS]
    same = ir.node("Identity", [ids])
    same.outputs[0].type, same.outputs[0].shape, same.outputs[0].name = tokens.type, tokens.shape, TOKENS
    graph.insert_before(graph[0], same)
    for use in list(tokens.uses()):
        use.node.replace_input_with(use.idx, ids)
    graph.outputs[list(graph.outputs).index(tokens)] = same.outputs[0]
    tokens.name = f"{TOKENS}_drafted"
    graph.inputs.remove(inputs[DRAFT_HIDDEN])


def _fold_constants(model: ir.Model) -> None:
    """Compute everything that no longer depends on an input; the results become initializers."""
    with log_errors_only("onnxscript.optimizer"):
        optimizer.fold_constants(model, onnx_shape_inference=True)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )(model)
