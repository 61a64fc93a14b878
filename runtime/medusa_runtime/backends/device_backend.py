"""What backends on a GPU share: arenas by address, results that stay there, one binding for each shape of step."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np

from medusa_runtime import contract
from medusa_runtime.backends.base import (
    PREFILL_CHUNK,
    BackendFacts,
    FloatArray,
    IntArray,
    Step,
    StepOutputs,
    name_outputs,
)
from medusa_runtime.backends.device import Device, Memory
from medusa_runtime.backends.device_outputs import DeviceOutputs
from medusa_runtime.backends.element_types import BOOL, FLOAT32, INT32, element
from medusa_runtime.backends.host_buffers import HostBuffers
from medusa_runtime.backends.kv_arena import ArenaFactory, KvArena, LayerMajorArena, Tensor
from medusa_runtime.backends.step_errors import check_reading_thread, step_error
from medusa_runtime.backends.step_shape import StepShape, is_causal, padded_past_length, padded_past_lengths
from medusa_runtime.errors import CapacityError, MedusaError, WrongThreadError
from medusa_runtime.exclusive import ExclusiveUse, exclusive
from medusa_runtime.facts import HeadFacts, ModelFacts, state_size

KEPT = 128  # shapes whose bindings are held, more than usually come up: one that is let go has to be captured anew


class Binding(Protocol):
    """What steps of one shape run with."""

    shape: StepShape
    memory: HostBuffers

    def run(self) -> None:
        """Run and wait."""


class _Bound(NamedTuple):
    """A binding and the results that it writes, which live as long as it does: larger ones may have come since."""

    binding: Binding
    results: DeviceOutputs


class _Memory(NamedTuple):
    """What is allocated for one batch, and what is bound to it: always replaced as a whole, once it is complete."""

    arena: KvArena
    results: DeviceOutputs
    draft: Memory
    bound: OrderedDict[StepShape, _Bound]


class _Ran(NamedTuple):
    """The last run that succeeded: what it was bound to, and the number of its thread."""

    bound: _Bound
    thread: int


class DeviceBackend(ABC):
    """A backend on a device (`medusa_runtime.backends.base.Backend`).

    Keys and values lie in an arena of the model's whole context (as `model` says: a backend may have been built for
    less); a step binds the first P rows, P the smallest of 256, 512, 1,024, … that serves, so that only few shapes ever
    run.
    """

    in_one_thread = False  # whether the library keeps state for each thread, so that all steps run in one

    def __init__(self, name: str, precision: str, model: ModelFacts, heads: HeadFacts, device: Device) -> None:
        """Nothing is allocated yet."""
        self.name, self.precision, self.model, self.heads = name, precision, model, heads
        self.prefill_chunk = PREFILL_CHUNK
        self.padded_past_lengths = padded_past_lengths(model.context)
        self.run_seconds = 0.0
        self.exclusive_use, self.logits_on_host = ExclusiveUse(f"the backend {name!r}"), False
        self._device, self._element = device, element(precision)
        self._state = state_size(model, heads) * FLOAT32.size  # bytes of one row of `hidden`
        self._new_arena: ArenaFactory = LayerMajorArena  # what its graph works on
        self._memory: _Memory | None = None
        self._ran: _Ran | None = None
        self._thread: threading.Thread | None = None  # that runs all steps, where one must
        self._running = self._moving = False  # whether a run, or a commit, was begun and not ended

    def __del__(self) -> None:
        """Free what runs before what it runs on: bindings and their CUDA graphs, sessions or engines, the stream."""
        self._ran = self._memory = None
        self._unload()

    @abstractmethod
    def _unload(self) -> None:
        """Let go of the library's sessions or engines, of which some may not have been made."""

    @abstractmethod
    def _served(self, shape: StepShape) -> StepShape:
        """Return the shape that a step of this one runs in: itself, or a larger one that it is padded to."""

    @abstractmethod
    def _new_binding(
        self, shape: StepShape, memory: HostBuffers, given: dict[str, Tensor], made: dict[str, Tensor]
    ) -> Binding:
        """Make what steps of a served shape run with. given, made: all inputs and outputs by name."""

    @exclusive
    def allocate(self, batch: int, capacity: int) -> None:
        """Allocate the arenas. One sequence gets the whole context at once, several what is asked for."""
        memory = self._memory
        rows = self.model.context if batch == 1 else capacity
        if memory is not None and memory.arena.batch == batch and memory.arena.capacity >= rows:
            return
        arena = self._new_arena(self._device, self.model, self._element, batch, rows, self.prefill_chunk)
        results = DeviceOutputs.of(
            self._device, batch, 1, arena.nodes, self.model.vocab_size * FLOAT32.size, self._state
        )
        draft = self._device.allocate(batch * self._state)
        if memory is not None:  # another batch keeps the sequences that both have
            arena.take_over(memory.arena)
            size = min(batch, memory.arena.batch) * self._state
            self._device.copy_rows(draft.address, size, memory.draft.address, size, size, 1)
        self._put(_Memory(arena, results, draft, OrderedDict()))

    @exclusive
    def run(self, step: Step) -> None:
        """Run one step over the past held."""
        self._check_thread()
        if self._running:  # a run was interrupted: the device may still be reading what is written next
            self._device.synchronize()
        self._ran = None
        bound = self._bind(step)
        bound.binding.memory.write(step)
        self._running = True
        started = time.perf_counter()
        with self._explained(step):
            bound.binding.run()
        self.run_seconds = time.perf_counter() - started
        self._running = self._moving = False
        self._ran = _Ran(bound, threading.get_ident())

    @contextmanager
    def _explained(self, step: Step) -> Iterator[None]:
        """Turn what a library raises, of many kinds, into a BackendError or CapacityError in words."""
        try:
            yield
        except MedusaError:
            raise
        except Exception as error:
            length = int(step.past_length.max())
            raise step_error(self.name, self.precision, step.input_ids.shape[1], length, error) from error

    def _check_thread(self) -> None:
        """Raise WrongThreadError in another thread than the one that ran the first step, where that matters."""
        if not self.in_one_thread:
            return
        current = threading.current_thread()
        if self._thread is None:
            self._thread = current
        if self._thread is not current:
            raise WrongThreadError(
                f"{self.name} was asked for a step in thread {current.name!r}, expected {self._thread.name!r}, which "
                "ran the first: its CUDA graphs and their memory belong to that thread; ask there, or load a second "
                "engine in this one (warm_up counts as a step)"
            )

    def read_tokens(self, sequence: int = 0) -> list[int]:
        """Return T ids."""
        return self._last().binding.memory.read_tokens(sequence)

    def read_argmax(self, sequence: int = 0) -> list[int]:
        """Return R ids."""
        return self._last().binding.memory.read_argmax(sequence)

    def read_logits(self, row: int, sequence: int = 0) -> FloatArray:
        """Return (V,) float32."""
        binding, results = self._last()
        logits = np.empty(self.model.vocab_size, np.float32)
        self._device.read(logits, results.logits.address + (sequence * binding.shape.R + row) * logits.nbytes)
        return logits

    def read_outputs(self) -> StepOutputs:
        """Return copies of all that the last run gave, without what it was padded by."""
        binding, results = self._last()
        memory = self._memory
        assert memory is not None  # noqa: S101 -- a step has run
        B, nodes, rows = binding.shape[:3]
        T, R = binding.memory.sizes

        def read(address: int, *shape: int) -> FloatArray:
            array = np.empty(shape, np.float32)
            self._device.read(array, address)
            return array

        def ids(read_one: Callable[[int], list[int]]) -> IntArray:
            return np.array([read_one(sequence) for sequence in range(B)], np.int32)

        logits = read(results.logits.address, B, rows, self.model.vocab_size)
        hidden = read(results.hidden.address, B, nodes, self._state // FLOAT32.size)
        new = memory.arena.read_new(nodes, binding.memory.past_length)[:, :, :T]  # (2·layers, B, T, W)
        return name_outputs(ids(self.read_tokens), ids(self.read_argmax), logits[:, :R], hidden[:, :T], new)

    @exclusive
    def commit(self, sequence: int, path: Sequence[int], length: int) -> None:
        """Copy the rows of `path` behind the past, and the last one's hidden state to where the heads read it."""
        binding, results = self._last()
        memory = self._memory
        assert memory is not None  # noqa: S101 -- a step has run
        if self._moving:
            raise RuntimeError("an earlier commit of this step was interrupted; run the step again")
        self._moving = True
        nodes = binding.shape.T
        memory.arena.commit(sequence, path, length, nodes)
        source = results.hidden.address + (sequence * nodes + path[-1]) * self._state
        self._device.copy_rows(
            memory.draft.address + sequence * self._state, self._state, source, self._state, self._state, 1
        )
        self._moving = False

    def _described(self, library: str, version: str, weights: int) -> BackendFacts:
        name, driver, capability, bandwidth = self._device.facts()
        row = self.model.kv_bytes_per_token(self._element.size)
        return BackendFacts(name, driver, capability, library, version, weights, row, bandwidth)

    def _last(self) -> _Bound:
        """Return what the last run was bound to."""
        ran = self._ran
        if ran is None:
            raise RuntimeError("no step has been run")
        check_reading_thread(self.name, ran.thread)
        return ran.bound

    def _put(self, memory: _Memory) -> None:
        """Take other memory, complete, in place of what there was, when what is being copied from that has been."""
        self._device.synchronize()
        if self._memory is not None and memory.arena is not self._memory.arena:
            self._ran = None  # its rows lie in the arena before
        self._memory = memory

    def _bind(self, step: Step) -> _Bound:
        """Find or make what a step runs with."""
        memory = self._memory
        if memory is None:
            raise RuntimeError("run before allocate")
        (B, T), R = step.input_ids.shape, step.logit_rows.shape[1]
        if memory.arena.batch != B:
            raise CapacityError(f"a step of {B} sequences, arenas for {memory.arena.batch}")
        past = self._past(memory.arena, int(step.past_length.max()))
        shape = self._served(StepShape(B, T, R, step.draft, past, is_causal(step)))
        bound = memory.bound.get(shape)
        if bound is not None:
            memory.bound.move_to_end(shape)
            return bound
        memory = self._with_room(memory, shape)
        with self._explained(step):
            bound = memory.bound[shape] = _Bound(self._make(memory, shape), memory.results)
        while len(memory.bound) > KEPT:
            memory.bound.popitem(last=False)
        return bound

    def _with_room(self, memory: _Memory, shape: StepShape) -> _Memory:
        """Return memory that steps of this shape fit in; what there was stays as it is if that cannot be had.

        Only what is too small is allocated again. What was bound to smaller results keeps them.
        """
        results = memory.results.with_room(self._device, shape.R, shape.T)
        if memory.arena.nodes < shape.T:
            memory = _Memory(memory.arena.widened(shape.T), results, memory.draft, OrderedDict())
        elif results is not memory.results:
            memory = memory._replace(results=results)
        else:
            return memory
        self._put(memory)
        return memory

    def _past(self, arena: KvArena, length: int) -> int:
        """P: how many rows to bind."""
        if arena.batch > 1:  # sequences lie `capacity` rows apart
            return arena.capacity
        return min(padded_past_length(length), arena.capacity)

    def _make(self, memory: _Memory, shape: StepShape) -> Binding:
        B, T, R, drafts, P, _ = shape
        state = self._state // FLOAT32.size
        small_memory = HostBuffers(self._device, B, T, R)

        def small(arrays: Mapping[str, tuple[tuple[int, ...], Any]]) -> dict[str, Tensor]:
            return {
                name: Tensor(BOOL if dtype == np.bool_ else INT32, size, small_memory.addresses[name])
                for name, (size, dtype) in arrays.items()
            }

        given, made = small(small_memory.inputs), small(small_memory.outputs)
        given[contract.DRAFT_HIDDEN] = Tensor(FLOAT32.onnx, (B if drafts else 0, state), memory.draft.address)
        made[contract.LOGITS] = Tensor(FLOAT32.onnx, (B, R, self.model.vocab_size), memory.results.logits.address)
        made[contract.HIDDEN] = Tensor(FLOAT32.onnx, (B, T, state), memory.results.hidden.address)
        past, new = memory.arena.tensors(P, T)
        return self._new_binding(shape, small_memory, given | past, made | new)
