"""What a device is to a backend: memory of its own, host memory that it sees, copies, and a queue they happen in."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray


class Memory(Protocol):
    """A piece of memory; it goes when the last reference does."""

    address: int
    size: int  # bytes


class HostMemory(Memory, Protocol):
    """Host memory that the device reads and writes where it lies."""

    array: NDArray[Any]  # (size,) uint8


class DeviceFacts(NamedTuple):
    """A device's name, its driver and compute capability ("" where there are none), bytes a second of its memory."""

    name: str
    driver: str
    capability: str
    bandwidth: float | None


class Device(Protocol):
    """All work is queued in order; nothing waits but `read` and `synchronize`. Addresses are plain numbers."""

    kind: str  # the word that ONNX Runtime binds its memory under
    index: int  # its number among those of its kind, from 0
    stream: int  # the queue's handle

    def facts(self) -> DeviceFacts:
        """Describe the device; its memory is timed by copies within it."""

    def allocate(self, size: int) -> Memory:
        """Zero-filled memory of the device's own. Raises CapacityError when it cannot be had."""

    def allocate_host(self, size: int) -> HostMemory:
        """Zero-filled host memory that the device sees under the same address. Raises CapacityError."""

    def copy_rows(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        """Copy `height` rows of `width` bytes within the device's memory, so many bytes (pitch) from row to row."""

    def read(self, array: NDArray[Any], source: int) -> None:
        """Fill an array, all of it, from the device's memory, when all that was queued is done."""

    def write(self, to: int, array: NDArray[Any]) -> None:
        """Copy an array, all of it, to the device's memory; it may go when this returns."""

    def free_bytes(self) -> int:
        """Bytes that can still be allocated."""

    def synchronize(self) -> None:
        """Wait for all that was queued."""
