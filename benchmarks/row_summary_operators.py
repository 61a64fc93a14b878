"""Measures the operators that summarise rows alone, for `row_summaries.py --operators`."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from medusa_exporter.compare.row_summaries import summary_error
from medusa_runtime import contract
from medusa_runtime.backends.base import RowSummary
from medusa_runtime.backends.ort_library import import_onnxruntime
from medusa_runtime.threads import default_threads
from numpy.typing import NDArray
from row_summary_variants import NOTHING, ROWS_ALONE, VARIANTS, variant_model

ROWS = (1, 8, 16, 64)  # S
WARM = 5  # runs of each shape: the first one is plain, the second captures a CUDA graph
Floats = NDArray[np.float32]


def compare_operators(backend: str, sizes: list[int], rounds: int) -> float:
    """Print the microseconds of all variants for each V and S; return the largest error of a summary."""
    onnxruntime = import_onnxruntime("gpu" if backend == "ort-cuda" else "cpu")
    if backend == "ort-cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    print("microseconds of a run, and above those of the first row, whose graph has one operator on no logits")
    return max(_of_vocabulary(onnxruntime, backend, V, rounds) for V in sizes)


def _of_vocabulary(onnxruntime: Any, backend: str, V: int, rounds: int) -> float:
    """Measure all variants with one vocabulary."""
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(1, max(ROWS), V)).astype(np.float32)
    shared = onnxruntime.OrtValue.ortvalue_from_numpy(logits, "cuda" if backend == "ort-cuda" else "cpu", 0)
    runs: dict[str, list[_Run]] = {}
    for name in (NOTHING, ROWS_ALONE, *VARIANTS):
        try:
            session = _session(onnxruntime, backend, variant_model(name, V))
            runs[name] = [_Run(onnxruntime, session, shared, S, number) for number, S in enumerate(ROWS)]
            for run in runs[name]:
                for _ in range(WARM):
                    run.run()
        except Exception as error:  # the provider lacks an operator; the other variants still run
            print(f"{name} does not run: {str(error).splitlines()[0][:200]}", flush=True)
            runs.pop(name, None)
    errors = {
        name: summary_error(logits[0], of_one[-1].summaries()) for name, of_one in runs.items() if name in VARIANTS
    }
    seconds = {name: [_Spent() for _ in ROWS] for name in runs}
    for column in range(len(ROWS)):
        for _ in range(rounds):
            for index in rng.permutation(len(runs)):
                name = list(runs)[index]
                seconds[name][column].add(runs[name][column])
    patterns = pattern_rows(V, max(ROWS))
    shared.update_inplace(patterns[None])
    for name, of_one in runs.items():
        if name in VARIANTS:
            for run in of_one:
                run.run()
                errors[name] = max(errors[name], summary_error(patterns[: run.rows], run.summaries()))
    print(f"\nV = {V:<35}" + "".join(f"{f'S = {S}':>18}" for S in ROWS) + f"{'error':>10}")
    empty = [spent.microseconds for spent in seconds[NOTHING]]
    for name in runs:
        columns = [spent.microseconds for spent in seconds[name]]
        cells = "".join(f"{got:9.1f}{got - least:+9.1f}" for got, least in zip(columns, empty, strict=True))
        print(f"{name:39}{cells}" + (f"{errors[name]:10.2g}" if name in errors else ""), flush=True)
    return max(errors.values())


class _Spent:
    """The seconds of all runs of one variant and one S."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def add(self, run: _Run) -> None:
        started = perf_counter()
        run.run()
        self._seconds.append(perf_counter() - started)

    @property
    def microseconds(self) -> float:
        return 1e6 * median(self._seconds)


class _Run:
    """A session's bound inputs and outputs for one S, with all tensors on the device."""

    def __init__(self, onnxruntime: Any, session: Any, logits: Any, rows: int, number: int) -> None:
        self.rows = rows
        kind, V = logits.device_name(), logits.shape()[-1]
        index = onnxruntime.OrtValue.ortvalue_from_numpy(np.arange(rows, dtype=np.int32)[None], kind, 0)
        self._io_binding, self._run = session.io_binding(), session.run_with_iobinding
        self._inputs = {contract.LOGITS: logits, contract.SUMMARY_ROWS: index}
        for tensor in session.get_inputs():
            self._io_binding.bind_ortvalue_input(tensor.name, self._inputs[tensor.name])
        K, self._outputs = contract.summary_tokens(V), []
        shapes = {contract.TOP_IDS: (1, rows, K), contract.TOP_LOGITS: (1, rows, K)}
        kinds = {contract.TOP_LOGITS: np.float32, contract.LOGSUMEXP: np.float32, contract.FINITE: np.bool_}
        for tensor in session.get_outputs():
            shape, element = shapes.get(tensor.name, (1, rows)), kinds.get(tensor.name, np.int32)
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, element, kind, 0)
            self._io_binding.bind_ortvalue_output(tensor.name, value)
            self._outputs.append(value)
        self._options = []
        for graph in (-1, number + 1):  # of the first run, of all later ones
            options = onnxruntime.RunOptions()
            if kind == "cuda":
                options.add_run_config_entry("gpu_graph_id", str(graph))
            self._options.append(options)

    def run(self) -> None:
        """Run the operators and wait until they are done."""
        self._run(self._io_binding, self._options[0])
        self._options = self._options[-1:]

    def summaries(self) -> list[RowSummary]:
        """Return the summaries of the last run."""
        columns = [value.numpy()[0] for value in self._outputs]
        return [
            RowSummary(ids, top, float(logsumexp), bool(finite))
            for ids, top, logsumexp, finite in zip(*columns, strict=True)
        ]


def _session(onnxruntime: Any, backend: str, model: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = default_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # threads of the sessions in turn
    providers: list[Any] = ["CPUExecutionProvider"]
    if backend == "ort-cuda":
        providers = [("CUDAExecutionProvider", {"enable_cuda_graph": "1", "use_tf32": "0"}), *providers]
    return onnxruntime.InferenceSession(model, options, providers=providers)


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
