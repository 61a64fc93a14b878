"""Tables of which rows of D elements belong together where the query heads of a key head become rows of one head."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_exporter.graph.edit import BranchBuilder

MIN_ROWS = 2  # a matrix multiplication with a single row adds up in another order
MAX_GROUPED_NODES = 64  # more nodes than any tree that pays on a CPU: they are a chunk of a prompt
FEWEST_TASKS = 4  # attention is divided among threads by heads
FLOAT = ir.DataType.FLOAT


def parts_of(heads: int, kv_heads: int) -> int:
    """Return into how many parts the query rows of a key head are divided.

    Attention is divided among threads by heads. With few key heads some threads would have nothing to do, or one of two
    threads twice the work of the other: 3 key heads become 6 parts, 2 become 4, 8 stay 8.
    """
    group = heads // kv_heads
    enough = [n for n in range(1, group) if n * kv_heads >= FEWEST_TASKS and n * kv_heads % 2 == 0]
    return min(enough, default=group)


class QueryRows:
    """Which query rows and which results each part of a key head has, for up to MAX_GROUPED_NODES nodes.

    Query row j = t · group + g of a key head is that of query head g of node t. Row r of part i is j = r · parts + i;
    rows beyond the last one are some row of the last node, and their results are not read.

    Attributes:
        heads: Hkv · parts, the heads of the operator.
        rows: R, int64 (1,): query rows of a part.
        queries: (R, Hkv · parts) index of each query row among all rows of D elements.
        results: (T, Hq) index of each result among the operator's.
    """

    def __init__(self, build: BranchBuilder, heads: int, kv_heads: int, nodes: ir.Value) -> None:
        """Add the operators that read the tables for a number of nodes, int64 (1,)."""
        group, of_token, parts = heads // kv_heads, heads + 2 * kv_heads, parts_of(heads, kv_heads)
        self.heads = kv_heads * parts
        counts = np.maximum(-(-np.arange(MAX_GROUPED_NODES + 1) * group // parts), MIN_ROWS)
        number = np.arange(counts[-1])[:, None] * parts + np.arange(self.heads) % parts  # j, (most R, Hkv · parts)
        queries = number // group * of_token + number % group + np.arange(self.heads) // parts * group
        all_same = parts in (1, group)  # all parts have rows of the same nodes
        node = (number[:, :1] if all_same else number).T // group  # (1 or Hkv · parts, most R)
        number = np.arange(MAX_GROUPED_NODES)[:, None] * group + np.arange(heads) % group  # (most T, Hq)
        results = number // parts * self.heads + number % parts + np.arange(heads) // group * parts
        zero, one, last = build.ints(0), build.ints(1), build("Sub", nodes, build.ints(1))
        known = build("Min", nodes, build.ints(MAX_GROUPED_NODES))
        self.rows = build("Gather", build.constant("grouped.counts", counts), known)
        end = build("Sub", build("Mul", nodes, build.ints(of_token)), one)  # the last row of D elements
        table = build.constant("grouped.queries", queries)
        self.queries = build("Min", build("Slice", table, zero, self.rows, zero), end)
        table = build.constant("grouped.nodes", np.ascontiguousarray(node))
        self._of_nodes = build("Min", build("Slice", table, zero, self.rows, one), last)
        self.results = build("Slice", build.constant("grouped.results", results), zero, nodes, zero)

    def mask(self, build: BranchBuilder, mask: ir.Value) -> ir.Value:
        """Return the mask of query rows, (1, Hkv · parts or 1, R, S), of a mask of nodes (T, S)."""
        rows = build("Gather", mask, self._of_nodes, dtype=FLOAT, axis=0)
        return build("Unsqueeze", rows, build.ints(0), dtype=FLOAT)
