"""The device protocol: the few operations that a GPU backend needs from a GPU.

These are memory on the device, pinned host memory that the device can address, copies, and one queue (stream) in which
all work runs in order. `medusa_runtime.backends.cuda.CudaDevice` implements it; tests implement it in host memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray


class DeviceTensor(NamedTuple):
    """A tensor by its address: an input or output that a backend binds.

    Args:
        onnx_type: Element type, as the number that ONNX's `TensorProto.DataType` gives it.
        shape: Sizes of all dimensions; the elements are contiguous, in row-major order.
        address: Where the first element is stored, an address that the device can read and write.
    """

    onnx_type: int
    shape: tuple[int, ...]
    address: int


class Memory(Protocol):
    """A block of memory, freed when the last reference to this object is dropped."""

    address: int
    size: int  # bytes


class HostMemory(Memory, Protocol):
    """Pinned host memory, which the device reads and writes under the same address."""

    array: NDArray[Any]  # (size,) uint8


class DeviceFacts(NamedTuple):
    """A description of a device.

    Args:
        name: Name of the processor.
        driver: Version of the driver; "" where there is none.
        capability: Compute capability, "9.0" for example; "" where there is none.
        bandwidth: Measured bandwidth of the device memory in bytes per second; None where it is unknown.
    """

    name: str
    driver: str
    capability: str
    bandwidth: float | None


class Device(Protocol):
    """A device with one queue. Calls return once their work is queued; only `read`, `write` and `synchronize` wait."""

    kind: str  # ONNX Runtime's name for the device type, "cuda" or "cpu"
    index: int  # number of the device among those of its kind, from 0
    stream: int  # handle of the queue

    def facts(self) -> DeviceFacts:
        """Describe the device. Measures the memory bandwidth, which takes up to a second."""

    def allocate(self, size: int) -> Memory:
        """Allocate `size` bytes of zero-filled device memory. Raises CapacityError where they are not available."""

    def allocate_host(self, size: int) -> HostMemory:
        """Allocate `size` bytes of zero-filled pinned host memory. Raises CapacityError."""

    def copy_rows(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        """Copy a 2-D block within the device's memory.

        Args:
            to: Address of the first row of the target.
            to_pitch: Bytes from one row of the target to the next.
            source: Address of the first row of the source.
            source_pitch: Bytes from one row of the source to the next.
            width: Bytes copied of each row.
            height: Number of rows.
        """

    def read(self, array: NDArray[Any], source: int) -> None:
        """Wait for all queued work, then fill the whole array from device memory."""

    def write(self, to: int, array: NDArray[Any]) -> None:
        """Copy the whole array to device memory; the array may be freed once this returns."""

    def free_bytes(self) -> int:
        """Return the bytes that can still be allocated on the device."""

    def synchronize(self) -> None:
        """Wait until all queued work is done."""
