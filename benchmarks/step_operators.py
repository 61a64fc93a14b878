"""Measure where the time of a step goes on a CPU, operator by operator, in microseconds per step.

    python benchmarks/step_operators.py BUNDLE --precision int8,w8a8 --rows 1,4,8 --past 256,1024

Each step runs a chain of literal tokens behind a past of random rows, so it costs what a tree of that many nodes costs;
`--draft` also runs the heads. The times come from ONNX Runtime's profiler: for each node the median over the runs,
summed over the nodes of the same operator and shape. The last line is the wall time of the same step in a session
without the profiler.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from medusa_exporter import console
from medusa_exporter.files import write_json
from medusa_exporter.overwrite_check import JsonKind, check_output_file
from medusa_runtime.backends.base import Step, literal_step
from medusa_runtime.backends.ort_cpu import OrtCpuBackend, load
from medusa_runtime.backends.ort_library import import_onnxruntime
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import MedusaError
from medusa_runtime.threads import default_threads

RUNS, WARM_UPS = 30, 3
OUTPUT = JsonKind("benchmarks/step_operators.py", frozenset({"micros"}))
WEIGHTED = {"MatMulNBits", "MatMul", "MatMulIntegerToFloat", "Gemm"}  # operators shown by the sizes of their weight

Micros = dict[str, float]  # by operator


def main() -> None:
    """Parse the command line, measure and print a table for each precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", default="int4,int8,w8a8", help="Comma-separated precisions.")
    parser.add_argument("--rows", default="1,4,8", help="Comma-separated numbers of rows of a step.")
    parser.add_argument("--past", default="256,1024", help="Comma-separated KV cache lengths, in tokens.")
    parser.add_argument("--draft", action="store_true", help="Run the heads too.")
    parser.add_argument("--least", type=float, default=0.5, help="Join operators below this share, in percent.")
    parser.add_argument("--json", type=Path, help="Write all numbers to this file.")
    options = parser.parse_args()
    if options.json:
        check_output_file(options.json, OUTPUT, bundle=options.bundle)
    cases = [(rows, past) for past in numbers(options.past) for rows in numbers(options.rows)]
    found: dict[str, Any] = {}
    for precision in options.precision.split(","):
        found[precision] = measure(Bundle.open(options.bundle), precision, cases, draft=options.draft)
        print_table(options.bundle.name, precision, found[precision], options.least)
    if options.json:
        write_json(options.json, OUTPUT.marked({"micros": found}))


def numbers(text: str) -> list[int]:
    """Return comma-separated integers."""
    return [int(part) for part in text.split(",")]


def measure(
    bundle: Bundle, precision: str, cases: list[tuple[int, int]], *, draft: bool
) -> dict[str, dict[str, float]]:
    """Return for each case, "rows/past", the microseconds of each operator, and of the whole step as "step"."""
    backend = load(bundle, bundle.model, "ort-cpu", precision, default_threads(), 0)
    wall = [median(run(backend, random_step(backend, *case, draft=draft))) * 1e6 for case in cases]
    _facts, graph = bundle.graph("ort-cpu", precision)
    found = {}
    for (rows, past), micros in zip(cases, wall, strict=True):
        found[f"{rows}/{past}"] = profiled(backend, graph, (rows, past), draft=draft) | {"step": micros}
    return found


def random_step(backend: OrtCpuBackend, rows: int, past: int, *, draft: bool) -> Step:
    """Return a step of random tokens and allocate a KV cache that is filled with random rows."""
    rng = np.random.default_rng(0)
    fill(backend, past + rows)
    ids = rng.integers(0, backend.model.vocab_size, rows, dtype=np.int32)
    step = literal_step(ids, past, np.arange(rows, dtype=np.int32))
    return Step(step.input_ids, step.position_ids, step.tree_mask, step.past_length, step.logit_rows, draft)


def fill(backend: OrtCpuBackend, rows: int) -> None:
    """Allocate a KV cache for that many rows and fill it with random ones."""
    backend.allocate(1, max(2048, rows))
    backend._arena[:] = np.random.default_rng(0).standard_normal(backend._arena.shape[-1], dtype=np.float32)


def run(backend: OrtCpuBackend, step: Step) -> list[float]:
    """Run a step several times and return the seconds of each run."""
    seconds = []
    for number in range(WARM_UPS + RUNS):
        started = perf_counter()
        backend.run(step)
        if number >= WARM_UPS:
            seconds.append(perf_counter() - started)
    return seconds


def profiled(backend: OrtCpuBackend, graph: Path, case: tuple[int, int], *, draft: bool) -> Micros:
    """Run a step in a new session with the profiler and return the microseconds of each operator and shape."""
    onnxruntime = import_onnxruntime("cpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = default_threads()
    options.enable_mem_pattern = False
    options.enable_profiling = True
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        backend._session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        run(backend, random_step(backend, *case, draft=draft))  # allocates anew: nothing is bound to the old session
        events = json.loads(Path(backend._session.end_profiling()).read_text())
    nodes: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["name"], label(event["args"])].append(event["dur"])
    spent: dict[str, float] = defaultdict(float)
    for (_name, kind), durations in nodes.items():
        spent[kind] += median(durations[WARM_UPS:])
    return dict(spent)


def label(args: dict[str, Any]) -> str:
    """Return the operator, and for matrix multiplications the sizes of the weight."""
    if args["op_name"] not in WEIGHTED:
        return str(args["op_name"])
    shapes = [next(iter(one.values())) for one in args["input_type_shape"]]
    outputs = [next(iter(one.values())) for one in args["output_type_shape"]]
    return f"{args['op_name']} {shapes[0][-1]} × {outputs[0][-1]}"


def print_table(bundle: str, precision: str, found: dict[str, Micros], least: float) -> None:
    """Print operators by the time that they take in the largest case; small ones are joined."""
    last = list(found.values())[-1]
    kinds = sorted({kind for one in found.values() for kind in one} - {"step"}, key=lambda kind: -last.get(kind, 0))
    large = [kind for kind in kinds if max(one.get(kind, 0) / one["step"] for one in found.values()) * 100 >= least]
    small = [kind for kind in kinds if kind not in large]
    rows = [[kind, *(f"{one.get(kind, 0):,.0f}" for one in found.values())] for kind in large]
    rows.append(["others", *(f"{sum(one.get(kind, 0) for kind in small):,.0f}" for one in found.values())])
    rows.append(["whole step", *(f"{one['step']:,.0f}" for one in found.values())])
    console.write(console.table(["rows/past", *found], rows, title=f"{bundle}, {precision}: µs per step"))


if __name__ == "__main__":
    try:
        main()
    except (MedusaError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
