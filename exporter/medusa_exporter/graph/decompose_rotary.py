"""Ropes spelt out in ONNX's primitives, in fp32: of whole heads or their first elements, of halves or neighbours."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_exporter.graph.edit import SLICE_END, NodeBuilder, constant
from medusa_exporter.graph.rotary_fusion import number

FLOAT = ir.DataType.FLOAT


class RotaryFactors:
    """What ropes multiply columns by: cosines and sines (B, T, D / 2) of a step's nodes, in the order of each rope."""

    def __init__(self, add: NodeBuilder, cos: ir.Value, sin: ir.Value) -> None:
        self._add, self._cos, self._sin = add, cos, sin
        self._made: dict[bool, tuple[ir.Value, ir.Value]] = {}

    def of(self, rope: ir.Node) -> tuple[ir.Value, ir.Value]:
        """Factors (B, T, 1, D) of a column, and of the one that it turns against."""
        interleaved = bool(number(rope, "interleaved"))
        if interleaved not in self._made:
            pairs = (self._cos, self._cos), (self._add("Neg", self._sin), self._sin)
            along, across = (self._pair(*pair, interleaved=interleaved) for pair in pairs)
            self._made[interleaved] = along, across
        return self._made[interleaved]

    def _pair(self, first: ir.Value, second: ir.Value, *, interleaved: bool) -> ir.Value:
        add = self._add
        if not interleaved:
            return add("Unsqueeze", add("Concat", first, second, axis=-1), add.ints(2))
        stacked = add("Concat", *(add("Unsqueeze", one, add.ints(3)) for one in (first, second)), axis=-1)
        return add("Unsqueeze", add.reshape(stacked, 0, 0, -1), add.ints(2))  # (B, T, D / 2, 2) -> (B, T, 1, D)


def turn(graph: ir.Graph, node: ir.Node, along: ir.Value, across: ir.Value) -> None:
    """Rope over rows (B, T, H * D), in fp32; angles (B, T, 1, D), of the elements of a head that turn.

    The halves of a head turn against each other, or neighbouring elements. What each turns against is the row by its
    own columns in another order: slices that are joined again would be copies.
    """
    add, rows = NodeBuilder(graph, node), node.inputs[0]
    if len(node.inputs) > 3:
        raise RuntimeError(f"rope {node.name} reads tables of its own, expected cosines and sines of the step")
    assert rows is not None and rows.dtype is not None and rows.shape is not None  # noqa: S101
    heads, width, interleaved = number(node, "num_heads"), rows.shape[-1], number(node, "interleaved")
    assert isinstance(width, int)  # noqa: S101 -- a product with a weight has a known width
    size = width // heads
    part = number(node, "rotary_embedding_dim") or size
    whole = add.reshape(add.cast(rows, FLOAT), 0, 0, heads, size)
    exact = whole if part == size else add.slice(whole, 0, part)
    order = np.arange(part, dtype=np.int64)
    order = order ^ 1 if interleaved else np.roll(order, part // 2)
    swapped = constant(graph, f"swapped.{part}.{interleaved}", order)
    turned = add("Add", add("Mul", exact, along), add("Mul", add("Gather", exact, swapped, axis=-1), across))
    if part != size:
        turned = add("Concat", turned, add.slice(whole, part, SLICE_END), axis=-1)
    add.replace(add.cast(add.reshape(turned, 0, 0, width), rows.dtype))
