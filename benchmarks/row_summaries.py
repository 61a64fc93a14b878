"""Measure what row summaries cost, and compare them with the rows that they summarise.

    python benchmarks/row_summaries.py BUNDLE --backend ort-cuda --precision fp16 --profile tree-16 --profile tree-64

On a GPU, steps of plain decoding and of each tree run with and without summaries (S = R and S = 0), in turns, behind a
random prompt. The table has the median milliseconds of a step as `Backend.run_seconds` counts them, what summaries add,
and the microseconds in which the host reads the summary and the whole row of one node. All summaries are compared with
numpy's on the same rows. Before that, the operators alone run on rows with many equal logits and on rows that are not
finite, which a model rarely computes; exit code 1 if a summary is wrong.

With a bundle and `--backend ort-cpu` no step is run, since graphs for a CPU have no summaries. The table compares what
they would cost with what the host does instead, for 1 row, 3 rows (which an answer visits in a step) and more: ONNX
Runtime's operators on all rows, and numpy's work on the full rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import onnx_ir as ir
from medusa_exporter.compare.row_summaries import SUMMARY_ERROR, exact_summary, summary_error
from medusa_exporter.graph.cleanup import strip_metadata
from medusa_exporter.graph.row_summaries import summarise_rows
from medusa_profiles.profile import TreeProfile
from medusa_runtime import contract
from medusa_runtime.backends import load_backend
from medusa_runtime.backends.base import Backend, RowSummary, literal_step
from medusa_runtime.backends.ort_library import import_onnxruntime
from medusa_runtime.bundle import Bundle
from medusa_runtime.kv_cache import KvCache
from medusa_runtime.threads import default_threads
from medusa_runtime.tree_step import TreeStep
from numpy.typing import NDArray

WARM = 5  # runs of each shape: the first one is plain, the second captures a CUDA graph
CPU_ROWS = (1, 3, 8, 64)
Floats = NDArray[np.float32]


def main() -> None:
    """Parse the command line, measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="Bundle folder.")
    parser.add_argument("--backend", default="ort-cuda", help="Backend to measure (default: ort-cuda).")
    parser.add_argument("--precision", help="Precision of the graph; needed where the bundle has several.")
    parser.add_argument("--profile", action="append", help="Tree to run, repeatable (default: tree-16 and tree-64).")
    parser.add_argument("--past", type=int, default=256, help="Tokens of the random prompt (default: 256).")
    parser.add_argument("--rounds", type=int, default=200, help="Runs of each shape (default: 200).")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    if options.backend == "ort-cpu":
        on_cpu(bundle.model.vocab_size, options.rounds)
        return
    worst = check_patterns(bundle.model.vocab_size) if options.backend == "ort-cuda" else 0.0
    backend = load_backend(bundle, options.backend, options.precision)
    trees = [TreeProfile.plain(), *map(bundle.profile, options.profile or ("tree-16", "tree-64"))]
    worst = max(worst, on_gpu(backend, trees, options.past, options.rounds))
    print(f"largest error of a summary: {worst:.2g}, expected at most {SUMMARY_ERROR:.2g}")
    sys.exit(0 if worst <= SUMMARY_ERROR else 1)


def on_gpu(backend: Backend, trees: list[TreeProfile], past: int, rounds: int) -> float:
    """Run every tree with and without summaries, in turns; print a table and return the largest error of a summary."""
    rng, cache = np.random.default_rng(0), KvCache(backend)
    prompt = rng.integers(0, backend.model.vocab_size, past).astype(np.int32)
    for first in range(0, past, backend.prefill_chunk):
        chunk = prompt[first : first + backend.prefill_chunk]
        backend.run(literal_step(chunk, first, np.array([len(chunk) - 1], np.int32)))
        cache.commit(range(len(chunk)))
    steps = {(tree, kind): TreeStep(tree, backend.heads.top_k, kind) for tree in trees for kind in (False, True)}
    cache.reserve(past + max(tree.size for tree in trees))
    seconds: dict[tuple[TreeProfile, bool], list[float]] = {which: [] for which in steps}
    reading: dict[TreeProfile, list[tuple[float, float]]] = {tree: [] for tree in trees}
    order, worst = list(steps), 0.0
    for number in range(WARM + rounds):
        root = int(rng.integers(backend.model.vocab_size))
        for which in rng.permutation(len(order)):
            tree, kind = order[which]
            step = steps[tree, kind]
            step.update(root, past)
            backend.run(step.step)
            if number < WARM:
                continue
            seconds[tree, kind].append(backend.run_seconds)
            if kind:
                reading[tree].append(read_one(backend, number % tree.size))
                if number % 10 == 0:
                    worst = max(worst, error_of(backend, tree.size))
    print(f"{'tree':12}{'rows':>6}{'S = 0':>10}{'S = R':>10}{'more':>10}{'':>8}{'read':>10}{'full row':>10}")
    for tree in trees:
        without, with_summaries = (1e3 * median(seconds[tree, kind]) for kind in (False, True))
        read, row = (1e6 * median(column) for column in zip(*reading[tree], strict=True))
        more = with_summaries - without
        print(
            f"{tree.name:12}{tree.size:6}{without:7.3f} ms{with_summaries:7.3f} ms{1e3 * more:7.1f} us"
            f"{more / without:7.1%} {read:7.1f} us{row:7.1f} us"
        )
    return worst


def read_one(backend: Backend, row: int) -> tuple[float, float]:
    """Return the seconds in which a summary and a whole row are read."""
    started = perf_counter()
    backend.read_summary(row)
    between = perf_counter()
    backend.read_logits(row)
    return between - started, perf_counter() - between


def error_of(backend: Backend, rows: int) -> float:
    """Return the largest error of the summaries of the last step."""
    found = [backend.read_summary(row) for row in range(rows)]
    summaries = [one for one in found if one is not None]
    assert len(summaries) == rows, "the backend has no summaries; build the bundle again"  # noqa: S101
    return summary_error(np.stack([backend.read_logits(row) for row in range(rows)]), summaries)


def check_patterns(V: int) -> float:
    """Run the operators alone on a GPU, on rows with ties and on rows that are not finite; return the largest error."""
    logits = pattern_rows(V, 24)
    providers: list[Any] = [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
    run = operators(V, "gpu", providers)
    worst = max(summary_error(logits, run(logits)), summary_error(logits[:1], run(logits[:1])))
    assert run(logits[:0]) == []  # noqa: S101 -- no rows
    print(f"{len(logits)} rows with equal logits, NaN or inf: largest error {worst:.2g}")
    return worst


def on_cpu(V: int, rounds: int) -> None:
    """Print the milliseconds of ONNX Runtime's operators and of numpy's work on full rows, in turns."""
    rng, threads = np.random.default_rng(0), default_threads()
    ways: list[Callable[[Floats], object]] = [
        operators(V, "cpu", ["CPUExecutionProvider"]),
        lambda logits: [exact_summary(row) for row in logits],
    ]
    print(f"V = {V}, {threads} threads; milliseconds")
    print(f"{'rows':>5}{'operators':>20}{'numpy':>20}")
    for rows in CPU_ROWS:
        logits = rng.normal(scale=3, size=(rows, V)).astype(np.float32)
        seconds: list[list[float]] = [[] for _ in ways]
        for number in range(WARM + rounds):
            for spent, summarise in zip(seconds, ways, strict=True):
                started = perf_counter()
                summarise(logits)
                if number >= WARM:
                    spent.append(perf_counter() - started)
        print(f"{rows:5}" + "".join(f"{1e3 * median(spent):20.3f}" for spent in seconds), flush=True)


def operators(V: int, extra: str, providers: list[Any]) -> Callable[[Floats], list[RowSummary]]:
    """Return a function that summarises rows (R, V) by the operators of a graph alone, in ONNX Runtime."""
    onnxruntime = import_onnxruntime(extra)
    if extra == "gpu" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    rows = ir.Value(name=contract.LOGIT_ROWS, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([1, "R"]))
    logits, same = (
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "R", V]))
        for name in ("computed", contract.LOGITS)
    )
    copy = ir.node("Identity", [logits], outputs=[same])
    graph = ir.Graph([rows, logits], [same], nodes=[copy], name="summaries", opset_imports={"": 23})
    summarise_rows(graph, V, {"B": 1})
    model = ir.Model(graph, ir_version=10)
    strip_metadata(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = default_threads()
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=providers)

    def run(logits: Floats) -> list[RowSummary]:
        index = np.arange(len(logits), dtype=np.int32)[None]
        inputs = {contract.LOGIT_ROWS: index, contract.SUMMARY_ROWS: index, "computed": logits[None]}
        columns = session.run(list(contract.SUMMARY_OUTPUTS), inputs)
        finite, *others = (column[0] for column in columns)
        return [RowSummary(*one) for one in zip(*others, finite, strict=True)]

    return run


def pattern_rows(V: int, count: int) -> Floats:
    """Return rows with many equal logits, rows of extreme logits, and rows with NaN or inf; (count, V) float32."""
    rng = np.random.default_rng(1)
    rows = []
    for number in range(count):
        row = rng.normal(scale=3, size=V).astype(np.float32)
        kind, place = number % 12, rng.integers(0, V)
        if kind == 0:  # ties everywhere, also at the last entry
            row = (rng.integers(0, 40, V) * rng.integers(0, 2, V)).astype(np.float32)
        elif kind == 1:  # about 100 equal largest logits
            row[rng.random(V) < 100 / V] = 50
        elif kind == 2:  # ties at the last entry only
            row[rng.permutation(V)[:200]] = np.partition(row, V - 40)[V - 40]
        elif kind == 3:
            row = np.full(V, rng.normal(), np.float32)
        elif kind == 4:
            row *= np.float32(1e20)
        elif kind == 5:
            row = np.sort(row) if number % 2 else np.sort(row)[::-1].copy()
        elif kind == 6:
            row[:] = rng.choice([0.0, -0.0], V)
        elif kind < 10:
            row[place] = (np.nan, np.inf, -np.inf)[kind - 7]
        elif kind == 10:
            row[:] = (np.nan, np.inf, -np.inf)[number % 3]
        rows.append(row)
    return np.stack(rows)


if __name__ == "__main__":
    main()
