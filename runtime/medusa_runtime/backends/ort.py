"""ONNX Runtime on the CPU: KV arenas in host memory, bound without a copy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from medusa_runtime import contract
from medusa_runtime.backends.base import FloatArray, Step
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import BundleError, CapacityError, MissingExtraError
from medusa_runtime.facts import HeadFacts, ModelFacts, state_size
from medusa_runtime.threads import default_threads

# The past is bound in whole multiples of so many rows; `past_length` masks the few that are not real. Binding 60 pasts
# takes 60 to 130 us a time, a row too many 14 us of attention: rarely binding beats binding exactly.
ROWS_BOUND = 8
# Not where weights are quantised: a row too many moves the rows behind it, whose terms are then added up in another
# order, and of activations rounded to 8 bits the least difference makes another rounding. Bound exactly, every row of a
# chain lies where plain decoding has it, and gives the same bits.
EXACT_ROWS = 1
LEAST_VERSION = (1, 31)  # before it, TopK over no rows (a step without a draft) ends the process by SIGFPE


def load(bundle: Bundle, name: str, precision: str | None, threads: int | None) -> OrtBackend:
    """Make the backend that `medusa_runtime.backends.load_backend` asks for."""
    facts, path = bundle.graph(name, precision)
    return OrtBackend(path, bundle.model, bundle.heads, name=name, precision=facts.precision, threads=threads)


class OrtBackend:
    """Runs a graph with the CPU provider.

    All layers' keys and values lie in one arena (2·layers, B, capacity, W); with one sequence its first rows are bound
    as a view, without a copy. The arrays of a step are bound where they lie, and what it gives is bound too, once for
    as long as the step lives; the pasts are bound anew only when more of their rows are needed.
    """

    def __init__(
        self,
        graph: Path,
        model: ModelFacts,
        heads: HeadFacts,
        *,
        name: str = "ort-cpu",
        precision: str = "fp32",
        threads: int | None = None,
    ) -> None:
        """Load `graph`; `threads` None means `threads.default_threads`."""
        self.name, self.precision, self.model, self.heads = name, precision, model, heads
        self.run_seconds = 0.0
        self._rows_bound = ROWS_BOUND if precision == "fp32" else EXACT_ROWS
        self._session = _session(graph, threads or default_threads())
        self._value_of, self._device = _values()
        self._batch, self._capacity = 1, 0
        self._arena = np.zeros((2 * model.layers, 1, 0, model.kv_row), dtype=np.float32)
        self._hold_drafts()
        self._bindings: WeakKeyDictionary[Step, _Binding] = WeakKeyDictionary()
        self._pasts: dict[int, list[Any]] = {}  # by rows: what has been bound once is bound again at half the cost
        self._step: Step | None = None
        self._binding: _Binding | None = None  # that of `_step`, the last one run

    def allocate(self, batch: int, capacity: int) -> None:
        """Lay the arenas out, keeping the rows of sequences that were there before."""
        layers, width = self._arena.shape[0], self._arena.shape[3]
        try:
            arena = np.zeros((layers, batch, capacity, width), dtype=np.float32)
        except MemoryError as error:
            size = layers * batch * capacity * width * 4
            raise CapacityError(
                f"no memory for a KV cache of {size / 1e6:.0f} MB ({batch} × {capacity} rows)"
            ) from error
        kept, rows = min(batch, self._batch), min(capacity, self._capacity)
        arena[:, :kept, :rows] = self._arena[:, :kept, :rows]
        same_batch = batch == self._batch
        self._arena, self._batch, self._capacity = arena, batch, capacity
        if not same_batch:
            self._hold_drafts()
            self._bindings.clear()
            self._step = self._binding = None
        self._pasts.clear()
        for binding in self._bindings.values():
            binding.past_rows = -1

    def run(self, step: Step) -> None:
        """Run one step over the past held."""
        if step is not self._step:
            self._bind(step)
        binding = self._results()
        rows = binding.past_length[0] if self._batch == 1 else self._capacity
        if rows > self._capacity:  # a view of them would read beyond the arena
            raise RuntimeError(f"{rows} rows of past do not lie in an arena of {self._capacity}")
        rows = min(rows + -rows % self._rows_bound, self._capacity)
        if rows != binding.past_rows:
            binding.bind_past(self._pasts.get(rows) or self._past(rows), rows)
        started = time.perf_counter()
        self._session.run_with_iobinding(binding.io)
        self.run_seconds = time.perf_counter() - started

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

    def commit(self, sequence: int, path: Sequence[int], length: int) -> None:
        """Copy the rows of `path` behind the past, all layers at once, and the last one's hidden state."""
        results = self._results()
        end = length + len(path)
        if end > self._capacity:
            raise RuntimeError(f"{length} + {len(path)} rows do not fit an arena of {self._capacity}")
        first, last = path[0], path[-1]
        if last - first == end - 1 - length:  # one run, the usual case: the rank-0 chain comes first
            self._arena[:, sequence, length:end] = results.new_rows[:, sequence, first : last + 1]
        else:  # node by node: one copy by a list of nodes takes four times as long
            for row, node in enumerate(path, start=length):
                self._arena[:, sequence, row] = results.new_rows[:, sequence, node]
        self._draft_rows[sequence][:] = results.hidden[sequence][last]

    def _hold_drafts(self) -> None:
        """Make room for the hidden state of each sequence's last row."""
        self._draft_hidden = np.zeros((self._batch, state_size(self.model, self.heads)), dtype=np.float32)
        self._draft_rows = _rows(self._draft_hidden)

    def _past(self, rows: int) -> list[Any]:
        """The first `rows` rows of every tensor of the arena, where they lie, as ONNX Runtime's values; kept."""
        values = self._pasts[rows] = [self._value_of(tensor[:, :rows], self._device) for tensor in self._arena]
        return values

    def _results(self) -> _Binding:
        if self._binding is None:
            raise RuntimeError("no step has been run")
        return self._binding

    def _bind(self, step: Step) -> None:
        """Make `step` the one that runs, with buffers bound now if it is new."""
        binding = self._bindings.get(step)
        if binding is None:
            binding = self._bindings[step] = _Binding(self._session, self.model, step, self._draft_hidden)
        self._step, self._binding = step, binding


class _Binding:
    """The arrays of one step and the buffers of what it gives, bound to the session once."""

    def __init__(self, session: Any, model: ModelFacts, step: Step, draft_hidden: FloatArray) -> None:
        (B, T), R = step.input_ids.shape, step.logit_rows.shape[1]
        layers = range(model.layers)
        self.io = session.io_binding()
        self._bind = self.io._iobinding.bind_ortvalue_input
        self._past_names = [*(contract.past_key(i) for i in layers), *(contract.past_value(i) for i in layers)]
        self.past_rows = -1  # how many rows of the past are bound; -1: none yet
        self._inputs = {  # held, or their memory would go
            contract.INPUT_IDS: step.input_ids,
            contract.POSITION_IDS: step.position_ids,
            contract.TREE_MASK: step.tree_mask,
            contract.PAST_LENGTH: step.past_length,
            contract.DRAFT_HIDDEN: draft_hidden if step.draft else draft_hidden[:0],
            contract.LOGIT_ROWS: step.logit_rows,
        }
        self.logits = np.zeros((B, R, model.vocab_size), dtype=np.float32)
        self.new_rows = np.zeros((2 * model.layers, B, T, model.kv_row), dtype=np.float32)
        tokens, argmax = np.zeros((B, T), dtype=np.int32), np.zeros((B, R), dtype=np.int32)
        hidden = np.zeros((B, T, draft_hidden.shape[1]), dtype=np.float32)
        outputs = {
            contract.TOKENS: tokens,
            contract.ARGMAX: argmax,
            contract.LOGITS: self.logits,
            contract.HIDDEN: hidden,
            **{contract.new_key(i): self.new_rows[i] for i in layers},
            **{contract.new_value(i): self.new_rows[model.layers + i] for i in layers},
        }
        for bind, arrays in ((self.io.bind_input, self._inputs), (self.io.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self.past_length = step.past_length.data
        self.tokens, self.argmax = _rows(tokens), _rows(argmax)
        self.hidden = [_rows(of_one) for of_one in hidden]

    def bind_past(self, values: list[Any], rows: int) -> None:
        """Bind the pasts of all layers, keys first: one value of (B, rows, W) each."""
        bind = self._bind
        for name, value in zip(self._past_names, values, strict=True):
            bind(name, value)
        self.past_rows = rows


def _rows(array: NDArray[Any]) -> list[memoryview]:
    """Return the rows of (N, M) as memoryviews: reading one takes a third of what it takes through numpy."""
    return [row.data for row in array]


def _session(graph: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            f"onnxruntime is not installed ({error}); it comes with: pip install 'medusa-export[cpu]'"
        ) from error
    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < LEAST_VERSION:
        raise MissingExtraError(
            f"onnxruntime {onnxruntime.__version__} is too old, it crashes on steps without a draft; expected "
            f"{'.'.join(map(str, LEAST_VERSION))} or newer: pip install --upgrade 'medusa-export[cpu]'"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # every length of the past would leave a pattern behind
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library raises many kinds
        raise BundleError(f"ONNX Runtime {onnxruntime.__version__} cannot load {graph}: {error}") from error


def _values() -> tuple[Any, Any]:
    """What makes ONNX Runtime's value of an array without a copy, and the device it wants to be told.

    The inner ones: the public OrtValue makes a device object at each call, which doubles the cost.
    """
    from onnxruntime.capi.onnxruntime_pybind11_state import OrtDevice, OrtValue

    return OrtValue.ortvalue_from_numpy, OrtDevice(OrtDevice.cpu(), OrtDevice.default_memory(), 0)
