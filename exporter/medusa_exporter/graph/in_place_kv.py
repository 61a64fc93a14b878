"""Writes keys and values in place, without copying the past: for ONNX Runtime on CPUs, and on GPUs in 16 bits.

In each layer the Concat of past and new rows, Attention and usually the rotary embeddings become one
GroupQueryAttention over a buffer that is input and output at once. That operator has two limits: a step of several rows
takes one sequence only, and its CUDA kernel does not support fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from medusa_runtime import contract
from onnx_ir.passes import common

from medusa_exporter.graph.cleanup import declare_signature, strip_metadata
from medusa_exporter.graph.decompose_attention import softcap_of
from medusa_exporter.graph.edit import (
    ORT_DOMAIN,
    constant,
    insert,
    int_attribute,
    is_past_input,
    past_and_new,
    producer_of_type,
)
from medusa_exporter.graph.past_lengths import LengthsFromShapes, LengthsFromValues

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medusa_runtime.facts import ModelFacts
    from numpy.typing import NDArray

INT64 = ir.DataType.INT64
QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, LAST, TOTAL, COS, SIN, POSITIONS, MASK = range(
    11
)  # inputs of GroupQueryAttention
HEAD_COUNTS = ("q_num_heads", "kv_num_heads")
ROTARY_INPUTS = 3  # rows, cosines and sines; a fourth input has positions, to read tables of cosines and sines
ROTARY_MULTIPLE = 16  # GroupQueryAttention rotates heads, and parts of heads, whose sizes are multiples of this


def write_kv_in_place(
    model: ir.Model,
    facts: ModelFacts,
    state_size: int,
    tables: tuple[NDArray[np.float32], NDArray[np.float32]],
    dtype: ir.DataType | None = None,
) -> None:
    """Turn a traced graph into one that writes its rows in place (`contract.in_place_specs`).

    Args:
        model: A traced graph, changed in place.
        facts: The decoder's sizes.
        state_size: E, the size of a row of `hidden`.
        tables: Cosines and sines of all positions (`rotary_tables`).
        dtype: The type of KV rows on a GPU, where the input `past_rows` determines how many are read. None for a CPU,
            which reads the real rows only, in fp32.
    """
    graph = model.graph
    graph.opset_imports[ORT_DOMAIN] = 1
    lengths = LengthsFromValues(graph) if dtype is None else LengthsFromShapes(graph, dtype)
    rewriter = _LayerRewriter(graph, lengths, tables, dtype, fuse_rotary=facts.head_dim % ROTARY_MULTIPLE == 0)
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Shape" else None
        if source is not None and is_past_input(source) and int_attribute(node, "start") == 1:
            ir.convenience.replace_all_uses_with(node.outputs[0], lengths.rows)
    outputs = [value for value in graph.outputs if not _name(value).startswith("new_")]
    presents: dict[str, ir.Value] = {}
    for node in list(graph):
        if node.op_type == "Attention":
            presents |= rewriter.rewrite(node)
    inputs, results = contract.in_place_specs(
        facts.layers,
        state_size,
        facts.vocab_size,
        facts.kv_heads,
        facts.head_dim,
        "float32" if dtype is None else dtype.numpy().name,
        gpu=dtype is not None,
    )
    graph.outputs.clear()
    graph.outputs.extend([*outputs, *(presents[spec.name] for spec in results[len(outputs) :])])
    common.RemoveUnusedNodesPass()(model)
    declare_signature(model, inputs, results)
    graph.sort()
    strip_metadata(model)


class _LayerRewriter:
    """Replaces the attention of one layer after the other; lengths, positions and tables are shared by all."""

    def __init__(
        self,
        graph: ir.Graph,
        lengths: LengthsFromValues | LengthsFromShapes,
        tables: Sequence[NDArray[np.float32]],
        dtype: ir.DataType | None,
        *,
        fuse_rotary: bool,
    ) -> None:
        self._fuse_rotary = fuse_rotary
        self._graph, self._lengths = graph, lengths
        positions = next(value for value in graph.inputs if value.name == contract.POSITION_IDS)
        self._positions = insert(graph, graph[0], "Cast", [positions], INT64, {"to": INT64})
        numpy_type = np.float32 if dtype is None else dtype.numpy()
        self._tables = [
            constant(graph, f"in_place.{name}", table.astype(numpy_type))
            for name, table in zip(("cos", "sin"), tables, strict=True)
        ]

    def rewrite(self, node: ir.Node) -> dict[str, ir.Value]:
        """Replace an Attention by GroupQueryAttention and return the buffers that it writes, by output name."""
        query, keys, values, mask = node.inputs[:4]
        assert mask is not None  # noqa: S101 -- each attention is traced with a mask
        (past_key, new_key), (past_value, value) = (past_and_new(rows) for rows in (keys, values))
        key: ir.Value | None = new_key
        layer = int(_name(past_key).rsplit("_", 1)[1])
        rotary = [
            _rotary(rows, node.attributes[count].as_int())
            for rows, count in zip((query, key), HEAD_COUNTS, strict=True)
        ]
        fused = all(one is not None and self._can_fuse(one) for one in rotary)
        if fused:
            query, key = (None if one is None else one.inputs[0] for one in rotary)
        else:
            self._read_tables(rotary)
        new = ir.node(
            "GroupQueryAttention",
            [query, key, value, past_key, past_value, self._lengths.last, self._lengths.total]
            + ([*self._tables, self._positions] if fused else [None, None, None])
            + [self._lengths.mask(node, mask)],
            attributes={
                "num_heads": node.attributes["q_num_heads"].as_int(),
                "kv_num_heads": node.attributes["kv_num_heads"].as_int(),
                "scale": node.attributes["scale"].as_float(),
                "do_rotary": int(fused),
                "rotary_interleaved": int_attribute(rotary[0], "interleaved") if fused and rotary[0] is not None else 0,
                "softcap": softcap_of(node),
            },
            domain=ORT_DOMAIN,
            num_outputs=3,
        )
        self._graph.insert_before(node, new)
        output, *presents = new.outputs
        output.type, output.shape = node.outputs[0].type, node.outputs[0].shape
        ir.convenience.replace_all_uses_with(node.outputs[0], output)
        names = (contract.present_key(layer), contract.present_value(layer))
        for present in presents:
            present.type = output.type
        return dict(zip(names, presents, strict=True))

    def _can_fuse(self, rotary: ir.Node) -> bool:
        """Return whether GroupQueryAttention can rotate rows as this RotaryEmbedding does."""
        return self._fuse_rotary and int_attribute(rotary, "rotary_embedding_dim") % ROTARY_MULTIPLE == 0

    def _read_tables(self, rotary: Sequence[ir.Node | None]) -> None:
        """Let RotaryEmbeddings that stay read cosines and sines from the tables.

        Computed by the graph in fp16, those of far positions were wrong by some hundredths.
        """
        for node in rotary:
            if node is not None:
                node.resize_inputs(ROTARY_INPUTS + 1)
                for index, value in enumerate((*self._tables, self._positions), 1):
                    node.replace_input_with(index, value)


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""


def _rotary(rows: ir.Value | None, heads: int) -> ir.Node | None:
    """Return the RotaryEmbedding that produces `rows`, if it is the decoder's own."""
    rotary = producer_of_type(rows, "RotaryEmbedding")
    if rotary is None or int_attribute(rotary, "num_heads") != heads:
        return None
    return rotary if len([one for one in rotary.inputs if one is not None]) == ROTARY_INPUTS else None
