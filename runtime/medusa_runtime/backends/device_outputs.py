"""Device memory for the two large outputs of a step, logits and hidden states, which stay on the device."""

from __future__ import annotations

from dataclasses import dataclass, replace

from medusa_runtime import contract
from medusa_runtime.backends.device import Device, DeviceTensor, Memory
from medusa_runtime.backends.element_types import FLOAT32
from medusa_runtime.backends.step_shape import StepShape


@dataclass(frozen=True, eq=False)
class DeviceOutputs:
    """Logits (batch, max_rows, vocab_size) and hidden states (batch, max_nodes, hidden_size), both float32.

    A step of a smaller shape uses the front of the same memory, packed to its own shape. Example: with a vocabulary of
    100, a step of R = 4 rows writes the logits of sequence 1, row 2 to elements 600 to 699, since (1·4 + 2)·100 = 600.
    """

    batch: int
    max_rows: int
    max_nodes: int
    vocab_size: int
    hidden_size: int
    logits: Memory
    hidden: Memory

    @classmethod
    def allocate(
        cls, device: Device, batch: int, rows: int, nodes: int, vocab_size: int, hidden_size: int
    ) -> DeviceOutputs:
        """Allocate memory for steps of up to `rows` rows with logits and `nodes` nodes. Raises CapacityError."""
        logits = device.allocate(batch * rows * vocab_size * FLOAT32.itemsize)
        hidden = device.allocate(batch * nodes * hidden_size * FLOAT32.itemsize)
        return cls(batch, rows, nodes, vocab_size, hidden_size, logits, hidden)

    def fitted_to(self, device: Device, shape: StepShape) -> DeviceOutputs:
        """Return outputs that a step of a shape fits in: this object, or a copy with new memory for what was too small.

        This object stays valid. Raises CapacityError.
        """
        found = self
        if found.max_rows < shape.R:
            logits = device.allocate(self.batch * shape.R * self.vocab_size * FLOAT32.itemsize)
            found = replace(found, logits=logits, max_rows=shape.R)
        if found.max_nodes < shape.T:
            hidden = device.allocate(self.batch * shape.T * self.hidden_size * FLOAT32.itemsize)
            found = replace(found, hidden=hidden, max_nodes=shape.T)
        return found

    def tensors(self, shape: StepShape) -> dict[str, DeviceTensor]:
        """Return the outputs of a step of a shape, by the contract's names."""
        logits_shape, hidden_shape = (shape.B, shape.R, self.vocab_size), (shape.B, shape.T, self.hidden_size)
        return {
            contract.LOGITS: DeviceTensor(FLOAT32.onnx_type, logits_shape, self.logits.address),
            contract.HIDDEN: DeviceTensor(FLOAT32.onnx_type, hidden_shape, self.hidden.address),
        }

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one hidden state."""
        return self.hidden_size * FLOAT32.itemsize

    def logits_address(self, shape: StepShape, sequence: int, row: int) -> int:
        """Return the address of the logits of one row, in a step of a shape."""
        return self.logits.address + (sequence * shape.R + row) * self.vocab_size * FLOAT32.itemsize

    def hidden_address(self, shape: StepShape, sequence: int, node: int) -> int:
        """Return the address of the hidden state of one node, in a step of a shape."""
        return self.hidden.address + (sequence * shape.T + node) * self.hidden_size * FLOAT32.itemsize
