"""Skips the draft where a step has none: plain decoding and prompts run no head.

As traced, the heads run on no rows then. That computes nothing, but ONNX Runtime takes some microseconds for each of
some 80 operators, 1 to 3% of a plain step. Here they become the branch of one `If`; the other branch returns the ids.
"""

from __future__ import annotations

import onnx_ir as ir
from medusa_runtime import contract

from medusa_exporter.graph.edit import insert

BOOL, INT64 = ir.DataType.BOOL, ir.DataType.INT64


def skip_empty_draft(model: ir.Model) -> None:
    """Move the operators that only `tokens` is computed from into a branch, in place.

    Nothing is changed if other operators read one of their results. The weights stay in the graph around the branch.
    """
    graph = model.graph
    [tokens] = [value for value in graph.outputs if value.name == contract.TOKENS]
    inputs = {value.name: value for value in graph.inputs}
    ids, hidden = inputs[contract.INPUT_IDS], inputs[contract.DRAFT_HIDDEN]
    drafting = _drafting(graph, tokens, {ids, hidden})
    inside = set(drafting)
    results = [value for node in drafting for value in node.outputs if value is not tokens]
    if not drafting or any(value.is_graph_output() or set(value.consumers()) - inside for value in results):
        return
    first = graph[0]
    rows = insert(graph, first, "Shape", [hidden], INT64, {"start": 0, "end": 1})
    some = insert(graph, first, "Squeeze", [insert(graph, first, "Cast", [rows], BOOL, {"to": BOOL})], BOOL)
    literal = ir.node("Identity", [ids])
    literal.outputs[0].name, literal.outputs[0].type = f"{contract.TOKENS}_literal", ids.type
    chosen = ir.node("If", [some])
    chosen.outputs[0].type, chosen.outputs[0].shape = tokens.type, tokens.shape
    graph.insert_before(drafting[0], chosen)
    ir.convenience.replace_all_uses_with(tokens, chosen.outputs[0], replace_graph_outputs=True)
    graph.remove(drafting)
    tokens.name, chosen.outputs[0].name = f"{contract.TOKENS}_drafted", contract.TOKENS
    chosen.attributes["then_branch"] = ir.AttrGraph("then_branch", ir.Graph([], [tokens], nodes=drafting, name="draft"))
    other = ir.Graph([], literal.outputs, nodes=[literal], name="no_draft")
    chosen.attributes["else_branch"] = ir.AttrGraph("else_branch", other)
    graph.sort()


def _drafting(graph: ir.Graph, tokens: ir.Value, inputs: set[ir.Value]) -> list[ir.Node]:
    """Return the nodes on the way from the inputs to `tokens`, in the graph's order; without those of constants."""
    depending: set[ir.Value] = set(inputs)
    on_the_way = []
    for node in graph:
        if depending.intersection(node.inputs):
            depending.update(node.outputs)
            on_the_way.append(node)
    needed, kept = {tokens}, []
    for node in reversed(on_the_way):
        if needed.intersection(node.outputs):
            needed.update(value for value in node.inputs if value is not None)
            kept.append(node)
    return kept[::-1]
