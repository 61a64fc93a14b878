"""Rows are copied from a device once a run, into memory that is allocated once."""

import numpy as np
from medusa_runtime.backends.host_rows import HostRows

from .host_device import HostDevice


class Counting(HostDevice):
    def __init__(self):
        super().__init__()
        self.blocks, self.reads = 0, 0

    def allocate_host(self, size):
        self.blocks += 1
        return self.allocate(size)

    def read(self, array, source):
        self.reads += 1
        super().read(array, source)


def test_rows_of_one_run_are_copied_once_and_stay_valid_together():
    device, logits = Counting(), np.arange(12, dtype=np.float32).reshape(4, 3)
    rows = HostRows(device)
    address = logits.ctypes.data
    first, second = rows.read(0, address, 3), rows.read(2, address + 24, 3)
    assert rows.read(0, address, 3) is first
    assert (first.tolist(), second.tolist()) == ([0, 1, 2], [6, 7, 8])
    assert (device.blocks, device.reads) == (2, 2)
    rows.begin()
    logits += 10
    assert rows.read(0, address, 3).tolist() == [10, 11, 12]
    assert (device.blocks, device.reads) == (2, 3)
    assert rows.read(0, address, 3).dtype == np.float32
