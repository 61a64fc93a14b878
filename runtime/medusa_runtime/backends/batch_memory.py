"""The device memory that all steps of one batch share: KV arena, large outputs, hidden states to draft from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from medusa_runtime import contract
from medusa_runtime.backends.device import Device, DeviceTensor, Memory
from medusa_runtime.backends.device_outputs import DeviceOutputs
from medusa_runtime.backends.element_types import FLOAT32, ElementType
from medusa_runtime.backends.kv_arena import ArenaFactory, KvArena
from medusa_runtime.backends.step_shape import StepShape, padded_past_length
from medusa_runtime.facts import ModelFacts


@dataclass(frozen=True, eq=False)
class BatchMemory:
    """The memory of one batch of sequences. It never changes: memory of other sizes is another object.

    Args:
        device: Where the memory is.
        arena: Keys and values of all sequences.
        outputs: Logits and hidden states of the last step.
        draft_hidden: (B, E) float32, the hidden state that the next draft of each sequence starts from.
    """

    device: Device
    arena: KvArena
    outputs: DeviceOutputs
    draft_hidden: Memory

    @classmethod
    def allocate(
        cls,
        device: Device,
        new_arena: ArenaFactory,
        model: ModelFacts,
        element: ElementType,
        hidden_size: int,
        batch: int,
        capacity: int,
        nodes: int,
    ) -> BatchMemory:
        """Allocate zero-filled memory.

        Args:
            device: Where it is allocated.
            new_arena: Creates the arena in the layout that the graph needs.
            model: The model, which determines the sizes of keys, values and logits.
            element: Element type of keys and values.
            hidden_size: Elements of the hidden state of one token (E).
            batch: Number of sequences.
            capacity: Rows (tokens) of each sequence.
            nodes: Nodes of the largest step; steps with more nodes need `fitted_to`.

        Raises:
            CapacityError: The memory is not available.
        """
        arena = new_arena(device, model, element, batch, capacity, nodes)
        outputs = DeviceOutputs.allocate(device, batch, 1, nodes, model.vocab_size, hidden_size)
        return cls(device, arena, outputs, device.allocate(batch * outputs.hidden_bytes))

    def copy_sequences_from(self, previous: BatchMemory) -> None:
        """Copy what was decoded so far, of the sequences that both have."""
        self.arena.copy_sequences_from(previous.arena)
        size = min(self.arena.batch, previous.arena.batch) * self.outputs.hidden_bytes
        self.device.copy_rows(self.draft_hidden.address, size, previous.draft_hidden.address, size, size, 1)

    def fitted_to(self, shape: StepShape) -> BatchMemory:
        """Return memory that steps of a shape fit in: this object, or one in which only what was too small is new.

        This object stays valid. Raises CapacityError where the memory is not available.
        """
        outputs = self.outputs.fitted_to(self.device, shape)
        if self.arena.max_nodes < shape.T:
            return replace(self, arena=self.arena.with_max_nodes(shape.T), outputs=outputs)
        return self if outputs is self.outputs else replace(self, outputs=outputs)

    def padded_past(self, length: int) -> int:
        """Return how many rows of the past a step binds if its longest past has `length` rows."""
        if self.arena.batch > 1:  # the sequences are `capacity` rows apart
            return self.arena.capacity
        return min(padded_past_length(length), self.arena.capacity)

    def tensors(self, shape: StepShape) -> tuple[dict[str, DeviceTensor], dict[str, DeviceTensor]]:
        """Return the inputs and the outputs of a step of a shape that are in this memory, by the contract's names."""
        inputs, outputs = self.arena.tensors(shape.P, shape.T)
        draft_shape = (shape.B if shape.draft else 0, self.outputs.hidden_size)  # no rows: the heads do not run
        draft = DeviceTensor(FLOAT32.onnx_type, draft_shape, self.draft_hidden.address)
        return {contract.DRAFT_HIDDEN: draft, **inputs}, {**self.outputs.tensors(shape), **outputs}

    def commit(self, shape: StepShape, sequence: int, path: Sequence[int], length: int) -> None:
        """Keep the accepted nodes of the last step: their KV rows, and the last one's hidden state for the next draft.

        Args:
            shape: Shape that the step ran in.
            sequence: Index of the sequence.
            path: Accepted nodes, ascending.
            length: Rows that the sequence's past has.
        """
        self.arena.commit(sequence, path, length, shape.T)
        size = self.outputs.hidden_bytes
        source = self.outputs.hidden_address(shape, sequence, path[-1])
        self.device.copy_rows(self.draft_hidden.address + sequence * size, size, source, size, size, 1)
