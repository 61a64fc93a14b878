"""ONNX Runtime on the CPU: one KV arena in host memory, written where it lies."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from medusa_runtime import contract
from medusa_runtime.backends.base import PREFILL_CHUNK, BackendFacts, FloatArray, Step, StepOutputs, name_outputs
from medusa_runtime.backends.checked_graph import CheckedGraph
from medusa_runtime.backends.ort_library import import_onnxruntime
from medusa_runtime.backends.ort_session import check_signature, open_session
from medusa_runtime.backends.step_errors import check_reading_thread, step_error
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
) -> OrtCpuBackend:
    """Make the backend that `medusa_runtime.backends.load_backend` asks for; a GPU's number means nothing to a CPU."""
    facts, path = bundle.graph(name, precision)
    source = CheckedGraph(path, bundle)
    return OrtCpuBackend(source, model, bundle.heads, name=name, precision=facts.precision, threads=threads)


class OrtCpuBackend:
    """Runs a graph with the CPU provider, one sequence at a time.

    All layers' keys and values lie in one arena (2·layers, kv_heads, capacity + SPARE_ROWS, head_dim), bound where it
    lies as input and output: a step writes its rows behind the past, so keeping the first ones copies nothing. The
    arrays of a step are bound where they lie, and what it gives is bound too, once for as long as the step lives.
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
    ) -> None:
        """Load `graph`; `threads` None means `threads.default_threads`.

        Raises BundleError for a graph of other inputs and outputs than the contract's.
        """
        self.name, self.precision, self.model, self.heads = name, precision, model, heads
        self.prefill_chunk = PREFILL_CHUNK
        self.padded_past_lengths: tuple[int, ...] = ()
        self.run_seconds = 0.0
        self.exclusive_use, self.logits_on_host = ExclusiveUse(f"the backend {name!r}"), True
        source = graph if isinstance(graph, CheckedGraph) else CheckedGraph(graph)
        self._weight_bytes = source.weight_bytes
        self._session = _session(source, threads or default_threads())
        state = state_size(model, heads)
        specs = contract.in_place_specs(model.layers, state, model.vocab_size, model.kv_heads, model.head_dim)
        check_signature(self._session, *specs, source.path)
        self._capacity = 0
        self._arena = np.zeros((2 * model.layers, model.kv_heads, 0, model.head_dim), dtype=np.float32)
        self._draft_hidden = np.zeros((1, state_size(model, heads)), dtype=np.float32)
        self._draft_row = self._draft_hidden[0].data
        self._bindings: WeakKeyDictionary[Step, _Binding] = WeakKeyDictionary()
        self._step: Step | None = None
        self._binding: _Binding | None = None  # that of `_step`
        self._ran: tuple[int, _Binding] | None = None  # the last run's thread and what it gave; None if it failed
        self._moving = False  # whether a commit was begun and not ended: rows of the last step are no more

    def facts(self) -> BackendFacts:
        """Describe processor and library; how fast its memory is, is not known."""
        version, row = import_onnxruntime("cpu").__version__, self.model.kv_bytes_per_token(self._arena.itemsize)
        return BackendFacts(processor_name(), "", "", "onnxruntime", version, self._weight_bytes, row, None)

    @exclusive
    def allocate(self, batch: int, capacity: int) -> None:
        """Lay the arena out, keeping the rows that were there before. A batch of more than one raises CapacityError."""
        if batch != 1:
            raise CapacityError(
                f"{self.name} decodes one sequence at a time, got a batch of {batch}; load a backend for each"
            )
        layers, heads, rows, width = self._arena.shape
        try:
            arena = np.zeros((layers, heads, capacity + SPARE_ROWS, width), dtype=np.float32)
        except MemoryError as error:
            size = layers * heads * (capacity + SPARE_ROWS) * width * 4
            raise CapacityError(f"no memory for a KV cache of {size / 1e6:.0f} MB ({capacity} rows)") from error
        kept = min(capacity + SPARE_ROWS, rows)
        arena[:, :, :kept] = self._arena[:, :, :kept]
        self._step = None  # what the last one gave can still be read
        self._bindings.clear()  # they hold the arena before
        self._arena = arena  # last, and before the capacity: wherever this ends, no step is bound to less than it needs
        self._capacity = capacity

    @exclusive
    def run(self, step: Step) -> None:
        """Run one step over the past held."""
        self._ran = None
        binding = self._binding if step is self._step else None
        if binding is None:
            binding = self._bind(step)
        end = binding.past_length[0] + binding.nodes
        if end > self._capacity:  # the step would write beyond the arena
            raise RuntimeError(f"{end} rows do not lie in an arena of {self._capacity}")
        started = time.perf_counter()
        try:
            self._session.run_with_iobinding(binding.io)
        except Exception as error:  # the library raises many kinds
            raise step_error(self.name, self.precision, binding.nodes, int(binding.past_length[0]), error) from error
        self.run_seconds = time.perf_counter() - started
        self._moving = False
        self._ran = threading.get_ident(), binding

    def read_tokens(self, sequence: int = 0) -> list[int]:
        """Return T ids."""
        return self._results().tokens[sequence].tolist()

    def read_argmax(self, sequence: int = 0) -> list[int]:
        """Return R ids."""
        return self._results().argmax[sequence].tolist()

    def read_logits(self, row: int, sequence: int = 0) -> FloatArray:
        """Return (V,) float32."""
        logits: FloatArray = self._results().logits[sequence, row]
        return logits

    def read_outputs(self) -> StepOutputs:
        """Return copies of all that the last run gave; its keys and values lie behind the past."""
        ran, layers = self._results(), self.model.layers
        length, T = ran.past_length[0], ran.nodes
        written = ran.arena[:, :, length : length + T]  # (2·layers, kv_heads, T, head_dim)
        new = written.transpose(0, 2, 1, 3).reshape(2 * layers, 1, T, self.model.kv_row)
        return name_outputs(
            np.array(ran.tokens), np.array(ran.argmax), ran.logits.copy(), np.array(ran.hidden), new.copy()
        )

    @exclusive
    def commit(self, sequence: int, path: Sequence[int], length: int) -> None:
        """Move the rows of `path` together, all layers at once, and copy the last one's hidden state.

        The usual path, the first rows of the step (the rank-0 chain comes first), lies where it belongs already.
        """
        end, last = length + len(path), path[-1]
        if end > self._capacity:
            raise RuntimeError(f"{length} + {len(path)} rows do not fit an arena of {self._capacity}")
        ran = self._results()
        if self._moving:
            raise RuntimeError("an earlier commit of this step was interrupted; run the step again")
        self._moving = True
        if last != len(path) - 1:
            arena = self._arena
            for row, node in enumerate(path):  # ascending, so that no row is overwritten before it is read
                if row != node:
                    arena[:, :, length + row] = arena[:, :, length + node]
        self._draft_row[:] = ran.hidden[sequence][last]
        self._moving = False

    def _results(self) -> _Binding:
        ran = self._ran
        if ran is None:
            raise RuntimeError("no step has been run")
        check_reading_thread(self.name, ran[0])
        return ran[1]

    def _bind(self, step: Step) -> _Binding:
        """Make `step` the one that runs, with buffers bound now if it is new."""
        binding = self._bindings.get(step)
        if binding is None:
            try:
                binding = _Binding(self._session, self.model, step, self._draft_hidden, self._arena)
            except Exception as error:  # of the library, or of numpy for want of memory
                T, length = step.input_ids.shape[1], int(step.past_length.max())
                raise step_error(self.name, self.precision, T, length, error) from error
            self._bindings[step] = binding
        self._step = None  # at no moment a step with the binding of another
        self._binding = binding
        self._step = step
        return binding


class _Binding:
    """The arrays of one step, the buffers of what it gives, and the arena, bound to the session once."""

    def __init__(
        self, session: Any, model: ModelFacts, step: Step, draft_hidden: FloatArray, arena: FloatArray
    ) -> None:
        (B, T), R = step.input_ids.shape, step.logit_rows.shape[1]
        layers = range(model.layers)
        pasts = [*map(contract.past_key, layers), *map(contract.past_value, layers)]
        presents = [*map(contract.present_key, layers), *map(contract.present_value, layers)]
        self.io = session.io_binding()
        self._inputs = {  # held, or their memory would go
            contract.INPUT_IDS: step.input_ids,
            contract.POSITION_IDS: step.position_ids,
            contract.TREE_MASK: step.tree_mask,
            contract.PAST_LENGTH: step.past_length,
            contract.DRAFT_HIDDEN: draft_hidden if step.draft else draft_hidden[:0],
            contract.LOGIT_ROWS: step.logit_rows,
            **{name: rows[None] for name, rows in zip(pasts, arena, strict=True)},
        }
        self.logits = np.zeros((B, R, model.vocab_size), dtype=np.float32)
        tokens, argmax = np.zeros((B, T), dtype=np.int32), np.zeros((B, R), dtype=np.int32)
        hidden = np.zeros((B, T, draft_hidden.shape[1]), dtype=np.float32)
        outputs = {
            contract.TOKENS: tokens,
            contract.ARGMAX: argmax,
            contract.LOGITS: self.logits,
            contract.HIDDEN: hidden,
            **{name: rows[None] for name, rows in zip(presents, arena, strict=True)},
        }
        for bind, arrays in ((self.io.bind_input, self._inputs), (self.io.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self.nodes, self.arena = T, arena
        self.past_length = step.past_length.data
        self.tokens, self.argmax = _rows(tokens), _rows(argmax)
        self.hidden = [_rows(of_one) for of_one in hidden]


def _rows(array: NDArray[Any]) -> list[memoryview]:
    """Return the rows of (N, M) as memoryviews: reading one takes a third of what it takes through numpy."""
    return [row.data for row in array]


def _session(graph: CheckedGraph, threads: int) -> Any:
    onnxruntime = import_onnxruntime("cpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # every length of the past would leave a pattern behind
    # threads that wait for work spin: while a step runs that is what makes it fast, after it they would take the
    # processors from another session of the process (two in turns: half as fast)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return open_session(onnxruntime, graph, options, ["CPUExecutionProvider"])
