"""Decomposes RotaryEmbedding (RoPE) into primitive operators, in fp32.

Each element is multiplied by a cosine, and the element that it is paired with by a sine:

    y = x * along + partner(x) * across

For a head of D = 4 elements (a, b, c, d) and the angles s and t, by default the halves of the head are paired:

    partner = (c, d, a, b), along = (cos s, cos t, cos s, cos t), across = (-sin s, -sin t, sin s, sin t)

With the attribute `interleaved`, neighbours are:

    partner = (b, a, d, c), along = (cos s, cos s, cos t, cos t), across = (-sin s, sin s, -sin t, sin t)

With `rotary_embedding_dim`, only that many elements of each head rotate; the others stay as they are.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_exporter.graph.edit import SLICE_END, NodeBuilder, constant, int_attribute

FLOAT = ir.DataType.FLOAT


class RotaryFactors:
    """The factors `along` and `across` of a step's nodes, computed once for each way of pairing elements.

    `cos` and `sin` are (B, T, D / 2).
    """

    def __init__(self, add: NodeBuilder, cos: ir.Value, sin: ir.Value) -> None:
        self._add, self._cos, self._sin = add, cos, sin
        self._factors: dict[bool, tuple[ir.Value, ir.Value]] = {}

    def of(self, rotary: ir.Node) -> tuple[ir.Value, ir.Value]:
        """Return `along` and `across`, (B, T, 1, D) each, for the pairing of a RotaryEmbedding."""
        interleaved = bool(int_attribute(rotary, "interleaved"))
        if interleaved not in self._factors:
            pairs = (self._cos, self._cos), (self._add("Neg", self._sin), self._sin)
            along, across = (self._spread(*pair, interleaved=interleaved) for pair in pairs)
            self._factors[interleaved] = along, across
        return self._factors[interleaved]

    def _spread(self, first: ir.Value, second: ir.Value, *, interleaved: bool) -> ir.Value:
        """Arrange the factors of the first and the second element of each pair as the elements are arranged."""
        add = self._add
        if not interleaved:
            return add("Unsqueeze", add("Concat", first, second, axis=-1), add.ints(2))
        stacked = add("Concat", *(add("Unsqueeze", one, add.ints(3)) for one in (first, second)), axis=-1)
        return add("Unsqueeze", add.reshape(stacked, 0, 0, -1), add.ints(2))  # (B, T, D / 2, 2) -> (B, T, 1, D)


def decompose_rotary(graph: ir.Graph, node: ir.Node, along: ir.Value, across: ir.Value) -> None:
    """Replace a RotaryEmbedding over rows (B, T, H * D).

    The partners come from one Gather of each head's elements in another order: slices that are joined again would be
    copies.
    """
    add, rows = NodeBuilder(graph, node), node.inputs[0]
    if len(node.inputs) > 3:
        raise RuntimeError(f"{node.name} reads its own table of angles, expected cosines and sines of the step's nodes")
    assert rows is not None and rows.dtype is not None and rows.shape is not None  # noqa: S101
    heads, width, interleaved = int_attribute(node, "num_heads"), rows.shape[-1], int_attribute(node, "interleaved")
    assert isinstance(width, int)  # noqa: S101 -- a multiplication by a weight has a known width
    size = width // heads
    rotating = int_attribute(node, "rotary_embedding_dim") or size
    whole = add.reshape(add.cast(rows, FLOAT), 0, 0, heads, size)
    part = whole if rotating == size else add.slice(whole, 0, rotating)
    order = np.arange(rotating, dtype=np.int64)
    order = order ^ 1 if interleaved else np.roll(order, rotating // 2)
    partners = constant(graph, f"swapped.{rotating}.{interleaved}", order)
    rotated = add("Add", add("Mul", part, along), add("Mul", add("Gather", part, partners, axis=-1), across))
    if rotating != size:
        rotated = add("Concat", rotated, add.slice(whole, rotating, SLICE_END), axis=-1)
    add.replace(add.cast(add.reshape(rotated, 0, 0, width), rows.dtype))
