"""Finds the two tables with a row for each token, embedding and lm_head, and looks rows up in quantised tables.

The embedding's rows are looked up by token; the lm_head multiplies by all of its rows. In many models both are one
table. ONNX Runtime's GatherBlockQuantized reads rows of the same bytes that MatMulNBits multiplies by, so one quantised
table serves both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from medusa_runtime.contract import INPUT_IDS, LOGITS, TOKENS
from numpy.typing import NDArray

from medusa_exporter.graph.edit import ORT_DOMAIN, NodeBuilder, constant, int_attribute
from medusa_exporter.precisions import WeightFormat

MATMULS = ("MatMul", "Gemm")
AFTER_LM_HEAD = ("Reshape", "Add", "Mul", "Div", "Tanh")  # shapes, a bias, and how some families scale or cap logits
# Two tables are taken for one if no row differs by more than this share of its norm. A GGUF file may have a tied table
# twice, rounded differently: that of Qwen2.5-Coder-0.5B-Instruct has Q5_0 and Q8_0, whose rows differ by at most 0.061.
# Rounding to 4 bits in blocks of 32 changes a row by about 0.1; different tables differ by 1 and more.
SAME_TABLE = 0.08
ROWS_AT_ONCE = 4096


def lm_head(graph: ir.Graph) -> ir.Node | None:
    """Return the MatMul or Gemm by the lm_head's weight; None if another operator computes the logits."""
    node = _producer_of_output(graph, LOGITS)
    while node is not None and node.op_type in AFTER_LM_HEAD:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or node.op_type not in MATMULS or node.inputs[1] is None:
        return None
    return node if node.inputs[1].const_value is not None else None


def embedding_lookups(graph: ir.Graph) -> list[ir.Node]:
    """Return all Gathers from the table (V, H) in which the step's tokens are looked up.

    These are the output `tokens`, or in a graph without heads the input `input_ids`, of which `tokens` is a copy.
    """
    named = ((TOKENS, graph.outputs), (INPUT_IDS, graph.inputs))
    tokens = [value for name, values in named for value in values if value.name == name]
    tables = {node.inputs[0] for value in tokens for node in value.consumers() if _looks_up(node)}
    return [node for node in graph if _looks_up(node) and node.inputs[0] in tables]


def tie_similar(graph: ir.Graph) -> None:
    """Look tokens up in the lm_head's table, in place, if it is the embedding's but for its rounding."""
    head, lookups = lm_head(graph), embedding_lookups(graph)
    weight = head.inputs[1] if head is not None and int_attribute(head, "transB") else None
    table = lookups[0].inputs[0] if lookups else None
    if weight is None or table is None or weight.const_value is None or table.const_value is None:
        return
    if weight is not table and _same_table(table.const_value, weight.const_value):
        for node in lookups:
            node.replace_input_with(0, weight)


def look_up_blocks(
    graph: ir.Graph, lookups: Sequence[ir.Node], packed: ir.TensorProtocol, scales: ir.TensorProtocol, to: WeightFormat
) -> None:
    """Replace Gathers from a table (V, H) by GatherBlockQuantized from its quantised form, in place.

    The weight keeps the three dimensions that MatMulNBits needs: ONNX Runtime would fold a Reshape of it into a copy.
    Of the scales, which are small, it makes such a copy, with the third dimension that this operator needs.

    Args:
        graph: The graph.
        lookups: The Gathers, in the graph's order; at least one.
        packed: The quantised values, (V, blocks, block), 8 bits each.
        scales: The scales of the blocks, (V, blocks).
        to: The format. The last block is padded if H is not a multiple of `to.block`.
    """
    _, blocks, block = packed.shape.numpy()
    first = NodeBuilder(graph, lookups[0])
    values = constant(graph, str(packed.name), packed)
    scale = first("Unsqueeze", constant(graph, str(scales.name), scales), first.ints(2))  # (V, blocks, 1)
    for node in lookups:
        table, ids = node.inputs[:2]
        assert table is not None and table.shape is not None and ids is not None and ids.shape is not None  # noqa: S101
        width, build = table.shape.numpy()[1], NodeBuilder(graph, node)
        new = ir.node(
            "GatherBlockQuantized",
            [values, ids, scale],
            attributes={"gather_axis": 0, "quantize_axis": 2, "block_size": to.block, "bits": to.bits},
            domain=ORT_DOMAIN,
        )
        new.outputs[0].type = node.outputs[0].type
        graph.insert_before(node, new)
        rows = build.reshape(new.outputs[0], *[0] * len(ids.shape), blocks * block)  # (…, blocks, block) before
        build.replace(rows if blocks * block == width else build.slice(rows, 0, width))


def _producer_of_output(graph: ir.Graph, name: str) -> ir.Node | None:
    return next((value.producer() for value in graph.outputs if value.name == name), None)


def _looks_up(node: ir.Node) -> bool:
    """Return whether a node gathers rows of a constant table."""
    table = node.inputs[0] if node.op_type == "Gather" else None
    if table is None or table.const_value is None or table.const_value.shape.rank() != 2:
        return False
    return int_attribute(node, "axis") == 0


def _same_table(first: ir.TensorProtocol, second: ir.TensorProtocol) -> bool:
    """Return whether every row of two tables (V, H) is the same but for its rounding."""
    if first.shape != second.shape:
        return False
    one, other = first.numpy(), second.numpy()
    starts = range(0, len(one), ROWS_AT_ONCE)
    return all(_same_rows(*(_fp32(table[start : start + ROWS_AT_ONCE]) for table in (one, other))) for start in starts)


def _same_rows(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    difference, size = (np.linalg.norm(rows, axis=1) for rows in (one - other, other))  # (rows,)
    return bool((difference <= SAME_TABLE * size).all())


def _fp32(rows: NDArray[np.generic]) -> NDArray[np.float32]:
    return np.asarray(rows, dtype=np.float32)
