"""Variants of the operators that summarise rows, which `row_summaries.py --operators` compares.

A variant is a way to find the top 64 logits, a way to compute the logsumexp, and a way to compute the flag. Its graph
has the inputs `logits` (1, R, V) and `summary_rows` (1, S), and the outputs of summaries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from medusa_exporter.graph.cleanup import strip_metadata
from medusa_exporter.graph.edit import BranchBuilder
from medusa_runtime import contract

BOOL, FLOAT, INT32, INT64 = ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64
MAX_PARTS = 64


class Top(NamedTuple):
    """The largest logits of each row, descending (1, S, K), and their ids."""

    logits: ir.Value
    ids: ir.Value


class Builder:
    """Appends operators to the graph of a variant.

    Args:
        graph: The graph.
        vocab_size: V.
    """

    def __init__(self, graph: ir.Graph, vocab_size: int) -> None:
        self.graph, self.V, self.K = graph, vocab_size, contract.summary_tokens(vocab_size)
        self.add = BranchBuilder(graph, graph.append)

    @property
    def last(self) -> ir.Value:
        """The last axis."""
        return self.add.ints(-1)

    def topk(self, values: ir.Value, *, largest: int = 1, in_order: int = 1) -> tuple[ir.Value, ir.Value]:
        """Return the K first values along the last axis and their places."""
        attributes = {"axis": -1, "largest": largest, "sorted": in_order}
        node = ir.node("TopK", [values, self.add.ints(self.K)], attributes=attributes, num_outputs=2)
        node.outputs[0].type, node.outputs[1].type = values.type, ir.TensorType(INT64)
        self.graph.append(node)
        return node.outputs[0], node.outputs[1]

    def reshape(self, values: ir.Value, *sizes: int) -> ir.Value:
        """Return (1, S, …) as (1, S, *sizes)."""
        assert values.dtype is not None  # noqa: S101
        return self.add("Reshape", values, self.add.ints(0, 0, *sizes), dtype=values.dtype)

    def pad(self, values: ir.Value, count: int) -> ir.Value:
        """Append `count` times -inf, or 0 to integers, to each row."""
        assert values.dtype is not None  # noqa: S101
        if not count:
            return values
        array = np.array(-np.inf, np.float32) if values.dtype == FLOAT else np.array(0)
        filling = self.add.constant(f"pad.{values.dtype.name}", array)
        widths = self.add.ints(0, 0, 0, 0, 0, count)
        return self.add("Pad", values, widths, filling, dtype=values.dtype, mode="constant")

    def first(self, values: ir.Value) -> ir.Value:
        """Return the first value along the last axis, which the result lacks."""
        return self.add("Gather", values, self.add.constant("first", np.array(0)), dtype=FLOAT, axis=-1)


FindTop = Callable[[Builder, ir.Value], Top]
ComputeSum = Callable[[Builder, ir.Value, Top], ir.Value]
ComputeFlag = Callable[[Builder, ir.Value, ir.Value], ir.Value]


def whole(build: Builder, rows: ir.Value) -> Top:
    """Search the whole row with one TopK."""
    return Top(*build.topk(rows))


def in_parts(most: int, build: Builder, rows: ir.Value) -> Top:
    """Search each of up to `most` parts, then the winners."""
    parts = max(n for n in range(1, most + 1) if build.V % n == 0 and build.V // n >= build.K)
    logits, places = build.topk(build.reshape(rows, parts, build.V // parts))
    starts = build.add.constant("starts", np.arange(0, build.V, build.V // parts)[:, None])
    ids = build.reshape(build.add("Add", places, starts), parts * build.K)
    best, winners = build.topk(build.reshape(logits, parts * build.K))
    return Top(best, build.add("GatherElements", ids, winners, axis=-1))


def in_groups(build: Builder, values: ir.Value, ids: ir.Value | None = None, count: int = 0, in_order: int = 1) -> Top:
    """Search groups of 256 values until there is one group; with `in_order` 0 by the kernel that sorts few values."""
    count = count or build.V
    while count > 256:
        groups = -(-count // 256)
        padded = build.pad(values, groups * 256 - count)
        best, places = build.topk(build.reshape(padded, groups, 256), in_order=in_order)
        if ids is None:
            chosen = build.add("Add", places, build.add.constant("groups", 256 * np.arange(groups)[:, None]))
        else:
            before = build.reshape(build.pad(ids, groups * 256 - count), groups, 256)
            chosen = build.add("GatherElements", before, places, axis=-1)
        count = groups * build.K
        values, ids = build.reshape(best, count), build.reshape(chosen, count)
    best, places = build.topk(values)
    return Top(best, places if ids is None else build.add("GatherElements", ids, places, axis=-1))


def in_blocks(size: int, pool: bool, groups: bool, build: Builder, rows: ir.Value) -> Top:
    """Search the K blocks with the largest maxima; a block has `size` tokens, spread evenly over the row.

    Args:
        size: Tokens of a block.
        pool: Whether MaxPool computes the maxima, not ReduceMax.
        groups: Whether all searches are in groups of 256.
        build: Appends operators.
        rows: (1, S, V).
    """
    add, count = build.add, build.V // size
    blocks = build.reshape(rows, size, count)
    if pool:
        pooled = add("MaxPool", blocks, dtype=FLOAT, kernel_shape=[size, 1], strides=[size, 1])
        maxima = build.reshape(pooled, count)
    else:
        maxima = add("ReduceMax", blocks, add.ints(-2), dtype=FLOAT, keepdims=0)
    best = in_groups(build, maxima, count=count).ids if groups else build.topk(maxima)[1]
    offsets = add.constant(f"offsets.{size}", count * np.arange(size)[:, None])
    ids = build.reshape(add("Add", build.reshape(best, 1, build.K), offsets), size * build.K)
    candidates = add("GatherElements", rows, ids, dtype=FLOAT, axis=-1)
    if groups:
        return in_groups(build, candidates, ids, size * build.K)
    logits, places = build.topk(candidates)
    return Top(logits, add("GatherElements", ids, places, axis=-1))


def in_few_blocks(build: Builder, rows: ir.Value) -> Top:
    """Search up to 256 blocks, in no order, by the kernel that sorts few values; then the tokens of the best."""
    add, count = build.add, max(n for n in (256, 128, 64, 1) if build.V % n == 0)
    size = build.V // count
    maxima = add("ReduceMax", build.reshape(rows, size, count), add.ints(-2), dtype=FLOAT, keepdims=0)
    best = build.topk(maxima, in_order=0)[1]
    offsets = add.constant("offsets.few", count * np.arange(size)[:, None])
    ids = build.reshape(add("Add", build.reshape(best, 1, build.K), offsets), size * build.K)
    logits, places = build.topk(add("GatherElements", rows, ids, dtype=FLOAT, axis=-1))
    return Top(logits, add("GatherElements", ids, places, axis=-1))


def by_softmax(build: Builder, rows: ir.Value, _: Top) -> ir.Value:
    """Compute the difference between any token's logit and its log-probability; the first token's here."""
    shares = build.add("LogSoftmax", rows, dtype=FLOAT, axis=-1)
    return build.add("Sub", build.first(rows), build.first(shares), dtype=FLOAT)


def by_softmax_in_parts(build: Builder, rows: ir.Value, _: Top) -> ir.Value:
    """Compute the logsumexp of parts of up to 1,024 tokens, then of these."""
    length = max(n for n in range(1, 1025) if build.V % n == 0)
    parts = build.reshape(rows, build.V // length, length)
    sums = by_softmax(build, parts, _)
    return by_softmax(build, sums, _)


def by_exp(build: Builder, rows: ir.Value, top: Top) -> ir.Value:
    """Sum the exponentials of the differences to the largest logit."""
    add = build.add
    largest = add("Slice", top.logits, add.ints(0), add.ints(1), build.last, dtype=FLOAT)
    shares = add("Exp", add("Sub", rows, largest, dtype=FLOAT), dtype=FLOAT)
    total = add("ReduceSum", shares, build.last, dtype=FLOAT, keepdims=0)
    return add("Add", add("Log", total, dtype=FLOAT), add("Squeeze", largest, build.last, dtype=FLOAT), dtype=FLOAT)


def by_operator(build: Builder, rows: ir.Value, _: Top) -> ir.Value:
    """Use ReduceLogSumExp."""
    return build.add("ReduceLogSumExp", rows, build.last, dtype=FLOAT, keepdims=0)


def by_total(build: Builder, rows: ir.Value, _: ir.Value) -> ir.Value:
    """Sum the row: the sum is finite only if all logits are."""
    add, inf = build.add, build.add.constant("inf", np.array(np.inf, np.float32))
    total = add("ReduceSum", rows, build.last, dtype=FLOAT, keepdims=0)
    return add("Less", add("Abs", total, dtype=FLOAT), inf, dtype=BOOL)


def by_product(build: Builder, rows: ir.Value, _: ir.Value) -> ir.Value:
    """Sum the row by a matrix multiplication with ones."""
    add, inf = build.add, build.add.constant("inf", np.array(np.inf, np.float32))
    ones = add.constant("ones", np.full(build.V, 1 / build.V, np.float32))
    total = add("MatMul", rows, ones, dtype=FLOAT)
    return add("Less", add("Abs", total, dtype=FLOAT), inf, dtype=BOOL)


def by_least(size: int, build: Builder, rows: ir.Value, logsumexp: ir.Value) -> ir.Value:
    """Find the least logit, by way of blocks of `size` tokens if that is above 0; the logsumexp shows NaN and inf."""
    add = build.add
    least = build.reshape(rows, build.V // size, size) if size else rows
    for _ in range(2 if size else 1):
        least = add("ReduceMin", least, build.last, dtype=FLOAT, keepdims=0)
    above, below = (add.constant(f"{sign}inf", np.array(float(f"{sign}inf"), np.float32)) for sign in "-+")
    return add("And", add("Greater", least, above, dtype=BOOL), add("Less", logsumexp, below, dtype=BOOL), dtype=BOOL)


VARIANTS: dict[str, tuple[FindTop, ComputeSum, ComputeFlag]] = {
    "whole, softmax, total": (whole, by_softmax, by_total),
    "before: blocks in groups, exp, least": (partial(in_blocks, 64, False, True), by_exp, partial(by_least, 64)),
    "blocks 64": (partial(in_blocks, 64, False, False), by_softmax, by_total),
    "blocks 64, MaxPool": (partial(in_blocks, 64, True, False), by_softmax, by_total),
    "blocks 128, MaxPool": (partial(in_blocks, 128, True, False), by_softmax, by_total),
    "few blocks": (in_few_blocks, by_softmax, by_total),
    "parts 64": (partial(in_parts, MAX_PARTS), by_softmax, by_total),
    "parts 16": (partial(in_parts, 16), by_softmax, by_total),
    "groups 256, unsorted": (partial(in_groups, in_order=0), by_softmax, by_total),
    "softmax in parts": (whole, by_softmax_in_parts, by_total),
    "exp": (whole, by_exp, by_total),
    "ReduceLogSumExp": (whole, by_operator, by_total),
    "product with ones": (whole, by_softmax, by_product),
    "least in blocks": (whole, by_softmax, partial(by_least, 64)),
    "least": (whole, by_softmax, partial(by_least, 0)),
}


NOTHING, ROWS_ALONE = "nothing", "rows alone"


def variant_model(name: str, vocab_size: int) -> bytes:
    """Return the model of a variant.

    Args:
        name: One of `VARIANTS`, or `NOTHING` for one operator on the indices, or `ROWS_ALONE` for what all variants do
            first: the rows are gathered.
        vocab_size: V.
    """
    rows = ir.Value(name=contract.SUMMARY_ROWS, type=ir.TensorType(INT32), shape=ir.Shape([1, "S"]))
    logits = ir.Value(name=contract.LOGITS, type=ir.TensorType(FLOAT), shape=ir.Shape([1, "R", vocab_size]))
    graph = ir.Graph([logits, rows], [], nodes=[], name="summaries", opset_imports={"": 23})
    build = Builder(graph, vocab_size)
    add = build.add
    outputs: dict[str, tuple[ir.Value, list[int | str]]] = {}
    if name == NOTHING:
        outputs[contract.LOGSUMEXP] = add("Cast", rows, dtype=FLOAT, to=FLOAT), ["S"]
    else:
        index = add("Reshape", rows, build.last, dtype=INT32)
        picked = add("Gather", logits, index, dtype=FLOAT, axis=1)
    if name == ROWS_ALONE:
        outputs[contract.LOGSUMEXP] = build.first(picked), ["S"]
    elif name in VARIANTS:
        find, compute, check = VARIANTS[name]
        top = find(build, picked)
        logsumexp = compute(build, picked, top)
        ids = add("Cast", top.ids, dtype=INT32, to=INT32)
        values = ids, top.logits, logsumexp, check(build, picked, logsumexp)
        sizes: list[list[int | str]] = [["S", build.K], ["S", build.K], ["S"], ["S"]]
        outputs |= dict(zip(contract.SUMMARY_OUTPUTS, zip(values, sizes, strict=True), strict=True))
    for output, (value, shape) in outputs.items():
        value.name, value.shape = output, ir.Shape([1, *shape])
        graph.outputs.append(value)
    model = ir.Model(graph, ir_version=10)
    strip_metadata(model)
    serialized: bytes = ir.to_proto(model).SerializeToString()
    return serialized
