"""Ropes that the tracer leaves spelt out, made one operator each: of a part of each head, or of neighbouring elements.

Phi-3 and GPT-NeoX turn the first elements of a head alone, Cohere turns each even element against the odd one behind
it. RotaryEmbedding does both by its attributes, so all that comes later knows one operator. Shapes: B sequences, T
nodes, D elements of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from medusa_exporter.graph.edit import constant, only_consumer

TO_HEADS_FIRST = (0, 2, 1, 3)  # (B, T, heads, D) <-> (B, heads, T, D)
LAST = 3  # axis of a head's elements


def fuse_rotary_embeddings(graph: ir.Graph) -> None:
    """Make one RotaryEmbedding of each rope, in place; heads stand first, as traced."""
    for node in list(graph):
        if node.op_type == "Split":
            _split_rows(graph, node)
    for node in list(graph):
        if node.op_type == "RotaryEmbedding":
            _join_partial(graph, node)
        elif node.op_type == "Add":
            _join_interleaved(graph, node)


def is_plain(rope: ir.Node) -> bool:
    """Whether a RotaryEmbedding turns whole heads, one half against the other."""
    return not number(rope, "interleaved") and not number(rope, "rotary_embedding_dim")


def number(node: ir.Node, name: str, default: int = 0) -> int:
    """A node's attribute, a whole number."""
    return node.attributes[name].as_int() if name in node.attributes else default


def _split_rows(graph: ir.Graph, split: ir.Node) -> None:
    """Transpose (B, T, heads, 3 D) -> Split becomes Split -> Transposes, so that each part comes of rows of its own."""
    transpose = producer(split.inputs[0], "Transpose")
    if transpose is None or not swaps_heads(transpose) or number(split, "axis") not in (-1, LAST):
        return
    rows = transpose.inputs[0]
    assert rows is not None  # noqa: S101 -- a Transpose has an input
    new = ir.node("Split", [rows, *split.inputs[1:]], attributes=split.attributes, num_outputs=len(split.outputs))
    graph.insert_before(split, new)
    for old, part in zip(split.outputs, new.outputs, strict=True):
        part.type = old.type
        if old.shape is not None:
            part.shape = ir.Shape([old.shape[axis] for axis in TO_HEADS_FIRST])
        for back in [node for node in old.consumers() if node.op_type == "Transpose" and swaps_heads(node)]:
            ir.convenience.replace_all_uses_with(back.outputs[0], part, replace_graph_outputs=True)
        turned = ir.node("Transpose", [part], attributes={"perm": TO_HEADS_FIRST})
        turned.outputs[0].type, turned.outputs[0].shape = old.type, old.shape
        graph.insert_before(split, turned)
        ir.convenience.replace_all_uses_with(old, turned.outputs[0])


def _join_partial(graph: ir.Graph, rope: ir.Node) -> None:
    """Concat of a turned Slice and the Slice behind it becomes a rope of a part of each head."""
    first, concat = producer(rope.inputs[0], "Slice"), only_consumer(rope.outputs[0], "Concat")
    rest = None if concat is None or len(concat.inputs) != 2 else producer(concat.inputs[1], "Slice")
    if first is None or concat is None or rest is None or concat.inputs[0] is not rope.outputs[0]:
        return
    whole = first.inputs[0]
    if whole is None or whole is not rest.inputs[0] or whole.shape is None or _range(first) is None:
        return
    (start, size), behind = _range(first) or (0, 0), _range(rest)
    width = whole.shape[-1]
    if start or behind is None or behind[0] != size or not isinstance(width, int) or behind[1] < width:
        return
    new = ir.node("RotaryEmbedding", [whole, *rope.inputs[1:]], attributes=rope.attributes)
    new.attributes.add(ir.AttrInt64("rotary_embedding_dim", size))
    _put(graph, concat, new)


def _join_interleaved(graph: ir.Graph, total: ir.Node) -> None:
    """X * cos + (-odd, even) * sin becomes a rope of neighbouring elements.

    Cosines and sines (B, T, D) hold each angle twice; the operator wants them once.
    """
    products = [producer(value, "Mul") for value in total.inputs]
    by_angle = [None if product is None else _angles(product) for product in products]
    kinds = [None if found is None else found[1].op_type for found in by_angle]
    if sorted(map(str, kinds)) != ["Cos", "Sin"]:
        return
    (rows, cos), (swapped, sin) = (found for _, found in sorted(zip(map(str, kinds), by_angle, strict=True)) if found)
    if not _is_swapped(swapped, rows):
        return
    halves = [_every_second(graph, total, angles.outputs[0]) for angles in (cos, sin)]
    heads = None if rows.shape is None else rows.shape[1]
    if not isinstance(heads, int):
        return
    new = ir.node("RotaryEmbedding", [rows, *halves], attributes={"interleaved": 1, "num_heads": heads})
    _put(graph, total, new)


def _angles(product: ir.Node) -> tuple[ir.Value, ir.Node] | None:
    """What a product turns by cosines or sines that are alike for all heads, and the node that these come from."""
    for rows, other in (product.inputs, reversed(product.inputs)):
        spread = producer(other, "Unsqueeze")
        made = None if spread is None or spread.inputs[0] is None else spread.inputs[0].producer()
        if rows is not None and made is not None and made.op_type in ("Cos", "Sin"):
            return rows, made
    return None


def _is_swapped(value: ir.Value, rows: ir.Value) -> bool:
    """Whether a value is (-odd, even, …) of rows: stacked along a new last axis and joined."""
    stack = producer(_input(producer(value, "Reshape")), "Concat")
    if stack is None or len(stack.inputs) != 2:
        return False
    odd, even = (_input(producer(part, "Unsqueeze")) for part in stack.inputs)
    for part, first in ((_input(producer(odd, "Neg")), 1), (even, 0)):
        taken = producer(part, "Slice")
        found = None if taken is None or taken.inputs[0] is not rows else _slice(taken)
        if found is None or (found[0], found[2], found[3]) != (first, LAST, 2):
            return False
    return True


def _every_second(graph: ir.Graph, before: ir.Node, angles: ir.Value) -> ir.Value:
    """(B, T, D) -> (B, T, D / 2)."""
    inputs = [constant(graph, f"ropes.{one}", np.array([one])) for one in (0, np.iinfo(np.int64).max, 2)]
    node = ir.node("Slice", [angles, *inputs, inputs[2]])  # axis 2, in steps of 2
    node.outputs[0].type = angles.type
    graph.insert_before(before, node)
    return node.outputs[0]


def _put(graph: ir.Graph, end: ir.Node, new: ir.Node) -> None:
    """Let `new` give what `end` gave."""
    old = end.outputs[0]
    new.outputs[0].type, new.outputs[0].shape = old.type, old.shape
    graph.insert_before(end, new)
    ir.convenience.replace_all_uses_with(old, new.outputs[0], replace_graph_outputs=True)


def _range(node: ir.Node) -> tuple[int, int] | None:
    """Start and end of a Slice along the last axis, if that is all it does."""
    found = _slice(node)
    return found[:2] if found is not None and found[2:] in ((LAST, 1), (-1, 1)) else None


def _slice(node: ir.Node) -> tuple[int, int, int, int] | None:
    """Start, end, axis and step of a Slice of one axis; None where they are not known."""
    given: Sequence[ir.Value | None] = node.inputs[1:]
    tensors = [None if value is None else value.const_value for value in given]
    if len(tensors) < 3 or any(tensor is None or tensor.size != 1 for tensor in tensors):
        return None
    found = [int(tensor.numpy().item()) for tensor in tensors if tensor is not None]
    start, end, axis, step = (*found, 1)[:4]
    return start, end, axis, step


def _input(node: ir.Node | None) -> ir.Value | None:
    return None if node is None else node.inputs[0]


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node that gives a value, if it is of that type."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def swaps_heads(transpose: ir.Node) -> bool:
    """Whether a Transpose brings heads in front of nodes, or back."""
    permutation = transpose.attributes.get("perm")
    return permutation is not None and tuple(permutation.as_ints()) == TO_HEADS_FIRST
