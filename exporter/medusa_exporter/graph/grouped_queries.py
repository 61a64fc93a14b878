"""Lets the query heads of a key head share one matrix multiplication in attention on a CPU.

ONNX Runtime's GroupQueryAttention multiplies for each query head by the keys and by the values of its key head, and
packs them anew each time. With few rows that takes longer than the multiplication. Here the rows of all query heads
that share a key head become rows of one head, so that keys and values are packed once, or once for each of a few parts
that threads share. What is computed for an element does not change: products and sums are the same, in the same order.

Rows of D elements are selected by index, so nothing is transposed: one Gather each for queries, keys and values, and
one for the result. Two TensorScatter write the keys and values behind the past, in place. The indices depend on the
number of nodes only: they are the beginnings of constant tables.

Example: 4 query heads, 2 key heads, 3 nodes. A token has A = 4 + 2 + 2 rows of D elements: queries q0 … q3, keys k0 and
k1, values v0 and v1. Key head 0 serves q0 and q1, and gets 6 query rows: q0 and q1 of node 0, of node 1 and of node 2.

The operator allows no more query rows than there are keys. Where there would be more, at the start of a prompt, and in
chunks of a prompt, another branch computes the heads one by one: causal rows without a mask, for which ONNX Runtime has
flash attention, in half the time.

A row has the same bits in any step, since two cases are avoided in which sums are added up in another order:

- A matrix multiplication with a single row. There are always at least two query rows, if need be the same one twice.
- A softmax over a number of keys that is no multiple of the processor's vectors, whose last keys are added one by one.
  The number of keys is rounded up to a multiple of 4 (wider vectors of x86 are masked instead); the keys in excess are
  copies of the last one, and hidden by the mask. So a step may write up to 3 rows behind its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from medusa_runtime import contract
from onnx_ir.passes import common

from medusa_exporter.graph.edit import ORT_DOMAIN, BranchBuilder, int_attribute, replace
from medusa_exporter.graph.in_place_kv import (
    COS,
    KEY,
    LAST,
    MASK,
    PAST_KEY,
    PAST_VALUE,
    POSITIONS,
    QUERY,
    SIN,
    TOTAL,
    VALUE,
)
from medusa_exporter.graph.query_rows import MAX_GROUPED_NODES, MIN_ROWS, QueryRows

OPSET = 24  # of TensorScatter
KEY_MULTIPLE = 4  # numbers of keys are rounded up to it
HIDDEN = float(np.finfo(np.float32).min)  # as in the traced mask
BOOL, FLOAT, INT32, INT64 = ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64

Fill = Callable[[BranchBuilder], ir.Value]


def group_queries(model: ir.Model) -> None:
    """Rewrite every GroupQueryAttention of a CPU graph, in place. Its tables end with the row of `with_still_row`."""
    graph = model.graph
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    if not nodes:
        return
    graph.opset_imports[""] = OPSET
    rewriter = _Rewriter(graph, nodes[0])
    for node in nodes:
        rewriter.rewrite(node)
    common.RemoveUnusedNodesPass()(model)
    graph.sort()


class _Rewriter:
    """Rewrites one layer after the other; what depends on the number of nodes only is computed once for all."""

    def __init__(self, graph: ir.Graph, like: ir.Node) -> None:
        self._graph, self._branches = graph, 0
        self._heads, self._kv_heads = (like.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
        self._all = self._heads + 2 * self._kv_heads  # A
        past_key = like.inputs[PAST_KEY]
        assert past_key is not None and past_key.shape is not None  # noqa: S101 -- an input of the graph
        self._size = int(past_key.shape[3])  # type: ignore[arg-type]  # D
        inputs = {value.name: value for value in graph.inputs}
        build = self._before(graph[0])
        self._nodes = build("Shape", inputs[contract.INPUT_IDS], start=1, end=2)  # (1,): T
        self._past = build("Cast", inputs[contract.PAST_LENGTH], to=INT64)
        seen = build("Add", self._past, self._nodes)  # (1,): P + T
        multiple = build.ints(KEY_MULTIPLE)
        rounded = build("Div", build("Add", seen, build.ints(KEY_MULTIPLE - 1)), multiple)
        self._seen = build("Mul", rounded, multiple)  # (1,): S
        self._total = build("Cast", self._seen, dtype=INT32, to=INT32)
        self._last = build("Cast", build("Sub", self._seen, build.ints(1)), dtype=INT32, to=INT32)
        excess = build("Sub", self._seen, seen)
        self._pads = build("Mul", excess, build.ints(0, 0, 0, 1))  # of a mask (T, P + T)
        new = build("Min", build.range(build("Sub", self._seen, self._past)), build("Sub", self._nodes, build.ints(1)))
        key = build.constant("grouped.key_rows", np.arange(self._heads, self._heads + self._kv_heads)[:, None])
        rows = build("Add", key, build("Mul", new, build.ints(self._all)))
        self._keys = build("Unsqueeze", rows, build.ints(0))  # (1, Hkv, S - P)
        self._values = build("Add", self._keys, build.ints(self._kv_heads))
        self._grouping = QueryRows(build, self._heads, self._kv_heads, self._nodes)
        fits = build("LessOrEqual", self._grouping.rows, self._seen, dtype=BOOL)
        self._few = build("LessOrEqual", self._nodes, build.ints(MAX_GROUPED_NODES), dtype=BOOL)
        self._grouped = build("Squeeze", build("And", fits, self._few, dtype=BOOL), build.ints(0), dtype=BOOL)
        self._rotations: dict[ir.Value, tuple[ir.Value, ...]] = {}
        self._masks: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}

    def rewrite(self, node: ir.Node) -> None:
        """Replace one GroupQueryAttention."""
        build = self._before(node)
        rows = self._rows_of_heads(node, build)
        presents = []
        for index, past, output in ((self._keys, PAST_KEY, 1), (self._values, PAST_VALUE, 2)):
            new = build("Gather", rows, index, dtype=FLOAT, axis=0)
            presents.append(build("TensorScatter", node.inputs[past], new, self._past, dtype=FLOAT, axis=2))
            replace(node.outputs[output], presents[-1])
        mask, of_rows, causal = self._mask(node, build)

        def grouped(inside: BranchBuilder) -> ir.Value:
            queries = inside("Gather", rows, self._grouping.queries, dtype=FLOAT, axis=0)
            queries = inside("Reshape", queries, inside.ints(1, -1, self._grouping.heads * self._size), dtype=FLOAT)
            attended = self._attend(node, inside, self._grouping.heads, (queries, *presents), of_rows)
            attended = inside("Reshape", attended, inside.ints(-1, self._size), dtype=FLOAT)
            attended = inside("Gather", attended, self._grouping.results, dtype=FLOAT, axis=0)
            return inside("Reshape", attended, inside.ints(1, -1, self._heads * self._size), dtype=FLOAT)

        def masked(inside: BranchBuilder) -> ir.Value:
            count = inside("Max", self._nodes, inside.ints(MIN_ROWS))
            each = inside("Min", inside.range(count), inside("Sub", self._nodes, inside.ints(1)))
            queries = inside("Gather", self._queries(inside, rows), each, dtype=FLOAT, axis=1)
            of_each = inside("Gather", mask, each, dtype=FLOAT, axis=0)
            of_each = inside("Unsqueeze", of_each, inside.ints(0, 1), dtype=FLOAT)
            attended = self._attend(node, inside, self._heads, (queries, *presents), of_each)
            return inside("Slice", attended, inside.ints(0), self._nodes, inside.ints(1), dtype=FLOAT)

        def unmasked(inside: BranchBuilder) -> ir.Value:
            return self._attend(node, inside, self._heads, (self._queries(inside, rows), *presents), None)

        def one_by_one(inside: BranchBuilder) -> ir.Value:
            return self._if(inside, causal, unmasked, masked)

        result = self._if(build, self._grouped, grouped, one_by_one)
        result.shape = node.outputs[0].shape
        replace(node.outputs[0], result)
        self._graph.remove(node, safe=True)

    def _if(
        self, build: BranchBuilder, condition: ir.Value, then: Fill, otherwise: Fill, dtype: ir.DataType = FLOAT
    ) -> ir.Value:
        """Insert an If whose branches are filled by a function each, which returns its branch's result."""
        branches = self._branch(then), self._branch(otherwise)
        return build("If", condition, dtype=dtype, then_branch=branches[0], else_branch=branches[1])

    def _branch(self, fill: Fill) -> ir.Graph:
        nodes: list[ir.Node] = []
        self._branches += 1
        name = f"branch.{self._branches}"
        result = fill(BranchBuilder(self._graph, nodes.append, name))
        return ir.Graph([], [result], nodes=nodes, name=name)

    def _queries(self, build: BranchBuilder, rows: ir.Value) -> ir.Value:
        """Return the queries among rows of D elements as rows of nodes, (1, T, Hq · D)."""
        tokens = build("Reshape", rows, build.ints(1, -1, self._all * self._size), dtype=FLOAT)
        end = build.ints(self._heads * self._size)
        return build("Slice", tokens, build.ints(0), end, build.ints(2), dtype=FLOAT)

    def _attend(
        self, node: ir.Node, build: BranchBuilder, heads: int, values: Sequence[ir.Value], mask: ir.Value | None
    ) -> ir.Value:
        """Attend from queries (1, R, heads · D) to keys and values, and return the same shape.

        Without a mask a node sees the past and the nodes up to itself.
        """
        queries, *presents = values
        none = build.constant("grouped.no_rows", np.zeros((1, 0, self._kv_heads * self._size), np.float32))
        lengths = (self._last, self._total) if mask is not None else (node.inputs[LAST], node.inputs[TOTAL])
        return build(
            "GroupQueryAttention",
            *(queries, none, none, *presents, *lengths, None, None, None, mask),
            dtype=FLOAT,
            domain=ORT_DOMAIN,
            num_heads=heads,
            kv_num_heads=self._kv_heads,
            scale=node.attributes["scale"].as_float(),
            softcap=node.attributes["softcap"].as_float(),
            causal=int(mask is None),
        )

    def _rows_of_heads(self, node: ir.Node, build: BranchBuilder) -> ir.Value:
        """Return queries, keys and values, rotated, as rows of D elements: (T · A, D)."""
        packed, flat = node.inputs[QUERY], build.ints(-1, self._size)
        if node.inputs[KEY] is not None:
            packed = build("Concat", *node.inputs[QUERY : VALUE + 1], dtype=FLOAT, axis=-1)
        if not int_attribute(node, "do_rotary"):
            return build("Reshape", packed, flat, dtype=FLOAT)
        positions, cos, sin = self._rotation(node)
        assert cos.shape is not None  # noqa: S101 -- a constant
        rotated = 2 * int(cos.shape[1])  # type: ignore[arg-type]
        part = {"rotary_embedding_dim": rotated} if rotated < self._size else {}
        rows = build("Reshape", packed, build.ints(-1, self._all, self._size), dtype=FLOAT)  # tokens are its sequences
        rows = build(
            "RotaryEmbedding",
            *(rows, positions, cos, sin),
            dtype=FLOAT,
            domain=ORT_DOMAIN,
            interleaved=int_attribute(node, "rotary_interleaved"),
            num_heads=1,
            **part,
        )
        return build("Reshape", rows, flat, dtype=FLOAT)

    def _rotation(self, node: ir.Node) -> tuple[ir.Value, ...]:
        """Return positions (T, A), and the tables; values have the position of the row that rotates by nothing."""
        cos, sin, positions = node.inputs[COS], node.inputs[SIN], node.inputs[POSITIONS]
        assert cos is not None and cos.shape is not None and sin is not None  # noqa: S101 -- the node rotates
        if cos not in self._rotations:
            build, still = self._before(node), int(cos.shape[0]) - 1  # type: ignore[arg-type]
            is_value = build.constant("grouped.is_value", np.arange(self._all) >= self._heads + self._kv_heads)
            each = build("Where", is_value, build.ints(still), build("Reshape", positions, build.ints(-1, 1)))
            self._rotations[cos] = each, cos, sin
        return self._rotations[cos]

    def _mask(self, node: ir.Node, build: BranchBuilder) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return the mask of the nodes (T, S), that of each part's query rows, and whether it is a causal chunk's."""
        mask = node.inputs[MASK]
        assert mask is not None  # noqa: S101 -- `write_kv_in_place` gives every attention a mask
        if mask not in self._masks:
            nodes = build("Squeeze", mask, build.ints(0, 1), dtype=FLOAT)  # (T, P + T)
            hidden = build.constant("grouped.hidden", np.array(HIDDEN, dtype=np.float32))
            nodes = build("Pad", nodes, self._pads, hidden, dtype=FLOAT)
            self._masks[mask] = nodes, self._grouping.mask(build, nodes), self._is_causal_chunk(build, nodes)
        return self._masks[mask]

    def _is_causal_chunk(self, build: BranchBuilder, mask: ir.Value) -> ir.Value:
        """Return whether there are many nodes, each of which sees the whole past and the nodes up to itself."""

        def many(inside: BranchBuilder) -> ir.Value:
            zero = inside.constant("grouped.visible", np.array(0, dtype=np.float32))
            visible = inside("Cast", inside("Equal", mask, zero, dtype=BOOL), to=INT64)
            past = inside("Squeeze", self._past, inside.ints(0))
            triangle = inside("Trilu", visible, past, upper=0)
            found = [inside("ReduceSum", one, keepdims=0) for one in (visible, triangle)]
            pairs = inside("Mul", self._nodes, inside("Add", self._nodes, inside.ints(1)))  # 1 + … + T, twice
            new = inside("Div", pairs, inside.ints(2))
            expected = inside("Add", inside("Mul", self._nodes, self._past), new)
            both = inside("And", *(inside("Equal", one, expected, dtype=BOOL) for one in found), dtype=BOOL)
            return inside("Squeeze", both, inside.ints(0), dtype=BOOL)

        def few(inside: BranchBuilder) -> ir.Value:
            return inside("Identity", inside.constant("grouped.not_causal", np.array(False)), dtype=BOOL)

        return self._if(build, build("Squeeze", self._few, build.ints(0), dtype=BOOL), few, many, dtype=BOOL)

    def _before(self, node: ir.Node) -> BranchBuilder:
        return BranchBuilder(self._graph, lambda new: self._graph.insert_before(node, new))
