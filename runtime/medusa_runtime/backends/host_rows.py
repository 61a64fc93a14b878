"""Pinned host memory for the rows of logits that are read from a device.

A copy into pinned memory runs at the speed of the bus; one into ordinary memory is copied once more by the driver, and
takes several times as long.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from medusa_runtime.backends.base import FloatArray
from medusa_runtime.backends.device import Device, HostMemory


class HostRows:
    """The rows that were read since the last run, each copied once.

    Args:
        device: The rows' device.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._blocks: list[HostMemory] = []  # one for each row that a run's reader wanted at most; kept for the next
        self._rows: dict[Hashable, FloatArray] = {}

    def begin(self) -> None:
        """Forget the rows that were read: a new run has other ones."""
        self._rows.clear()

    def read(self, key: Hashable, address: int, count: int) -> FloatArray:
        """Return a row, (count,) float32, valid until `begin`.

        Args:
            key: Identifies the row.
            address: Where it is on the device.
            count: Its elements; always the same number.

        Raises:
            CapacityError: There is no pinned memory for another row.
        """
        found = self._rows.get(key)
        if found is not None:
            return found
        used = len(self._rows)
        if used == len(self._blocks):
            self._blocks.append(self._device.allocate_host(count * np.dtype(np.float32).itemsize))
        row: FloatArray = self._blocks[used].array.view(np.float32)
        self._device.read(row, address)
        self._rows[key] = row
        return row
