"""The base class of GPU backends: memory by address, and one prepared binding for each shape of step.

A step goes through these objects, in this order:

1. `StepShape`: the sizes of the step, its past padded to one of a few lengths.
2. `BindingCache`: finds the `StepBinding` of the shape, or a new one is made over the `BatchMemory`.
3. `StepExecutor`: writes the step's inputs, runs the binding and returns a `CompletedRun`.
4. `CompletedRun`: reads the outputs and commits the accepted nodes.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence

from medusa_runtime.backends.base import PREFILL_CHUNK, BackendFacts, FloatArray, RowSummary, Step, StepOutputs
from medusa_runtime.backends.batch_memory import BatchMemory
from medusa_runtime.backends.binding_cache import BindingCache
from medusa_runtime.backends.completed_run import CompletedRun
from medusa_runtime.backends.device import Device, DeviceTensor
from medusa_runtime.backends.element_types import kv_type
from medusa_runtime.backends.host_buffers import HostBuffers
from medusa_runtime.backends.kv_arena import ArenaFactory
from medusa_runtime.backends.layer_major_arena import LayerMajorArena
from medusa_runtime.backends.node_check import check_node_ids
from medusa_runtime.backends.saved_past import SavedPast, check_length
from medusa_runtime.backends.step_binding import StepBinding, StepRunner
from medusa_runtime.backends.step_errors import check_reading_thread, step_error
from medusa_runtime.backends.step_executor import StepExecutor
from medusa_runtime.backends.step_shape import StepShape, is_causal, padded_past_lengths
from medusa_runtime.errors import CapacityError, MedusaError, WrongThreadError
from medusa_runtime.exclusive import ExclusiveUse, exclusive
from medusa_runtime.facts import HeadFacts, ModelFacts, state_size


class DeviceBackend(ABC):
    """A backend on a device (implements `medusa_runtime.backends.base.Backend`).

    A subclass loads the library's sessions or engines and provides three methods: `_padded_shape`, `_new_runner` and
    `_unload`. It sets `_new_arena` where its graph needs another layout of the KV cache, and `in_one_thread` where its
    library keeps state for each thread.
    """

    in_one_thread = False  # whether all steps must run in the same thread

    def __init__(self, name: str, precision: str, model: ModelFacts, heads: HeadFacts, device: Device) -> None:
        """Set the facts. Device memory is allocated later, by `allocate` and by the first step of each shape.

        Args:
            name: Name of the backend.
            precision: Precision of the graph.
            model: The model. Its context may be shorter than the trained one: the KV cache is allocated for it.
            heads: The Medusa heads.
            device: Where the steps run.
        """
        self.name, self.precision, self.model, self.heads = name, precision, model, heads
        self.prefill_chunk = PREFILL_CHUNK
        self.padded_past_lengths = padded_past_lengths(model.context)
        self.literal_counts: Sequence[int] = (7, 15)
        self.mixes_drafts = False
        self.run_seconds = 0.0
        self.exclusive_use, self.logits_on_host = ExclusiveUse(f"the backend {name!r}"), False
        self._device, self._kv_type = device, kv_type(precision)
        self._new_arena: ArenaFactory = LayerMajorArena
        self.past_row_bytes = model.kv_bytes_per_token(self._kv_type.itemsize)
        self._executor = StepExecutor(name, precision, device)
        self._cache: BindingCache | None = None  # the memory and its bindings; None before `allocate`
        self._completed: CompletedRun | None = None  # the last run, if it succeeded
        self._thread: threading.Thread | None = None  # the thread of the first step, if `in_one_thread`

    def __del__(self) -> None:
        """Free bindings and their CUDA graphs first, then sessions or engines; the device and its stream come last."""
        self._completed = self._cache = None
        self._unload()

    @abstractmethod
    def _unload(self) -> None:
        """Drop the library's sessions or engines, some of which may not have been loaded."""

    @abstractmethod
    def _padded_shape(self, shape: StepShape) -> StepShape:
        """Return the shape that a step runs in: its own, or a larger one that it is padded to."""

    @abstractmethod
    def _new_runner(
        self, shape: StepShape, inputs: dict[str, DeviceTensor], outputs: dict[str, DeviceTensor]
    ) -> StepRunner:
        """Prepare to run steps of a padded shape.

        Args:
            shape: A shape that `_padded_shape` returned.
            inputs: All inputs that a graph may have, by the contract's names.
            outputs: All outputs that a graph may have, by the contract's names.
        """

    @exclusive
    def allocate(self, batch: int, capacity: int) -> None:
        """Allocate the KV arena; a single sequence gets the model's whole context at once."""
        current = None if self._cache is None else self._cache.memory
        rows = self.model.context if batch == 1 else capacity
        if current is not None and current.arena.batch == batch and current.arena.capacity >= rows:
            return
        hidden_size = state_size(self.model, self.heads)
        memory = BatchMemory.allocate(
            self._device, self._new_arena, self.model, self._kv_type, hidden_size, batch, rows, self.prefill_chunk
        )
        if current is not None:
            memory.copy_sequences_from(current)
        self._replace_cache(BindingCache(memory))

    @exclusive
    def run(self, step: Step) -> None:
        """Run one step and wait until its results can be read."""
        self._check_thread()
        self._completed = None
        check_node_ids(step, self.heads)
        binding = self._binding_for(step)
        self._completed = completed = self._executor.run(binding, step)
        self.run_seconds = completed.seconds

    def read_tokens(self, sequence: int = 0) -> list[int]:
        """Return the ids of the T nodes."""
        return self._last_run().read_tokens(sequence)

    def read_argmax(self, sequence: int = 0) -> list[int]:
        """Return the greedy next ids of the R rows."""
        return self._last_run().read_argmax(sequence)

    def read_logits(self, row: int, sequence: int = 0) -> FloatArray:
        """Copy the logits of one row from the device: (V,) float32."""
        return self._last_run().read_logits(row, sequence)

    def read_summary(self, row: int, sequence: int = 0) -> RowSummary | None:
        """Return the summary of one row from pinned host memory; None if the step did not ask for summaries."""
        return self._last_run().read_summary(row, sequence)

    def read_finite(self, row: int, sequence: int = 0) -> bool:
        """Return whether all logits of one row are finite, from pinned host memory."""
        return self._last_run().read_finite(row, sequence)

    def read_outputs(self) -> StepOutputs:
        """Copy all outputs of the last run from the device."""
        return self._last_run().read_outputs()

    @exclusive
    def commit(self, sequence: int, path: Sequence[int], length: int) -> None:
        """Copy the rows of `path` behind the past, and the last one's hidden state to where the next draft starts."""
        self._last_run().commit(sequence, path, length)

    def default_prefix_bytes(self) -> int:
        """Return 1 GiB of device memory, or a quarter of what is free now if that is less."""
        return min(1 << 30, self._device.free_bytes() // 4)

    @exclusive
    def save_past(self, length: int, sequence: int = 0) -> SavedPast:
        """Copy rows of the arena to other device memory, and wait until they are copied."""
        arena = self._allocated().memory.arena
        check_length(length, arena.capacity)
        saved = SavedPast(length, arena.save(sequence, length))
        self._device.synchronize()
        return saved

    @exclusive
    def restore_past(self, saved: SavedPast, length: int, sequence: int = 0) -> None:
        """Copy rows back into the arena, and wait until they are copied, so that the copy may be freed."""
        arena = self._allocated().memory.arena
        check_length(length, arena.capacity, saved)
        arena.restore(sequence, saved.data, saved.length, length)
        self._device.synchronize()

    def _last_run(self) -> CompletedRun:
        completed = self._completed
        if completed is None:
            raise RuntimeError("no step has been run")
        check_reading_thread(self.name, completed.thread)
        return completed

    def _allocated(self) -> BindingCache:
        if self._cache is None:
            raise RuntimeError("run was called before allocate")
        return self._cache

    def _binding_for(self, step: Step) -> StepBinding:
        """Return the binding of the shape that a step runs in."""
        shape = self._shape_of(step)
        return self._allocated().get(shape) or self._add_binding(shape, step)

    def _shape_of(self, step: Step) -> StepShape:
        """Return the padded shape that a step runs in."""
        memory, (B, T), R = self._allocated().memory, step.input_ids.shape, step.logit_rows.shape[1]
        if memory.arena.batch != B:
            raise CapacityError(
                f"got a step of {B} sequences, expected {memory.arena.batch}, for which memory is allocated; call "
                "allocate for the new number first"
            )
        length = int(step.past_length.max())
        if length > memory.arena.capacity:  # the step would read beyond the arena; its own rows have room of their own
            raise RuntimeError(
                f"a past of {length} rows does not fit an arena of {memory.arena.capacity}; allocate a larger one first"
            )
        P = memory.padded_past(length)
        return self._padded_shape(StepShape(B, T, R, step.draft, P, is_causal(step), step.summaries))

    def _add_binding(self, shape: StepShape, step: Step) -> StepBinding:
        """Make a binding for a shape, over larger memory where the shape does not fit what is allocated.

        Memory that is replaced is freed before the binding is made, so nothing else may refer to it here.
        """
        self._device.synchronize()  # memory is only freed while the device is idle
        cache = self._allocated()
        memory = cache.memory.fitted_to(shape)
        if memory is not cache.memory:
            cache = cache.with_memory(memory)
            self._replace_cache(cache)
        try:
            binding = self._bind(shape, memory)
        except MedusaError:
            raise
        except Exception as error:  # libraries raise many kinds
            raise step_error(self.name, self.precision, step, error) from error
        cache.add(binding)
        return binding

    def _bind(self, shape: StepShape, memory: BatchMemory) -> StepBinding:
        host = HostBuffers(self._device, shape, self.model.vocab_size)
        inputs, outputs = memory.tensors(shape)
        runner = self._new_runner(shape, host.inputs | inputs, host.outputs | outputs)
        return StepBinding(runner, shape, host, memory)

    def _replace_cache(self, cache: BindingCache) -> None:
        """Replace memory and bindings, all at once, when the device has finished its work on the previous ones."""
        self._device.synchronize()
        self._completed = None  # its rows are in the previous memory
        self._cache = cache

    def _check_thread(self) -> None:
        """Raise WrongThreadError in another thread than that of the first step, where the library requires one."""
        if not self.in_one_thread:
            return
        current = threading.current_thread()
        if self._thread is None:
            self._thread = current
        if self._thread is not current:
            raise WrongThreadError(
                f"{self.name} was asked for a step in thread {current.name!r}, expected {self._thread.name!r}, which "
                "ran the first step: its CUDA graphs and their memory belong to that thread; run the step there, or "
                "load a second engine in this thread (warm_up counts as a step)"
            )

    def _facts(self, library: str, version: str, weight_bytes: int) -> BackendFacts:
        """Describe the device and the library that runs the steps."""
        name, driver, capability, bandwidth = self._device.facts()
        row_bytes = self.past_row_bytes
        return BackendFacts(name, driver, capability, library, version, weight_bytes, row_bytes, bandwidth)
