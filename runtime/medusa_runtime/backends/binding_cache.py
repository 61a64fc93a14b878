"""The cache of step bindings, by shape; the least recently used ones are dropped."""

from __future__ import annotations

from collections import OrderedDict

from medusa_runtime.backends.batch_memory import BatchMemory
from medusa_runtime.backends.step_binding import StepBinding
from medusa_runtime.backends.step_shape import StepShape

MAX_BINDINGS = 128  # more than decoding usually needs; a shape that was dropped has to be captured again


class BindingCache:
    """The memory of one batch, and the bindings to it.

    A backend always replaces memory and bindings together, as one cache, so that no binding is used with an arena other
    than the one that it was bound to.
    """

    def __init__(self, memory: BatchMemory) -> None:
        """Start without bindings."""
        self.memory = memory
        self._bindings: OrderedDict[StepShape, StepBinding] = OrderedDict()

    def with_memory(self, memory: BatchMemory) -> BindingCache:
        """Return a cache for other memory, which keeps the bindings where the arena is the same.

        Such bindings stay correct although the new memory may have larger outputs, because each binding keeps its own.
        """
        cache = BindingCache(memory)
        if memory.arena is self.memory.arena:
            cache._bindings = self._bindings
        return cache

    def get(self, shape: StepShape) -> StepBinding | None:
        """Return the binding of a shape, if there is one, and mark it as the most recently used."""
        binding = self._bindings.get(shape)
        if binding is not None:
            self._bindings.move_to_end(shape)
        return binding

    def add(self, binding: StepBinding) -> None:
        """Add a binding; beyond MAX_BINDINGS the least recently used is dropped."""
        self._bindings[binding.shape] = binding
        while len(self._bindings) > MAX_BINDINGS:
            self._bindings.popitem(last=False)

    @property
    def shapes(self) -> tuple[StepShape, ...]:
        """The shapes that have a binding, the least recently used first."""
        return tuple(self._bindings)
