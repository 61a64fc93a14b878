"""Fuses rotary embeddings (RoPE) that the exporter leaves decomposed into one RotaryEmbedding operator each.

torch.onnx exports rotary embeddings of whole heads (Llama) as one operator already. Two other kinds stay decomposed:
those of the first elements of each head (Phi-3, GPT-NeoX) and those that rotate neighbouring elements (Cohere).
RotaryEmbedding supports both with attributes, so later rewrites need to know one operator only. Shapes: B sequences,
T nodes, D elements per head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern

from medusa_exporter.graph.edit import SLICE_END, constant, int_attribute, producer_of_type

if TYPE_CHECKING:
    from collections.abc import Callable

SWAP_HEADS = (0, 2, 1, 3)  # (B, T, heads, D) <-> (B, heads, T, D)
LAST_AXIS = 3  # of (B, heads, T, D)
ANY = pattern.ANY_VALUE


def fuse_rotary_embeddings(model: ir.Model) -> None:
    """Replace each decomposed rotary embedding by one RotaryEmbedding, in place. Heads stay the second axis."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Split":
            _split_before_transpose(graph, node)
    # These rules take 0.1 s for 30 layers; loops over the nodes took 0.01 s and twice the code.
    rules = [_rule(_partial, _fuse_partial, _is_partial), _rule(_interleaved, _fuse_interleaved, _is_interleaved)]
    pattern.RewriteRuleSet(rules, commute=True).apply_to_model(model)


def swaps_heads(transpose: ir.Node) -> bool:
    """Return whether a Transpose exchanges the axes of nodes and heads."""
    permutation = transpose.attributes.get("perm")
    return permutation is not None and tuple(permutation.as_ints()) == SWAP_HEADS


def _rule(target: Callable[..., Any], replacement: Callable[..., Any], check: Callable[..., bool]) -> Any:
    """Return a rewrite rule that keeps the matched nodes: cosines and sines are shared by all layers."""
    return pattern.RewriteRule(target, replacement, check, remove_nodes=False)


def _partial(op: Any, whole: Any, cos: Any, sin: Any, size: Any, rest: Any, end: Any) -> Any:
    """Match a rotary embedding of the first `size` elements of each head, joined with the other elements."""
    first = op.Slice(whole, [0], size, [LAST_AXIS], [1])
    rotated = op.RotaryEmbedding(first, cos, sin, _allow_other_attributes=True, _outputs=["rotated"])
    return op.Concat(rotated, op.Slice(whole, rest, end, [LAST_AXIS], [1]), axis=-1)


def _is_partial(_context: Any, whole: ir.Value, size: ir.Value, rest: ir.Value, end: ir.Value, **_others: Any) -> bool:
    width = None if whole.shape is None else whole.shape[-1]
    return isinstance(width, int) and _integer(size) == _integer(rest) and _integer(end) >= width


def _fuse_partial(
    op: Any, whole: ir.Value, cos: ir.Value, sin: ir.Value, size: ir.Value, rotated: ir.Value, **_others: Any
) -> ir.Value:
    attributes = {name: one.value for name, one in rotated.producer().attributes.items()}  # type: ignore[union-attr]
    fused: ir.Value = op.RotaryEmbedding(whole, cos, sin, **attributes, rotary_embedding_dim=_integer(size))
    return fused


def _interleaved(op: Any, rows: Any, cos: Any, sin: Any) -> Any:
    """Match (x0, x1, x2, x3, ...) * cos + (-x1, x0, -x3, x2, ...) * sin."""
    odd, even = (op.Slice(rows, [first], [SLICE_END], [LAST_AXIS], [2]) for first in (1, 0))
    swapped = op.Reshape(op.Concat(op.Unsqueeze(op.Neg(odd), ANY), op.Unsqueeze(even, ANY), axis=-1), ANY)
    return op.Add(op.Mul(rows, op.Unsqueeze(cos, ANY)), op.Mul(swapped, op.Unsqueeze(sin, ANY)))


def _is_interleaved(_context: Any, rows: ir.Value, cos: ir.Value, sin: ir.Value) -> bool:
    angles = producer_of_type(cos, "Cos"), producer_of_type(sin, "Sin")
    return None not in angles and rows.shape is not None and isinstance(rows.shape[1], int)


def _fuse_interleaved(op: Any, rows: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    """Cosines and sines (B, T, D) hold each angle twice; the operator reads (B, T, D / 2)."""

    def every_second(angles: ir.Value) -> ir.Value:
        graph = angles.graph
        assert graph is not None  # noqa: S101 -- an output of a node of the graph
        start, end, two = (constant(graph, f"ropes.{one}", np.array([one])) for one in (0, SLICE_END, 2))
        half: ir.Value = op.Slice(angles, start, end, two, two)  # axis 2, step 2
        half.type = angles.type
        return half

    assert rows.shape is not None  # noqa: S101 -- `_is_interleaved` has checked it
    fused: ir.Value = op.RotaryEmbedding(
        rows, every_second(cos), every_second(sin), interleaved=1, num_heads=rows.shape[1]
    )
    return fused


def _integer(value: ir.Value) -> int:
    """Return the only element of an integer constant; -1 if the value is not constant."""
    tensor = value.const_value
    return -1 if tensor is None else int(tensor.numpy().item())


# Not a pattern rule: how many outputs the Split has, and which of them are transposed back, varies.
def _split_before_transpose(graph: ir.Graph, split: ir.Node) -> None:
    """Turn Transpose (B, T, heads, 3 D) -> Split into Split -> Transposes, so that each part has its own rows."""
    transpose = producer_of_type(split.inputs[0], "Transpose")
    if transpose is None or not swaps_heads(transpose) or int_attribute(split, "axis") not in (-1, LAST_AXIS):
        return
    rows = transpose.inputs[0]
    assert rows is not None  # noqa: S101 -- a Transpose has an input
    new = ir.node("Split", [rows, *split.inputs[1:]], attributes=split.attributes, num_outputs=len(split.outputs))
    graph.insert_before(split, new)
    for old, part in zip(split.outputs, new.outputs, strict=True):
        part.type = old.type
        if old.shape is not None:
            part.shape = ir.Shape([old.shape[axis] for axis in SWAP_HEADS])
        for back in [node for node in old.consumers() if node.op_type == "Transpose" and swaps_heads(node)]:
            ir.convenience.replace_all_uses_with(back.outputs[0], part, replace_graph_outputs=True)
        heads_first = ir.node("Transpose", [part], attributes={"perm": SWAP_HEADS})
        heads_first.outputs[0].type, heads_first.outputs[0].shape = old.type, old.shape
        graph.insert_before(split, heads_first)
        ir.convenience.replace_all_uses_with(old, heads_first.outputs[0])
