"""Adds to a graph for a GPU whether the logits of each row are finite, and of some rows the top K and the logsumexp.

For ONNX Runtime, one TopK searches the whole row. Its CUDA kernel sorts parts of some 3,000 values at once, each in a
block of threads of its own, and merges their winners; version 1.31 has it for K up to 256 and any length of a
vocabulary. A search in stages needs more kernels, each of which sorts as many values again. It would also read logits
by places that a TopK computed, which are outside the row where a row has too many NaNs.

For TensorRT, the top K are found in stages:

1. The row is divided into blocks of 64 tokens, of which the maxima are computed.
2. The 64 blocks with the largest maxima are found.
3. The top 64 of the tokens in these blocks are the top 64 of the row.

If a token is in none of the 64 blocks, each of them has a maximum of at least the token's logit, so 64 other tokens
have logits that are not below it. Equal logits are in no certain order (`medusa_runtime.contract`). A row of at most 64
blocks skips the first two stages.

Graphs for a CPU have no summaries. On two cores these operators take 0.11 ms for one row of 49,152 logits, 0.9 ms for 8
rows and 22 ms for 64; numpy takes 0.2 ms for one row, and an answer visits about three rows of a step, which are in the
host's memory anyway (`benchmarks/row_summaries.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from medusa_runtime import contract

from medusa_exporter.graph.edit import BranchBuilder

BLOCK = 64  # tokens of a block
BOOL, FLOAT, INT32, INT64 = ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64


class _Top(NamedTuple):
    """The largest logits of each row, descending (B, S, K), and their ids."""

    logits: ir.Value
    ids: ir.Value


def summarise_rows(
    graph: ir.Graph, vocab_size: int, sizes: Mapping[str, int] | None = None, *, tensorrt: bool = False
) -> None:
    """Add the input `summary_rows` and the outputs of summaries (`contract.summary_specs`) to a graph, in place.

    Args:
        graph: A graph with the output `logits` in fp32.
        vocab_size: V.
        sizes: Those of B, R and S that are fixed.
        tensorrt: Whether the graph is for TensorRT, not for ONNX Runtime.
    """
    fixed = sizes or {}
    [logits] = [value for value in graph.outputs if value.name == contract.LOGITS]
    names = [value.name for value in graph.inputs]
    rows = ir.Value(
        name=contract.SUMMARY_ROWS,
        type=ir.TensorType(INT32),
        shape=ir.Shape([fixed.get(size, size) for size in ("B", "S")]),
    )
    graph.inputs.insert(names.index(contract.LOGIT_ROWS) + 1, rows)
    results = _Summariser(graph, vocab_size, tensorrt).summarise(logits, rows, fixed)
    place = list(graph.outputs).index(logits) + 1
    for offset, (spec, result) in enumerate(zip(contract.summary_specs(vocab_size), results, strict=True)):
        result.name = spec.name
        result.shape = ir.Shape([fixed.get(str(size), size) for size in spec.shape])
        graph.outputs.insert(place + offset, result)


class _Summariser:
    """Appends the operators to a graph; all values have the leading dimensions (B, S)."""

    def __init__(self, graph: ir.Graph, vocab_size: int, tensorrt: bool) -> None:
        self._graph, self._V, self._tensorrt = graph, vocab_size, tensorrt
        self._K = contract.summary_tokens(vocab_size)
        self._add = BranchBuilder(graph, graph.append)
        self._last = self._add.ints(-1)

    def summarise(self, logits: ir.Value, rows: ir.Value, fixed: Mapping[str, int]) -> tuple[ir.Value, ...]:
        """Return the summaries of some of the rows of logits (B, R, V), in the order of the contract."""
        picked = self._select(logits, rows, fixed)  # (B, S, V)
        in_blocks = self._tensorrt and self._V > self._K * BLOCK
        top = self._top_of_blocks(picked) if in_blocks else _Top(*self._topk(picked))
        logsumexp = self._logsumexp(picked, top.logits)
        finite = self._least_is_finite(picked, logsumexp) if self._tensorrt else self._sum_is_finite(logits)
        return finite, self._add("Cast", top.ids, dtype=INT32, to=INT32), top.logits, logsumexp

    def _select(self, logits: ir.Value, rows: ir.Value, fixed: Mapping[str, int]) -> ir.Value:
        """Return the rows of logits that are summarised: (B, R, V) by (B, S) -> (B, S, V)."""
        add = self._add
        if fixed.get("B") == 1:
            return add("Gather", logits, add("Reshape", rows, self._last, dtype=INT32), dtype=FLOAT, axis=1)
        if "B" in fixed:
            B, R = fixed["B"], fixed["R"]
            first = add.constant(f"summary.first.{B}.{R}", np.arange(0, B * R, R, dtype=np.int32)[:, None])
        else:  # (B, 1): the index of each sequence's first row
            shape = add("Shape", logits, start=0, end=2)
            end = add("Cast", add("ReduceProd", shape, keepdims=0), dtype=INT32, to=INT32)
            zero, one = (add.constant(f"summary.{number}", np.array(number, np.int32)) for number in (0, 1))
            numbers = add("Reshape", add("Range", zero, end, one, dtype=INT32), shape, dtype=INT32)
            first = add("Slice", numbers, add.ints(0), add.ints(1), add.ints(1), dtype=INT32)
        flat = add("Reshape", logits, add.ints(-1, self._V), dtype=FLOAT)
        return add("Gather", flat, add("Add", rows, first, dtype=INT32), dtype=FLOAT, axis=0)

    def _topk(self, values: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the K largest values along the last axis, descending, and their places."""
        attributes = {"axis": -1, "largest": 1, "sorted": 1}
        node = ir.node("TopK", [values, self._add.ints(self._K)], attributes=attributes, num_outputs=2)
        best, places = node.outputs
        best.type, places.type = values.type, ir.TensorType(INT64)
        self._graph.append(node)
        return best, places

    def _top_of_blocks(self, rows: ir.Value) -> _Top:
        """Search the K blocks with the largest maxima; block i of n has the tokens i, i + n, i + 2n and so on."""
        add, K = self._add, self._K
        count = -(-self._V // BLOCK)
        padded = self._pad(rows, count * BLOCK - self._V)
        maxima = add("ReduceMax", self._reshape(padded, FLOAT, BLOCK, count), add.ints(-2), dtype=FLOAT, keepdims=0)
        _, best = self._topk(maxima)
        offsets = add.constant(f"summary.offsets.{count}", count * np.arange(BLOCK)[:, None])
        ids = self._reshape(add("Add", self._reshape(best, INT64, 1, K), offsets), INT64, BLOCK * K)
        logits, places = self._topk(add("GatherElements", padded, ids, dtype=FLOAT, axis=-1))
        return _Top(logits, add("GatherElements", ids, places, axis=-1))

    def _logsumexp(self, rows: ir.Value, top: ir.Value) -> ir.Value:
        """Return log Σ exp of each row (B, S), by way of its largest value so that no exponential overflows.

        As for the other outputs, the last operator computes: one that only copies might not write to the host's memory.
        """
        add = self._add
        largest = add("Slice", top, add.ints(0), add.ints(1), self._last, dtype=FLOAT)  # (B, S, 1)
        shares = add("Exp", add("Sub", rows, largest, dtype=FLOAT), dtype=FLOAT)
        total = add("ReduceSum", shares, self._last, dtype=FLOAT, keepdims=0)
        return add("Add", add("Log", total, dtype=FLOAT), add("Squeeze", largest, self._last, dtype=FLOAT), dtype=FLOAT)

    def _sum_is_finite(self, rows: ir.Value) -> ir.Value:
        """Return whether the sum of each row (B, R) is finite, which it is only if all logits are."""
        add = self._add
        total = add("ReduceSum", rows, self._last, dtype=FLOAT, keepdims=0)
        return add("Less", add("Abs", total, dtype=FLOAT), self._infinity("+"), dtype=BOOL)

    def _least_is_finite(self, rows: ir.Value, logsumexp: ir.Value) -> ir.Value:
        """Return whether all logits of each row (B, S) are finite: the logsumexp shows NaN and inf, the least -inf.

        An engine may compute in 16 bits, where the sum of a row could overflow. It summarises all rows in order.
        """
        add, least = self._add, rows
        if self._V % BLOCK == 0:
            blocks = self._reshape(rows, FLOAT, BLOCK, self._V // BLOCK)
            least = add("ReduceMin", blocks, add.ints(-2), dtype=FLOAT, keepdims=0)
        least = add("ReduceMin", least, self._last, dtype=FLOAT, keepdims=0)
        above = add("Greater", least, self._infinity("-"), dtype=BOOL)
        return add("And", above, add("Less", logsumexp, self._infinity("+"), dtype=BOOL), dtype=BOOL)

    def _infinity(self, sign: str) -> ir.Value:
        return self._add.constant(f"summary.{sign}inf", np.array(float(f"{sign}inf"), np.float32))

    def _pad(self, values: ir.Value, count: int) -> ir.Value:
        """Append `count` times -inf to each row, which is below every finite logit."""
        add = self._add
        if not count:
            return values
        return add("Pad", values, add.ints(0, 0, 0, 0, 0, count), self._infinity("-"), dtype=FLOAT, mode="constant")

    def _reshape(self, values: ir.Value, dtype: ir.DataType, *sizes: int) -> ir.Value:
        """Return (B, S, …) as (B, S, *sizes)."""
        return self._add("Reshape", values, self._add.ints(0, 0, *sizes), dtype=dtype)
