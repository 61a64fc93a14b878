"""What host and device hand each other in a step: small arrays in pinned memory, read and written where they lie."""

from __future__ import annotations

import numpy as np

from medusa_runtime import contract
from medusa_runtime.backends.base import Step
from medusa_runtime.backends.device import Device

ALIGNMENT = 256  # bytes; of every array, as device memory is
INT32, BOOL = np.dtype(np.int32), np.dtype(np.bool_)


class HostBuffers:
    """The inputs and the two small outputs of steps of one shape: B sequences, T nodes, R rows with logits."""

    def __init__(self, device: Device, batch: int, nodes: int, rows: int) -> None:
        """Allocate. Raises CapacityError."""
        self.inputs = {
            contract.INPUT_IDS: ((batch, nodes), INT32),
            contract.POSITION_IDS: ((batch, nodes), INT32),
            contract.TREE_MASK: ((batch, nodes, nodes), BOOL),
            contract.PAST_LENGTH: ((batch,), INT32),
            contract.LOGIT_ROWS: ((batch, rows), INT32),
        }
        self.outputs = {contract.TOKENS: ((batch, nodes), INT32), contract.ARGMAX: ((batch, rows), INT32)}
        places, end = {}, 0
        for name, (shape, dtype) in (self.inputs | self.outputs).items():
            places[name] = end
            end += -(-int(np.prod(shape)) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self._memory = device.allocate_host(end)
        self.addresses = {name: self._memory.address + place for name, place in places.items()}
        flat = {}
        for name, (shape, dtype) in (self.inputs | self.outputs).items():
            size = int(np.prod(shape)) * dtype.itemsize
            flat[name] = self._memory.array[places[name] : places[name] + size].view(dtype).reshape(shape)
        self._given = [flat[name] for name in self.inputs]
        self._tokens, self._argmax = ([row.data for row in flat[name]] for name in self.outputs)
        self.sizes = self._all = (nodes, rows)  # those of the step written last, and those there is room for

    def write(self, step: Step) -> None:
        """Copy a step's arrays to where the device reads them.

        A smaller step is padded: by literal tokens behind the past that see themselves alone, and by its first row.
        """
        ids, positions, mask, past_length, rows = self._given
        sizes = T, R = step.input_ids.shape[1], step.logit_rows.shape[1]
        past_length[:] = step.past_length
        if sizes != self._all:
            positions[:] = step.past_length[:, None]
            if sizes != self.sizes:  # else the padding of the step before still stands
                ids[:], mask[:], rows[:] = 0, np.eye(self._all[0]), 0
        self.sizes = sizes
        ids[:, :T], positions[:, :T], mask[:, :T, :T] = step.input_ids, step.position_ids, step.tree_mask
        rows[:, :R] = step.logit_rows

    @property
    def past_length(self) -> int:
        """Rows of the past that were real in the step written last, of the first sequence."""
        return int(self._given[3][0])

    def read_tokens(self, sequence: int) -> list[int]:
        """Return T ids."""
        ids: list[int] = self._tokens[sequence].tolist()
        return ids[: self.sizes[0]]

    def read_argmax(self, sequence: int) -> list[int]:
        """Return R ids."""
        ids: list[int] = self._argmax[sequence].tolist()
        return ids[: self.sizes[1]]
