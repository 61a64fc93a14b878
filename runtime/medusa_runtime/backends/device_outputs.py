"""The two large outputs of a step that stay on the device: logits and hidden states."""

from __future__ import annotations

from typing import NamedTuple

from medusa_runtime.backends.device import Device, Memory


class DeviceOutputs(NamedTuple):
    """Memory for `batch` sequences: logits of `rows` rows each, hidden states of `nodes` nodes each.

    row_size, node_size: bytes of one row of logits, and of one hidden state.
    """

    logits: Memory
    hidden: Memory
    batch: int
    rows: int
    nodes: int
    row_size: int
    node_size: int

    @classmethod
    def of(cls, device: Device, batch: int, rows: int, nodes: int, row_size: int, node_size: int) -> DeviceOutputs:
        """Allocate. Raises CapacityError."""
        logits = device.allocate(batch * rows * row_size)
        return cls(logits, device.allocate(batch * nodes * node_size), batch, rows, nodes, row_size, node_size)

    def with_room(self, device: Device, rows: int, nodes: int) -> DeviceOutputs:
        """Return these where a step of `rows` rows and `nodes` nodes fits, else others of which the larger part is new.

        Raises CapacityError; these stay as they are.
        """
        found = self
        if rows > found.rows:
            found = found._replace(logits=device.allocate(self.batch * rows * self.row_size), rows=rows)
        if nodes > found.nodes:
            found = found._replace(hidden=device.allocate(self.batch * nodes * self.node_size), nodes=nodes)
        return found
