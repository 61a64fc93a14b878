"""ONNX Runtime on the CPU: KV arenas in host memory, bound without a copy."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medusa_runtime import contract
from medusa_runtime.backends.base import FloatArray, IntArray, Step
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import BundleError, CapacityError, MissingExtraError
from medusa_runtime.manifest import HeadFacts, ModelFacts
from medusa_runtime.threads import physical_cores

KEPT_BINDINGS = 8  # shapes of steps whose buffers stay bound
# The past is bound in whole multiples of so many rows; `past_length` masks the few that are not real. Binding 60 pasts
# took about 110 us a time, a row too many 14 us of attention: rarely binding beats binding exactly.
ROWS_BOUND = 8
FLOAT32 = 1  # onnx.TensorProto element type
LEAST_VERSION = (1, 31)  # before it, TopK over no rows (a step without a draft) ends the process by SIGFPE


def load(bundle: Bundle, name: str, precision: str | None, threads: int | None) -> OrtBackend:
    """Make the backend that `medusa_runtime.backends.load_backend` asks for."""
    facts, path = bundle.graph(name, precision)
    return OrtBackend(path, bundle.model, bundle.heads, name=name, precision=facts.precision, threads=threads)


class OrtBackend:
    """Runs a graph with the CPU provider.

    All layers' keys and values lie in one arena (2·layers, B, capacity, W); with one sequence its first rows are bound
    as a view, without a copy. A step's buffers are made and bound once per shape; the pasts are bound anew only when
    more of their rows are needed.
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
        """Load `graph`; `threads` None means one per physical core that this process may use."""
        self.name, self.precision, self.model, self.heads = name, precision, model, heads
        self.run_seconds = 0.0
        self._session = _session(graph, threads or physical_cores())
        self._draft_hidden = np.zeros((1, model.hidden_size), dtype=np.float32)
        self._arena = np.zeros((2 * model.layers, 1, 0, model.kv_row), dtype=np.float32)
        self._bindings: OrderedDict[tuple[int, int, int, bool], _Binding] = OrderedDict()
        self._current: _Binding | None = None

    def allocate(self, batch: int, capacity: int) -> None:
        """Lay the arenas out, keeping the rows of sequences that were there before."""
        layers, old_batch, old_capacity, width = self._arena.shape
        try:
            arena = np.zeros((layers, batch, capacity, width), dtype=np.float32)
        except MemoryError as error:
            size = layers * batch * capacity * width * 4
            raise CapacityError(
                f"no memory for a KV cache of {size / 1e6:.0f} MB ({batch} × {capacity} rows)"
            ) from error
        kept, rows = min(batch, old_batch), min(capacity, old_capacity)
        arena[:, :kept, :rows] = self._arena[:, :kept, :rows]
        self._arena = arena
        if batch != old_batch:
            self._draft_hidden = np.zeros((batch, self.model.hidden_size), dtype=np.float32)
            self._bindings.clear()
        for binding in self._bindings.values():
            binding.past_rows = -1

    def run(self, step: Step) -> None:
        """Run one step over the past held."""
        binding = self._binding(step)
        binding.load(step)
        batch = self._arena.shape[1]
        capacity = self._arena.shape[2]
        rows = int(step.past_length[0]) if batch == 1 else capacity
        if rows > capacity:  # a view of them would read beyond the arena
            raise RuntimeError(f"{rows} rows of past do not lie in an arena of {capacity}")
        rows = min(capacity, -(-rows // ROWS_BOUND) * ROWS_BOUND)
        if rows != binding.past_rows:
            binding.bind_past(self._arena, rows)
        self._current = binding
        started = time.perf_counter()
        self._session.run_with_iobinding(binding.io)
        self.run_seconds = time.perf_counter() - started

    def read_tokens(self) -> IntArray:
        """Return (B, T) int32."""
        return self._results().tokens

    def read_argmax(self) -> IntArray:
        """Return (B, R) int32."""
        return self._results().argmax

    def read_logits(self, row: int, sequence: int = 0) -> FloatArray:
        """Return (V,) float32."""
        logits: FloatArray = self._results().logits[sequence, row]
        return logits

    def commit(self, sequence: int, path: Sequence[int], length: int) -> None:
        """Copy the rows of `path` behind the past, all layers at once, and the last one's hidden state."""
        results = self._results()
        if length + len(path) > self._arena.shape[2]:
            raise RuntimeError(f"{length} + {len(path)} rows do not fit an arena of {self._arena.shape[2]}")
        target = self._arena[:, sequence, length : length + len(path)]
        first, last = path[0], path[-1]
        if last - first == len(path) - 1:  # one run, the usual case: the rank-0 chain comes first
            target[...] = results.new_rows[:, sequence, first : last + 1]
        else:
            target[...] = results.new_rows[:, sequence, list(path)]
        self._draft_hidden[sequence] = results.hidden[sequence, last]

    def _results(self) -> _Binding:
        if self._current is None:
            raise RuntimeError("no step has been run")
        return self._current

    def _binding(self, step: Step) -> _Binding:
        """Return the buffers for this step's shape, made once and kept for the last few shapes."""
        B, T = step.input_ids.shape
        key = (B, T, step.logit_rows.shape[1], step.draft)
        binding = self._bindings.get(key)
        if binding is None:
            binding = _Binding(self._session, self.model, key, self._draft_hidden)
            self._bindings[key] = binding
            if len(self._bindings) > KEPT_BINDINGS:
                self._bindings.popitem(last=False)
        else:
            self._bindings.move_to_end(key)
        return binding


class _Binding:
    """The input and output buffers of one shape of step, bound to the session once."""

    def __init__(
        self, session: Any, model: ModelFacts, key: tuple[int, int, int, bool], draft_hidden: FloatArray
    ) -> None:
        B, T, R, draft = key
        self.io = session.io_binding()
        # IOBinding.bind_input makes a device object at each call, which triples its cost; its inner call does not
        self._bind = self.io._iobinding.bind_input
        self._device = _cpu_device()
        self.past_rows = -1  # how many rows of the past are bound; -1: none yet
        self._draft_hidden = draft_hidden if draft else draft_hidden[:0]
        self._inputs = {
            contract.INPUT_IDS: np.zeros((B, T), dtype=np.int32),
            contract.POSITION_IDS: np.zeros((B, T), dtype=np.int32),
            contract.TREE_MASK: np.zeros((B, T, T), dtype=np.bool_),
            contract.PAST_LENGTH: np.zeros(B, dtype=np.int32),
            contract.DRAFT_HIDDEN: self._draft_hidden,
            contract.LOGIT_ROWS: np.zeros((B, R), dtype=np.int32),
        }
        for name, array in self._inputs.items():
            self.io.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self.tokens = np.zeros((B, T), dtype=np.int32)
        self.argmax = np.zeros((B, R), dtype=np.int32)
        self.logits = np.zeros((B, R, model.vocab_size), dtype=np.float32)
        self.hidden = np.zeros((B, T, model.hidden_size), dtype=np.float32)
        self.new_rows = np.zeros((2 * model.layers, B, T, model.kv_row), dtype=np.float32)
        layers = range(model.layers)
        outputs = {
            contract.TOKENS: self.tokens,
            contract.ARGMAX: self.argmax,
            contract.LOGITS: self.logits,
            contract.HIDDEN: self.hidden,
            **{contract.new_key(i): self.new_rows[i] for i in layers},
            **{contract.new_value(i): self.new_rows[model.layers + i] for i in layers},
        }
        for name, array in outputs.items():
            self.io.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._past_names = [*(contract.past_key(i) for i in layers), *(contract.past_value(i) for i in layers)]
        self._mask_of: object = None

    def load(self, step: Step) -> None:
        """Copy the step's inputs into the bound buffers; a mask that is the last one again is not copied."""
        inputs = self._inputs
        inputs[contract.INPUT_IDS][...] = step.input_ids
        inputs[contract.POSITION_IDS][...] = step.position_ids
        inputs[contract.PAST_LENGTH][...] = step.past_length
        if step is not self._mask_of:
            inputs[contract.TREE_MASK][...] = step.tree_mask
            inputs[contract.LOGIT_ROWS][...] = step.logit_rows
            self._mask_of = step

    def bind_past(self, arena: FloatArray, rows: int) -> None:
        """Bind the first `rows` rows of every tensor of the arena (2·layers, B, capacity, W), where they lie."""
        _, batch, _, width = arena.shape
        pointer, stride, shape = arena.ctypes.data, arena.strides[0], [batch, rows, width]
        bind, device = self._bind, self._device
        for name in self._past_names:
            bind(name, device, FLOAT32, shape, pointer)
            pointer += stride
        self.past_rows = rows


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


def _cpu_device() -> Any:
    from onnxruntime.capi.onnxruntime_pybind11_state import OrtDevice

    return OrtDevice(OrtDevice.cpu(), OrtDevice.default_memory(), 0)
