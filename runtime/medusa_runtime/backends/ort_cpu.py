"""The ONNX Runtime backend on the CPU: one KV arena in host memory, which the graph updates in place."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from medusa_runtime import contract
from medusa_runtime.backends.amx import has_amx, is_refused, permitted_amx
from medusa_runtime.backends.base import (
    PREFILL_CHUNK,
    BackendFacts,
    FloatArray,
    RowSummary,
    Step,
    StepOutputs,
    name_outputs,
)
from medusa_runtime.backends.bound_step import BoundStep
from medusa_runtime.backends.checked_graph import CheckedGraph
from medusa_runtime.backends.cpu_session import open_cpu_session
from medusa_runtime.backends.node_check import check_node_ids, least_node_id
from medusa_runtime.backends.ort_library import import_onnxruntime
from medusa_runtime.backends.ort_session import check_signature
from medusa_runtime.backends.saved_past import SavedPast, check_length
from medusa_runtime.backends.step_errors import COMMITTED_BEFORE, check_reading_thread, step_error
from medusa_runtime.bundle import Bundle
from medusa_runtime.contract import SPARE_ROWS
from medusa_runtime.errors import CapacityError
from medusa_runtime.exclusive import ExclusiveUse, exclusive
from medusa_runtime.facts import HeadFacts, ModelFacts, state_size
from medusa_runtime.threads import default_threads, processor_name


def load(
    bundle: Bundle,
    model: ModelFacts,
    name: str,
    precision: str | None,
    threads: int | None,
    gpu: int,  # noqa: ARG001
    map_weights: bool = False,
) -> OrtCpuBackend:
    """Load a bundle's graph for `medusa_runtime.backends.load_backend`; `gpu` is ignored on a CPU."""
    facts, path = bundle.graph(name, precision)
    graph = CheckedGraph(path, bundle)
    return OrtCpuBackend(
        graph,
        model,
        bundle.heads,
        name=name,
        precision=facts.precision,
        threads=threads,
        map_weights=map_weights,
    )


class OrtCpuBackend:
    """Runs a graph with ONNX Runtime's CPU provider, one sequence at a time.

    Keys and values of all layers are in one arena of shape (2 · layers, kv_heads, capacity + SPARE_ROWS, head_dim),
    bound as input and as output: a step writes its rows behind the past, so keeping its first rows copies nothing.
    Every step is bound once, on its first run: its input arrays are read in place, and its outputs get buffers that
    live as long as the step.
    """

    def __init__(
        self,
        graph: Path | CheckedGraph,
        model: ModelFacts,
        heads: HeadFacts,
        *,
        name: str = "ort-cpu",
        precision: str = "fp32",
        threads: int | None = None,
        map_weights: bool = False,
    ) -> None:
        """Load a graph.

        Args:
            graph: The graph, or the path of its file.
            model: The model.
            heads: The Medusa heads.
            name: Name of the backend.
            precision: Precision of the graph's weights.
            threads: Number of threads; None for `medusa_runtime.threads.default_threads`.
            map_weights: Whether weights are read from the mapped files where ONNX Runtime does not repack them.

        Raises:
            BundleError: The graph cannot be loaded, or its inputs and outputs are not those of the contract.
            MissingExtraError: ONNX Runtime is not installed or too old.
        """
        self.name, self.precision, self.model, self.heads = name, precision, model, heads
        self.prefill_chunk = PREFILL_CHUNK
        self.padded_past_lengths: tuple[int, ...] = ()
        self.literal_counts, self.mixes_drafts = (1, 2, 3, 5, 7, 9, 11, 15), False
        self.run_seconds = 0.0
        self.exclusive_use, self.logits_on_host = ExclusiveUse(f"the backend {name!r}"), True
        checked = graph if isinstance(graph, CheckedGraph) else CheckedGraph(graph)
        self._weight_bytes = checked.weight_bytes
        self._threads = threads or default_threads()
        with permitted_amx():
            self._session = open_cpu_session(checked, self._threads, map_weights)
        hidden_size = state_size(model, heads)
        specs = contract.in_place_specs(model.layers, hidden_size, model.vocab_size, model.kv_heads, model.head_dim)
        check_signature(self._session, *specs, checked.path)
        self._capacity = 0
        self._arena = np.zeros((2 * model.layers, model.kv_heads, 0, model.head_dim), dtype=np.float32)
        self._draft_hidden = np.zeros((1, hidden_size), dtype=np.float32)
        self._draft_row = self._draft_hidden[0].data
        self.past_row_bytes = model.kv_bytes_per_token(self._arena.itemsize)
        self._bound_steps: WeakKeyDictionary[Step, BoundStep] = WeakKeyDictionary()
        self._step: Step | None = None  # the step run last …
        self._bound: BoundStep | None = None  # … and its binding
        self._completed: _CompletedRun | None = None  # the last run, if it succeeded
        self._commit_begun = False  # whether a commit of the last run has moved rows, so that none can follow

    def facts(self) -> BackendFacts:
        """Describe processor and library; the bandwidth of its memory is not measured.

        A processor whose AMX is used is another device than one without: its steps take other times.
        """
        version = import_onnxruntime("cpu").__version__
        device = f"{processor_name()}, AMX" if has_amx() and not is_refused() else processor_name()
        weights, row = self._weight_bytes, self.past_row_bytes
        return BackendFacts(device, "", "", "onnxruntime", version, weights, row, None, self._threads)

    @exclusive
    def allocate(self, batch: int, capacity: int) -> None:
        """Allocate an arena and copy the previous one's rows. Raises CapacityError for a batch of more than one."""
        if batch != 1:
            raise CapacityError(
                f"{self.name} decodes one sequence at a time, got a batch of {batch}; load a backend for each sequence"
            )
        layers, heads, rows, width = self._arena.shape
        try:
            arena = np.zeros((layers, heads, capacity + SPARE_ROWS, width), dtype=np.float32)
        except MemoryError as error:
            size = layers * heads * (capacity + SPARE_ROWS) * width * 4
            raise CapacityError(
                f"no memory for a KV cache of {size / 1e6:.0f} MB ({capacity} rows); close what else uses the memory, "
                "or set a smaller max_length"
            ) from error
        kept = min(capacity + SPARE_ROWS, rows)
        arena[:, :, :kept] = self._arena[:, :, :kept]
        self._step = None  # the results of the last run can still be read
        self._bound_steps.clear()  # they are bound to the previous arena
        # The capacity is set after the arena: after an interrupt at any line, no step is bound to too small an arena.
        self._arena = arena
        self._capacity = capacity

    @exclusive
    def run(self, step: Step) -> None:
        """Run one step and wait until its results can be read."""
        self._completed = None
        bound = self._bound if step is self._step else None
        if bound is None:
            bound = self._bind(step)
        end = bound.past_length[0] + bound.nodes
        if end > self._capacity:  # the step would write beyond the arena
            raise RuntimeError(f"{end} rows do not fit an arena of {self._capacity}; allocate a larger one first")
        if min(bound.ids) < least_node_id(step, self.heads):
            check_node_ids(step, self.heads)
        started = time.perf_counter()
        try:
            self._session.run_with_iobinding(bound.io_binding)
        except Exception as error:  # the library raises many kinds
            raise step_error(self.name, self.precision, step, error) from error
        self.run_seconds = time.perf_counter() - started
        self._commit_begun = False
        self._completed = _CompletedRun(threading.get_ident(), bound)

    def read_tokens(self, sequence: int = 0) -> list[int]:
        """Return the ids of the T nodes."""
        return self._last_run().tokens[sequence].tolist()

    def read_argmax(self, sequence: int = 0) -> list[int]:
        """Return the greedy next ids of the R rows."""
        return self._last_run().argmax[sequence].tolist()

    def read_logits(self, row: int, sequence: int = 0) -> FloatArray:
        """Return the logits of one row: (V,) float32."""
        logits: FloatArray = self._last_run().logits[sequence, row]
        return logits

    def read_summary(self, row: int, sequence: int = 0) -> RowSummary | None:
        """Return None: `read_logits` copies nothing, so the graph computes no summaries."""
        self._last_run().logits[sequence, row]  # raises for a row that does not exist
        return None

    def read_finite(self, row: int, sequence: int = 0) -> None:
        """Return None: the graph computes no flags, since the rows can be read."""
        self._last_run().logits[sequence, row]  # raises for a row that does not exist

    def read_outputs(self) -> StepOutputs:
        """Return copies of all outputs of the last run; its keys and values are in the arena, behind the past."""
        bound, layers = self._last_run(), self.model.layers
        length, T = bound.past_length[0], bound.nodes
        written = bound.arena[:, :, length : length + T]  # (2 · layers, kv_heads, T, head_dim)
        new = written.transpose(0, 2, 1, 3).reshape(2 * layers, 1, T, self.model.kv_row)
        return name_outputs(
            np.array(bound.tokens), np.array(bound.argmax), bound.logits.copy(), np.array(bound.hidden), new.copy()
        )

    @exclusive
    def commit(self, sequence: int, path: Sequence[int], length: int) -> None:
        """Move the rows of `path` directly behind the past, and copy the last one's hidden state for the next draft.

        The nodes of the rank-0 chain come first in a tree, so the rows of the most common path are already in place.
        """
        end, last = length + len(path), path[-1]
        if end > self._capacity:
            raise RuntimeError(
                f"{length} + {len(path)} rows do not fit an arena of {self._capacity}; allocate a larger one first"
            )
        bound = self._last_run()
        if self._commit_begun:
            raise RuntimeError(COMMITTED_BEFORE)
        self._commit_begun = True
        if last != len(path) - 1:
            arena = self._arena
            for row, node in enumerate(path):  # ascending, so that no row is overwritten before it is read
                if row != node:
                    arena[:, :, length + row] = arena[:, :, length + node]
        self._draft_row[:] = bound.hidden[sequence][last]

    def default_prefix_bytes(self) -> int:
        """Return 256 MiB."""
        return 256 << 20

    @exclusive
    def save_past(self, length: int, sequence: int = 0) -> SavedPast:  # noqa: ARG002
        """Copy rows of the arena: (2 · layers, kv_heads, length, head_dim) float32 in host memory."""
        check_length(length, self._capacity)
        try:
            return SavedPast(length, self._arena[:, :, :length].copy())
        except MemoryError as error:
            size = length * self.past_row_bytes / 1e6
            raise CapacityError(
                f"no memory for a copy of {length} rows ({size:.0f} MB); set a smaller prefix_cache_bytes"
            ) from error

    @exclusive
    def restore_past(self, saved: SavedPast, length: int, sequence: int = 0) -> None:  # noqa: ARG002
        """Copy rows back into the arena."""
        check_length(length, self._capacity, saved)
        self._arena[:, :, :length] = saved.data[:, :, :length]

    def _last_run(self) -> BoundStep:
        completed = self._completed
        if completed is None:
            raise RuntimeError("no step has been run")
        check_reading_thread(self.name, completed.thread)
        return completed.bound

    def _bind(self, step: Step) -> BoundStep:
        """Make `step` the one that runs, and bind it if it is new."""
        bound = self._bound_steps.get(step)
        if bound is None:
            try:
                bound = BoundStep(self._session, self.model, step, self._draft_hidden, self._arena)
            except Exception as error:  # of the library, or of numpy for want of memory
                raise step_error(self.name, self.precision, step, error) from error
            self._bound_steps[step] = bound
        self._step = None  # after an interrupt at any line, no step has the binding of another
        self._bound = bound
        self._step = step
        return bound


class _CompletedRun(NamedTuple):
    """A run that succeeded: the identifier of its thread, and the step with its outputs."""

    thread: int
    bound: BoundStep
