"""A fake device whose memory is host memory, so that GPU backends can be tested without a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from medusa_runtime.backends.device import DeviceFacts


class Block:
    def __init__(self, size: int) -> None:
        self.size = size
        self.array = np.zeros(max(size, 1), np.uint8)
        self.address = self.array.ctypes.data


class HostDevice:
    kind = "cpu"
    stream = 0
    index = 0

    def __init__(self, free: int = 1 << 34) -> None:
        self.free = free
        self.copies: list[tuple[int, int]] = []  # (width, height) of each
        self.written: list[int] = []  # bytes

    def facts(self) -> DeviceFacts:
        return DeviceFacts("host", "", "", 2e9)

    def allocate(self, size: int) -> Block:
        return Block(size)

    allocate_host = allocate

    def copy_rows(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        self.copies.append((width, height))
        for row in range(height):
            ctypes.memmove(to + row * to_pitch, source + row * source_pitch, width)

    def read(self, array: np.ndarray[Any, Any], source: int) -> None:
        ctypes.memmove(array.ctypes.data, source, array.nbytes)

    def write(self, to: int, array: np.ndarray[Any, Any]) -> None:
        self.written.append(array.nbytes)
        ctypes.memmove(to, array.ctypes.data, array.nbytes)

    def free_bytes(self) -> int:
        return self.free

    def synchronize(self) -> None:
        pass
