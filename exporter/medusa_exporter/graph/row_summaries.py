"""Adds row summaries to a graph for a GPU: the top K logits of a row, their logsumexp, and whether all are finite.

The top K = 64 are found in stages, since a GPU searches a long row with one block of threads:

1. The row is cut into blocks of 64 tokens, of which the maxima are computed.
2. The 64 blocks with the largest maxima are found, and sorted by their place in the row.
3. The top 64 of the tokens in these blocks are the top 64 of the row.

A row that has at most 64 blocks skips the first two stages. The result is exact, also where logits are equal: of equal
logits those of lower ids are kept and come first. Suppose that a block X is not among the 64 blocks, and holds a token
with logit v. Each of the 64 blocks has a maximum of at least v. Where a maximum is equal to v, it is X's maximum too,
so that block was preferred to X for its lower place, and all its ids are lower. So 64 tokens precede X's.

This holds only if TopK itself prefers the lower index of equal values, as ONNX specifies. On a CUDA GPU, ONNX Runtime
1.31 does so for at most 256 values, which it sorts in shared memory; its kernel for more of them orders equal values by
thread. So values are searched in groups of 256 (`TOPK_GROUP`): the top 64 of each of 16 groups, then of each of 4
groups of these, then of the last 256. All groups are full, because the kernel pads a smaller one with the lowest finite
value, which would come before a logit of -inf, with an index that does not exist.

Graphs for a CPU have no summaries. On two cores these operators take 0.15 ms for one row of 49,152 logits, 1.0 ms for 8
rows and more than 12 ms for 64; numpy takes 0.24 ms for one row, and an answer visits about three rows of a step, which
are in the host's memory anyway (`benchmarks/row_summaries.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from medusa_runtime import contract

from medusa_exporter.graph.edit import BranchBuilder

TOPK_GROUP = 256  # values among which ONNX Runtime's CUDA kernel of TopK prefers the lower index
BLOCK = 64  # tokens of a block
BOOL, FLOAT, INT32, INT64 = ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64


class _Top(NamedTuple):
    """The largest values of each row, descending (B, S, n), and their places or ids."""

    values: ir.Value
    ids: ir.Value


def summarise_rows(
    graph: ir.Graph, vocab_size: int, sizes: Mapping[str, int] | None = None, group: int | None = TOPK_GROUP
) -> None:
    """Add the input `summary_rows` and the outputs of summaries (`contract.summary_specs`) to a graph, in place.

    Args:
        graph: A graph with the output `logits` in fp32.
        vocab_size: V.
        sizes: Those of B, R and S that are fixed.
        group: Values among which a TopK searches at most; None for any number.
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
    results = _Summariser(graph, vocab_size, group).summarise(logits, rows, fixed)
    place = list(graph.outputs).index(logits) + 1
    for offset, (spec, result) in enumerate(zip(contract.summary_specs(vocab_size), results, strict=True)):
        result.name = spec.name
        result.shape = ir.Shape([fixed.get(str(size), size) for size in spec.shape])
        graph.outputs.insert(place + offset, result)


class _Summariser:
    """Appends the operators to a graph; all values have the leading dimensions (B, S)."""

    def __init__(self, graph: ir.Graph, vocab_size: int, group: int | None) -> None:
        self._graph, self._V, self._group = graph, vocab_size, group
        self._add = BranchBuilder(graph, graph.append)
        self._last = self._add.ints(-1)

    def summarise(self, logits: ir.Value, rows: ir.Value, fixed: Mapping[str, int]) -> tuple[ir.Value, ...]:
        """Return the summaries of some of the rows of logits (B, R, V), in the order of the contract."""
        add, V, K = self._add, self._V, contract.summary_tokens(self._V)
        picked = self._select(logits, rows, fixed)  # (B, S, V)
        if V > K * BLOCK:
            count = -(-V // BLOCK)
            padded = self._pad(picked, count * BLOCK - V)
            blocks = self._reshape(padded, FLOAT, count, BLOCK)
            maxima = add("ReduceMax", blocks, self._last, dtype=FLOAT, keepdims=0)
            best, _ = self._topk(self._top(maxima, count, K).ids, K, largest=False)
            starts = add("Mul", best, add.ints(BLOCK))
            places = add.constant(f"summary.places.{BLOCK}", np.arange(BLOCK))
            ids = add("Add", self._reshape(starts, INT64, K, 1), places)  # (B, S, K, BLOCK)
            ids = self._reshape(ids, INT64, K * BLOCK)
            candidates = add("GatherElements", padded, ids, dtype=FLOAT, axis=-1)
            top = self._top(candidates, K * BLOCK, K, ids)
            least = self._least(blocks, 2) if padded is picked else self._least(picked)
        else:
            top, least = self._top(picked, V, K), self._least(picked)
        logsumexp = self._logsumexp(picked, top.values)
        return add("Cast", top.ids, dtype=INT32, to=INT32), top.values, logsumexp, self._finite(least, logsumexp)

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

    def _top(self, values: ir.Value, count: int, K: int, ids: ir.Value | None = None) -> _Top:
        """Return the K largest of the `count` values of each row; ids are their places where none are passed."""
        add, group = self._add, self._group
        if group is not None:
            full = 1 << (count - 1).bit_length()  # a power of two fills groups at every level
            values, count = self._pad(values, full - count), full
        while group is not None and count > group:
            groups = count // group
            best, places = self._topk(self._reshape(values, FLOAT, groups, group), K)
            if ids is None:
                starts = add.constant(f"summary.groups.{groups}", group * np.arange(groups)[:, None])
                chosen = add("Add", places, starts)
            else:
                chosen = add("GatherElements", self._reshape(ids, INT64, groups, group), places, axis=-1)
            count = groups * K
            values, ids = self._reshape(best, FLOAT, count), self._reshape(chosen, INT64, count)
        best, places = self._topk(values, K)
        return _Top(best, places if ids is None else add("GatherElements", ids, places, axis=-1))

    def _topk(self, values: ir.Value, K: int, *, largest: bool = True) -> tuple[ir.Value, ir.Value]:
        """Return the K first values along the last axis, in order, and their places."""
        attributes = {"axis": -1, "largest": int(largest), "sorted": 1}
        node = ir.node("TopK", [values, self._add.ints(K)], attributes=attributes, num_outputs=2)
        best, places = node.outputs
        best.type, places.type = values.type, ir.TensorType(INT64)
        self._graph.append(node)
        return best, places

    def _logsumexp(self, rows: ir.Value, top: ir.Value) -> ir.Value:
        """Return log Σ exp of each row (B, S), by way of its largest value so that no exponential overflows.

        As for the other outputs, the last operator computes: one that only copies might not write to the host's memory.
        """
        add = self._add
        largest = add("Slice", top, add.ints(0), add.ints(1), self._last, dtype=FLOAT)  # (B, S, 1)
        shares = add("Exp", add("Sub", rows, largest, dtype=FLOAT), dtype=FLOAT)
        total = add("ReduceSum", shares, self._last, dtype=FLOAT, keepdims=0)
        return add("Add", add("Log", total, dtype=FLOAT), add("Squeeze", largest, self._last, dtype=FLOAT), dtype=FLOAT)

    def _least(self, rows: ir.Value, axes: int = 1) -> ir.Value:
        """Return the least logit of each row (B, S), of rows whose logits are along the last one or two axes."""
        for _ in range(axes):
            rows = self._add("ReduceMin", rows, self._last, dtype=FLOAT, keepdims=0)
        return rows

    def _finite(self, least: ir.Value, logsumexp: ir.Value) -> ir.Value:
        """Return whether all logits are finite: with NaN or inf among them, the logsumexp is NaN or inf."""
        add = self._add
        above, below = (add.constant(f"summary.{sign}inf", np.array(float(f"{sign}inf"), np.float32)) for sign in "-+")
        return add(
            "And", add("Greater", least, above, dtype=BOOL), add("Less", logsumexp, below, dtype=BOOL), dtype=BOOL
        )

    def _pad(self, values: ir.Value, count: int) -> ir.Value:
        """Append `count` times -inf to each row, which loses against every logit, by its place also against -inf."""
        add = self._add
        if not count:
            return values
        lowest = add.constant("summary.-inf", np.array(-np.inf, np.float32))
        return add("Pad", values, add.ints(0, 0, 0, 0, 0, count), lowest, dtype=FLOAT, mode="constant")

    def _reshape(self, values: ir.Value, dtype: ir.DataType, *sizes: int) -> ir.Value:
        """Return (B, S, …) as (B, S, *sizes)."""
        return self._add("Reshape", values, self._add.ints(0, 0, *sizes), dtype=dtype)
