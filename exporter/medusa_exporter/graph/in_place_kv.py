"""Keys and values are written where they stay, and never copied: ONNX Runtime's variants on a CPU, and in 16 bits.

Of the traced graph each layer's Concat of past and new rows, Attention and rope become one GroupQueryAttention over a
buffer that is input and output at once. Its limits: steps of several rows take one sequence at a time, and its CUDA
kernel knows no fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from medusa_runtime import contract
from onnx_ir.passes import common

from medusa_exporter.graph.cleanup import declare_signature, strip_metadata
from medusa_exporter.graph.decompose import softcap_of
from medusa_exporter.graph.edit import ORT_DOMAIN, constant, insert, is_past_input, past_and_new
from medusa_exporter.graph.past_lengths import LengthsFromShapes, LengthsFromValues
from medusa_exporter.graph.rotary_fusion import number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medusa_runtime.facts import ModelFacts
    from numpy.typing import NDArray

INT64 = ir.DataType.INT64
HEADS, ANGLES = ("q_num_heads", "kv_num_heads"), ("cos", "sin")
ROPE_INPUTS = 3  # rows, cosines, sines; behind them may be the positions to read in tables of these
ROPE_MULTIPLE = 16  # of head sizes, and of parts of heads, that the operator turns by itself


def write_kv_in_place(
    model: ir.Model,
    facts: ModelFacts,
    state_size: int,
    tables: tuple[NDArray[np.float32], NDArray[np.float32]],
    dtype: ir.DataType | None = None,
) -> None:
    """Turn a traced graph into this dialect.

    tables: the decoder's `rotary_tables`. dtype: of rows that a GPU reads, `past_rows` of which are bound;
    None for a CPU, which reads those that are real, in fp32.
    """
    graph = model.graph
    graph.opset_imports[ORT_DOMAIN] = 1
    lengths = LengthsFromValues(graph) if dtype is None else LengthsFromShapes(graph, dtype)
    dialect = _Dialect(graph, lengths, tables, dtype, absorbs_rope=facts.head_dim % ROPE_MULTIPLE == 0)
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Shape" else None
        if source is not None and is_past_input(source) and _axis(node) == 1:
            ir.convenience.replace_all_uses_with(node.outputs[0], lengths.rows)
    outputs = [value for value in graph.outputs if not _name(value).startswith("new_")]
    presents: dict[str, ir.Value] = {}
    for node in list(graph):
        if node.op_type == "Attention":
            presents |= dialect.attend(node)
    inputs, results = contract.in_place_specs(
        facts.layers,
        state_size,
        facts.vocab_size,
        facts.kv_heads,
        facts.head_dim,
        "float32" if dtype is None else dtype.numpy().name,
        with_past_rows=dtype is not None,
    )
    graph.outputs.clear()
    graph.outputs.extend([*outputs, *(presents[spec.name] for spec in results[len(outputs) :])])
    common.RemoveUnusedNodesPass()(model)
    declare_signature(model, inputs, results)
    graph.sort()
    strip_metadata(model)


class _Dialect:
    """What all layers share, and the rewrite of one."""

    def __init__(
        self,
        graph: ir.Graph,
        lengths: LengthsFromValues | LengthsFromShapes,
        tables: Sequence[NDArray[np.float32]],
        dtype: ir.DataType | None,
        *,
        absorbs_rope: bool,
    ) -> None:
        self._absorbs_rope = absorbs_rope
        self._graph, self._lengths = graph, lengths
        positions = next(value for value in graph.inputs if value.name == contract.POSITION_IDS)
        self._positions = insert(graph, graph[0], "Cast", [positions], INT64, {"to": INT64})
        kind = np.float32 if dtype is None else dtype.numpy()
        self._tables = [
            constant(graph, f"in_place.{name}", table.astype(kind)) for name, table in zip(ANGLES, tables, strict=True)
        ]

    def attend(self, node: ir.Node) -> dict[str, ir.Value]:
        """Put GroupQueryAttention in an Attention's place; return the buffers that it gives, by their names."""
        query, keys, values, mask = node.inputs[:4]
        assert mask is not None  # noqa: S101 -- all are traced with a mask
        (past_key, new_key), (past_value, value) = (past_and_new(both) for both in (keys, values))
        key: ir.Value | None = new_key
        layer = int(_name(past_key).rsplit("_", 1)[1])
        ropes = [_rope(one, node.attributes[count].as_int()) for one, count in zip((query, key), HEADS, strict=True)]
        rope = all(one is not None and self._absorbs(one) for one in ropes)
        if rope:
            query, key = (None if one is None else one.inputs[0] for one in ropes)
        else:
            self._read_tables(ropes)
        new = ir.node(
            "GroupQueryAttention",
            [query, key, value, past_key, past_value, self._lengths.last, self._lengths.total]
            + ([*self._tables, self._positions] if rope else [None, None, None])
            + [self._lengths.mask(node, mask)],
            attributes={
                "num_heads": node.attributes["q_num_heads"].as_int(),
                "kv_num_heads": node.attributes["kv_num_heads"].as_int(),
                "scale": node.attributes["scale"].as_float(),
                "do_rotary": int(rope),
                "rotary_interleaved": number(ropes[0], "interleaved") if rope and ropes[0] is not None else 0,
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

    def _absorbs(self, rope: ir.Node) -> bool:
        """Whether GroupQueryAttention turns rows as this rope does."""
        return self._absorbs_rope and number(rope, "rotary_embedding_dim") % ROPE_MULTIPLE == 0

    def _read_tables(self, ropes: Sequence[ir.Node | None]) -> None:
        """Let ropes that stay read the angles that the operator's own rope does.

        Made by nodes of the graph, in fp16 on a GPU, those of far positions were off by some hundredths.
        """
        for rope in ropes:
            if rope is not None:
                rope.resize_inputs(ROPE_INPUTS + 1)
                for index, value in enumerate((*self._tables, self._positions), 1):
                    rope.replace_input_with(index, value)


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""


def _axis(shape: ir.Node) -> int:
    return shape.attributes["start"].as_int() if "start" in shape.attributes else 0


def _rope(rows: ir.Value | None, heads: int) -> ir.Node | None:
    """The decoder's rope, if these are rows that it has turned."""
    rope = None if rows is None else rows.producer()
    if rope is None or rope.op_type != "RotaryEmbedding" or number(rope, "num_heads") != heads:
        return None
    return rope if len([one for one in rope.inputs if one is not None]) == ROPE_INPUTS else None
