"""What backends on a GPU share: arenas by address, results that stay there, one binding for each shape of step."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from medusa_runtime import contract
from medusa_runtime.backends.arena import Arena, NewArena, RowArena, Tensor
from medusa_runtime.backends.base import PREFILL_CHUNK, BackendFacts, FloatArray, IntArray, Outputs, Step, all_outputs
from medusa_runtime.backends.device import Device, Memory
from medusa_runtime.backends.elements import BOOL, FLOAT32, INT32, element
from medusa_runtime.backends.step_memory import StepMemory
from medusa_runtime.errors import CapacityError
from medusa_runtime.facts import HeadFacts, ModelFacts, state_size
from medusa_runtime.sizes import doubled

FIRST_PAST = 256  # rows of the shortest past that is bound; each longer one is twice the one before
KEPT = 128  # shapes whose bindings are held, more than usually come up: one that is let go has to be captured anew


class Shape(NamedTuple):
    """B sequences, T nodes, R rows with logits, whether the heads run, P rows of the past bound.

    causal: whether each row sees all that is before it, as tokens in a row do.
    """

    B: int
    T: int
    R: int
    draft: bool
    P: int
    causal: bool = False


class Binding(Protocol):
    """What steps of one shape run with."""

    shape: Shape
    memory: StepMemory

    def run(self) -> None:
        """Run and wait."""


class OnDevice(ABC):
    """A backend on a device (`medusa_runtime.backends.base.Backend`).

    Keys and values lie in an arena of the model's whole context (as `model` says: a backend may have been built for
    less); a step binds the first P rows, P the smallest of 256, 512, 1,024, … that serves, so that only few shapes ever
    run.
    """

    def __init__(self, name: str, precision: str, model: ModelFacts, heads: HeadFacts, device: Device) -> None:
        """Nothing is allocated yet."""
        self.name, self.precision, self.model, self.heads = name, precision, model, heads
        self.prefill_chunk = PREFILL_CHUNK
        self.pasts = _pasts(model.context)
        self.run_seconds = 0.0
        self._device, self._element = device, element(precision)
        self._state = state_size(model, heads) * FLOAT32.size  # bytes of one row of `hidden`
        self._new_arena: NewArena = RowArena  # what its graph works on
        self._arena: Arena | None = None
        self._results: _Results | None = None
        self._draft: Memory | None = None
        self._bindings: OrderedDict[Shape, Binding] = OrderedDict()
        self._binding: Binding | None = None

    @abstractmethod
    def _served(self, shape: Shape) -> Shape:
        """Return the shape that a step of this one runs in: itself, or a larger one that it is padded to."""

    @abstractmethod
    def _new_binding(
        self, shape: Shape, memory: StepMemory, given: dict[str, Tensor], made: dict[str, Tensor]
    ) -> Binding:
        """Make what steps of a served shape run with. given, made: all inputs and outputs by name."""

    def allocate(self, batch: int, capacity: int) -> None:
        """Lay the arenas out. One sequence gets the whole context at once, several what is asked for."""
        before = self._arena
        rows = self.model.context if batch == 1 else capacity
        if before is not None and before.batch == batch and before.capacity >= rows:
            return
        arena = self._new_arena(self._device, self.model, self._element, batch, rows, self.prefill_chunk)
        self._lay(arena, rows=1)

    def run(self, step: Step) -> None:
        """Run one step over the past held."""
        binding = self._bind(step)
        binding.memory.write(step)
        started = time.perf_counter()
        binding.run()
        self.run_seconds = time.perf_counter() - started

    def read_tokens(self, sequence: int = 0) -> list[int]:
        """Return T ids."""
        return self._ran().memory.read_tokens(sequence)

    def read_argmax(self, sequence: int = 0) -> list[int]:
        """Return R ids."""
        return self._ran().memory.read_argmax(sequence)

    def read_logits(self, row: int, sequence: int = 0) -> FloatArray:
        """Return (V,) float32."""
        rows, logits = self._ran().shape.R, np.empty(self.model.vocab_size, np.float32)
        assert self._results is not None  # noqa: S101 -- a step has run
        self._device.read(logits, self._results.logits.address + (sequence * rows + row) * logits.nbytes)
        return logits

    def read_outputs(self) -> Outputs:
        """Return copies of all that the last run gave, without what it was padded by."""
        binding, arena, results = self._ran(), self._arena, self._results
        assert arena is not None and results is not None  # noqa: S101 -- a step has run
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
        new = arena.read_new(nodes, binding.memory.past_length)[:, :, :T]  # (2·layers, B, T, W)
        return all_outputs(ids(self.read_tokens), ids(self.read_argmax), logits[:, :R], hidden[:, :T], new)

    def commit(self, sequence: int, path: Sequence[int], length: int) -> None:
        """Copy the rows of `path` behind the past, and the last one's hidden state to where the heads read it."""
        nodes = self._ran().shape.T
        assert self._arena is not None and self._results is not None and self._draft is not None  # noqa: S101
        self._arena.commit(sequence, path, length, nodes)
        source = self._results.hidden.address + (sequence * nodes + path[-1]) * self._state
        self._device.copy_rows(
            self._draft.address + sequence * self._state, self._state, source, self._state, self._state, 1
        )

    def _described(self, library: str, version: str, weights: int) -> BackendFacts:
        name, driver, capability, bandwidth = self._device.facts()
        row = self.model.kv_bytes_per_token(self._element.size)
        return BackendFacts(name, driver, capability, library, version, weights, row, bandwidth)

    def _ran(self) -> Binding:
        if self._binding is None:
            raise RuntimeError("no step has been run")
        return self._binding

    def _lay(self, arena: Arena, rows: int) -> None:
        """Take an arena, and results for as many nodes as it has; what the one before holds is copied over."""
        before = self._arena
        if before is not None and before.batch == arena.batch:
            arena.take_over(before)
        else:
            self._draft = self._device.allocate(arena.batch * self._state)
        self._device.synchronize()  # the arena before goes now
        self._bindings.clear()
        self._binding, self._arena = None, arena
        self._results = _Results(
            self._device.allocate(arena.batch * rows * self.model.vocab_size * FLOAT32.size),
            self._device.allocate(arena.batch * arena.nodes * self._state),
            rows,
        )

    def _bind(self, step: Step) -> Binding:
        """Find or make what a step runs with."""
        arena, results = self._arena, self._results
        if arena is None or results is None:
            raise RuntimeError("run before allocate")
        (B, T), R = step.input_ids.shape, step.logit_rows.shape[1]
        if arena.batch != B:
            raise CapacityError(f"a step of {B} sequences, arenas for {arena.batch}")
        past = self._past(arena, int(step.past_length.max()))
        shape = self._served(Shape(B, T, R, step.draft, past, _is_causal(step)))
        binding = self._bindings.get(shape)
        if binding is None:
            if arena.nodes < shape.T or results.rows < shape.R:
                nodes, rows = max(shape.T, arena.nodes), max(shape.R, results.rows)
                self._lay(self._new_arena(self._device, self.model, self._element, B, arena.capacity, nodes), rows)
            binding = self._bindings[shape] = self._make(shape)
            if len(self._bindings) > KEPT:
                self._bindings.popitem(last=False)
        else:
            self._bindings.move_to_end(shape)
        self._binding = binding
        return binding

    def _past(self, arena: Arena, length: int) -> int:
        """P: how many rows to bind."""
        if arena.batch > 1:  # sequences lie `capacity` rows apart
            return arena.capacity
        return min(past_shape(length), arena.capacity)

    def _make(self, shape: Shape) -> Binding:
        arena, results, draft = self._arena, self._results, self._draft
        assert arena is not None and results is not None and draft is not None  # noqa: S101
        B, T, R, drafts, P, _ = shape
        state = self._state // FLOAT32.size
        memory = StepMemory(self._device, B, T, R)

        def small(arrays: Mapping[str, tuple[tuple[int, ...], Any]]) -> dict[str, Tensor]:
            return {
                name: Tensor(BOOL if dtype == np.bool_ else INT32, size, memory.addresses[name])
                for name, (size, dtype) in arrays.items()
            }

        given, made = small(memory.inputs), small(memory.outputs)
        given[contract.DRAFT_HIDDEN] = Tensor(FLOAT32.onnx, (B if drafts else 0, state), draft.address)
        made[contract.LOGITS] = Tensor(FLOAT32.onnx, (B, R, self.model.vocab_size), results.logits.address)
        made[contract.HIDDEN] = Tensor(FLOAT32.onnx, (B, T, state), results.hidden.address)
        past, new = arena.tensors(P, T)
        return self._new_binding(shape, memory, given | past, made | new)


def past_shape(length: int) -> int:
    """Rows that steps behind a past of `length` bind, one sequence at a time, where there is room for so many."""
    return doubled(FIRST_PAST, length)


def _is_causal(step: Step) -> bool:
    T = step.input_ids.shape[1]
    return T == 1 or (not step.draft and bool((step.tree_mask == np.tri(T, dtype=np.bool_)).all()))


def _pasts(context: int) -> tuple[int, ...]:
    """All that `past_shape` gives, the last one cut to the context."""
    sizes = [FIRST_PAST]
    while sizes[-1] < context:
        sizes.append(2 * sizes[-1])
    return (*sizes[:-1], min(sizes[-1], context))


class _Results(NamedTuple):
    """What a step gives that stays on the device. rows: R at most."""

    logits: Memory
    hidden: Memory
    rows: int


def check_room(device: Device, name: str, model: ModelFacts, itemsize: int, weights: int, workspace: int) -> None:
    """Raise CapacityError where weights, KV rows and workspace (all in bytes) do not fit, before anything is loaded."""
    rows = model.context
    cache = rows * model.kv_bytes_per_token(itemsize)
    needed, free = weights + cache + workspace, device.free_bytes()
    if needed > free:
        raise CapacityError(
            f"{name} needs about {needed / 1e9:.1f} GB: weights {weights / 1e9:.1f}, keys and values of {rows} tokens "
            f"{cache / 1e9:.1f}, workspace {workspace / 1e9:.1f}; {free / 1e9:.1f} GB are free. Close what else uses "
            "the GPU, take a precision of fewer bits, or give a smaller max_length"
        )
