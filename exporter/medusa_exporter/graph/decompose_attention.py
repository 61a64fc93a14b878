"""Decomposes Attention into primitive operators, for backends that lack it or whose kernel for it is slow.

Shapes: B sequences, T nodes, P past rows, S = P + T, D elements per head. The H query heads share Hkv key heads in
groups of G = H / Hkv; the query heads of a group are rows of one matrix multiplication. For example, H = 9 and Hkv = 3
with T = 5 nodes give G = 3 and multiplications of G * T = 15 rows by the keys of each of the 3 key heads. The softmax
is computed in fp32, whatever the type of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from medusa_exporter.graph.cleanup import strip_metadata
from medusa_exporter.graph.edit import SLICE_END, NodeBuilder, past_and_new

FLOAT = ir.DataType.FLOAT
Masks = dict[ir.Value, ir.Value]  # a mask (B, 1, T, S) and its repetition for each group (B, 1, G * T, S)


def decompose_attention(model: ir.Model, nodes: int | None = None) -> None:
    """Decompose every Attention, in place.

    Args:
        model: A graph with Attention operators.
        nodes: T, if the graph is for TensorRT. TensorRT 8.6 crashes on past and new rows in one tensor if each query
            head has its own key head (G = 1). Both are then multiplied separately, and only their scores are joined.
    """
    graph = model.graph
    masks: Masks = {}
    for node in list(graph):
        if node.op_type == "Attention":
            _decompose(graph, node, masks, nodes)
    common.RemoveUnusedNodesPass()(model)
    strip_metadata(model)


def softcap_of(node: ir.Node) -> float:
    """Return the softcap of an attention (its scores are bounded by `softcap * tanh(scores / softcap)`); 0 if none."""
    return node.attributes["softcap"].as_float() if "softcap" in node.attributes else 0.0


@dataclass(frozen=True)
class _Heads:
    """The heads of an attention: Hkv key heads, G query heads for each, D elements per head."""

    key_heads: int
    group: int
    size: int

    @classmethod
    def of(cls, node: ir.Node, query: ir.Value) -> _Heads:
        heads, key_heads = (node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads"))
        width = query.shape[-1] if query.shape is not None else None
        if not isinstance(width, int):
            raise RuntimeError(f"attention {node.name} has queries of unknown width, expected a known one")  # noqa: TRY004
        return cls(key_heads, heads // key_heads, width // heads)

    def split(self, add: NodeBuilder, rows: ir.Value, permutation: Sequence[int]) -> ir.Value:
        """Return rows (B, S, Hkv * D) as (B, S, Hkv, D), permuted."""
        return add("Transpose", add.reshape(rows, 0, 0, self.key_heads, self.size), perm=permutation)

    def group_queries(self, add: NodeBuilder, query: ir.Value) -> ir.Value:
        """(B, T, H * D) -> (B, Hkv, G * T, D)."""
        split = add.reshape(query, 0, 0, self.key_heads, self.group, self.size)
        return add.reshape(add("Transpose", split, perm=[0, 2, 3, 1, 4]), 0, self.key_heads, -1, self.size)

    def ungroup(self, add: NodeBuilder, summed: ir.Value) -> ir.Value:
        """(B, Hkv, G * T, D) -> (B, T, H * D)."""
        split = add.reshape(summed, 0, self.key_heads, self.group, -1, self.size)
        rows = add("Transpose", split, perm=[0, 3, 1, 2, 4])
        return add.reshape(rows, 0, 0, self.key_heads * self.group * self.size)


def _decompose(graph: ir.Graph, node: ir.Node, masks: Masks, nodes: int | None) -> None:
    """Replace one Attention by softmax(queries @ keys^T * scale + mask) @ values."""
    add = NodeBuilder(graph, node)
    query, keys, values, mask = node.inputs[:4]
    assert query is not None and mask is not None and query.dtype is not None  # noqa: S101 -- each is traced with a mask
    assert keys is not None and values is not None  # noqa: S101 -- inputs that the operator requires
    heads = _Heads.of(node, query)
    separate = nodes if heads.group == 1 else None  # T, if past and new rows are multiplied separately
    key_parts, value_parts = (past_and_new(rows) if separate else (rows,) for rows in (keys, values))
    queries = heads.group_queries(add, query)
    scores = [add("MatMul", queries, heads.split(add, part, [0, 2, 3, 1])) for part in key_parts]
    joined = add("Concat", *scores, axis=-1) if separate else scores[0]  # (B, Hkv, G * T, S)
    weights = add.cast(_softmax(add, node, joined, mask, heads.group, masks), query.dtype)
    shares = [add.slice(weights, 0, -separate), add.slice(weights, -separate, SLICE_END)] if separate else [weights]
    sums = [
        add("MatMul", share, heads.split(add, part, [0, 2, 1, 3]))
        for share, part in zip(shares, value_parts, strict=True)
    ]
    summed = add("Add", *sums) if separate else sums[0]  # (B, Hkv, G * T, D)
    add.replace(heads.ungroup(add, summed))


def _softmax(add: NodeBuilder, node: ir.Node, scores: ir.Value, mask: ir.Value, group: int, masks: Masks) -> ir.Value:
    """Scale, cap and mask scores, and return their softmax, all in fp32."""
    scaled = add("Mul", add.cast(scores, FLOAT), add.scalar(node.attributes["scale"].as_float()))
    if cap := softcap_of(node):
        scaled = add("Mul", add("Tanh", add("Mul", scaled, add.scalar(1 / cap))), add.scalar(cap))
    if mask not in masks:
        masks[mask] = mask if group == 1 else add("Concat", *[mask] * group, axis=2)
    return add("Softmax", add("Add", scaled, masks[mask]), axis=-1)
