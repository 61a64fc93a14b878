"""A CUDA GPU, used through cuda-bindings: one stream, device memory, pinned host memory, copies, CUDA graphs."""

from __future__ import annotations

import ctypes
import re
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.device import DeviceFacts
from medusa_runtime.errors import CapacityError, MedusaError, MissingExtraError

INSTALL = "pip install 'medusa-export[gpu]'"
BANDWIDTH_COPY = 512 << 20  # bytes of each copy that measures the bandwidth: many times the size of a cache


class CudaMemory:
    """Device memory, or pinned host memory if it has a non-empty `array`; freed with its last reference."""

    def __init__(self, address: int, size: int, release: Any, array: NDArray[Any] | None = None) -> None:
        self.address, self.size = address, size
        self.array = np.empty(0, np.uint8) if array is None else array
        weakref.finalize(self, release, address).atexit = False  # the driver frees it at process exit


class CudaGraph:
    """A CUDA graph that `CudaDevice.capture` recorded, ready to be launched; destroyed with its last reference."""

    def __init__(self, executable: Any, destroy: Any) -> None:
        self.executable = executable
        weakref.finalize(self, destroy, executable).atexit = False  # the driver frees it at process exit


class CudaDevice:
    """One GPU with its own stream (implements `medusa_runtime.backends.device.Device`).

    It can be used from any thread. The stream is destroyed with the last reference to the device, so everything that
    runs on the stream must keep such a reference.
    """

    kind = "cuda"

    def __init__(self, index: int = 0) -> None:
        """Open a GPU.

        Args:
            index: Number of the GPU, from 0, in the order of the CUDA driver.

        Raises:
            MissingExtraError: cuda-bindings is not installed.
            MedusaError: There is no GPU, or none with this number.
        """
        self._cuda, self.count = _import_cuda()
        if not 0 <= index < self.count:
            raise MedusaError(
                f"there is no GPU {index}: this process sees {self.count}, expected a number from 0 to "
                f"{self.count - 1}; choose one of these (CUDA_VISIBLE_DEVICES and nvidia-smi show which GPUs they are)"
            )
        self.index = index
        self._has_several_gpus = self.count > 1  # other code may then select another GPU in the same thread
        self._call("cudaSetDevice", index)
        self.stream = int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))
        weakref.finalize(self, self._cuda.cudaStreamDestroy, self.stream).atexit = False
        self._any_kind = self._cuda.cudaMemcpyKind.cudaMemcpyDefault  # CUDA infers it from the addresses
        self._to_host = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        properties = self._call("cudaGetDeviceProperties", index)
        self.compute_capability = (int(properties.major), int(properties.minor))
        self._name = bytes(properties.name).partition(b"\0")[0].decode() or "GPU"

    def facts(self) -> DeviceFacts:
        """Describe the GPU, and measure the bandwidth of its memory."""
        cuda = f"CUDA {_version(int(self._call('cudaDriverGetVersion')))}"
        release = _driver_release()
        capability = "{}.{}".format(*self.compute_capability)
        return DeviceFacts(self._name, f"{release} ({cuda})" if release else cuda, capability, self.bandwidth())

    def bandwidth(self) -> float | None:
        """Return the bytes per second that copies within the GPU read and write, the best of five measurements.

        None if there is not enough free memory for the copies.
        """
        try:
            source, target = self.allocate(BANDWIDTH_COPY), self.allocate(BANDWIDTH_COPY)
        except CapacityError:
            return None
        best = float("inf")
        for _ in range(5):
            self.synchronize()
            started = time.perf_counter()
            for _ in range(4):
                self.copy_rows(target.address, BANDWIDTH_COPY, source.address, BANDWIDTH_COPY, BANDWIDTH_COPY, 1)
            self.synchronize()
            best = min(best, (time.perf_counter() - started) / 4)
        return 2 * BANDWIDTH_COPY / best

    def allocate(self, size: int) -> CudaMemory:
        """Allocate zero-filled memory on the GPU. Raises CapacityError."""
        address = int(self._call("cudaMalloc", max(size, 1), what=f"{size / 1e6:.0f} MB on the GPU"))
        self._call("cudaMemsetAsync", address, 0, max(size, 1), self.stream)
        return CudaMemory(address, size, self._cuda.cudaFree)

    def allocate_host(self, size: int) -> CudaMemory:
        """Allocate zero-filled pinned host memory, with the same address on the GPU. Raises CapacityError."""
        flags = self._cuda.cudaHostAllocMapped
        address = int(self._call("cudaHostAlloc", max(size, 1), flags, what=f"{size / 1e6:.0f} MB of pinned memory"))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 1)).from_address(address))
        array[:] = 0
        return CudaMemory(address, size, self._cuda.cudaFreeHost, array)

    def copy_rows(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        """Enqueue a 2-D copy within the GPU (see `Device.copy_rows`)."""
        self._call("cudaMemcpy2DAsync", to, to_pitch, source, source_pitch, width, height, self._any_kind, self.stream)

    def read(self, array: NDArray[Any], source: int) -> None:
        """Fill an array from the GPU, and wait for it."""
        self._call("cudaMemcpyAsync", array.ctypes.data, source, array.nbytes, self._to_host, self.stream)
        self.synchronize()

    def write(self, to: int, array: NDArray[Any]) -> None:
        """Copy an array to the GPU, and wait for it."""
        self._call("cudaMemcpyAsync", to, array.ctypes.data, array.nbytes, self._any_kind, self.stream)
        self.synchronize()

    def free_bytes(self) -> int:
        """Return the bytes that are free on the GPU, with all its users counted."""
        return int(self._call("cudaMemGetInfo")[0])

    def synchronize(self) -> None:
        """Wait for all work on the stream."""
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        """Record what `work` enqueues on the stream as a CUDA graph.

        Args:
            work: Called once. Nothing that it enqueues runs before `launch`.

        Returns:
            The graph, for `launch`.
        """
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            self._call("cudaStreamBeginCapture", self.stream, mode)
            work()
        except BaseException:  # an interrupt too: the stream must not stay in capture mode
            _, graph = self._cuda.cudaStreamEndCapture(self.stream)
            if graph:
                self._cuda.cudaGraphDestroy(graph)
            raise
        graph = self._call("cudaStreamEndCapture", self.stream)
        try:
            executable = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._cuda.cudaGraphDestroy(graph)
        return CudaGraph(executable, self._cuda.cudaGraphExecDestroy)

    def launch(self, graph: CudaGraph) -> None:
        """Enqueue a captured graph."""
        self._call("cudaGraphLaunch", graph.executable, self.stream)

    def _call(self, name: str, *arguments: Any, what: str = "") -> Any:
        if self._has_several_gpus:
            self._cuda.cudaSetDevice(self.index)
        error, *results = getattr(self._cuda, name)(*arguments)
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise _cuda_error(self._cuda, name, error, what)
        return results[0] if len(results) == 1 else results


def _import_cuda() -> tuple[Any, int]:
    """Import CUDA's runtime library. Return it and the number of GPUs, at least one."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingExtraError(f"cuda-bindings is not installed ({error}); install it: {INSTALL}") from error
    try:
        status, count = runtime.cudaGetDeviceCount()
    except (RuntimeError, OSError) as failure:  # the driver's library is missing
        raise MedusaError(f"no GPU can be used: {failure}; {_REMEDY}") from failure
    if status != runtime.cudaError_t.cudaSuccess or not count:
        raise _cuda_error(runtime, "cudaGetDeviceCount", status, "")
    return runtime, int(count)


_REMEDY = "install NVIDIA's driver and check it with nvidia-smi, or use --backend ort-cpu"


def _cuda_error(cuda: Any, name: str, error: Any, what: str) -> MedusaError:
    """Return the error for a CUDA call that failed.

    Args:
        cuda: The runtime library.
        name: Name of the call.
        error: The status that it returned.
        what: What it was to allocate; "" for other calls.
    """
    codes, text = cuda.cudaError_t, f"{name}: {getattr(error, 'name', error)}"
    if error == codes.cudaErrorMemoryAllocation:
        return CapacityError(
            f"no memory for {what or 'a CUDA call'} ({text}); close what else uses the GPU, or set a smaller max_length"
        )
    if error == codes.cudaErrorInsufficientDriver:
        _, driver = cuda.cudaDriverGetVersion()
        _, needed = cuda.cudaRuntimeGetVersion()
        if not driver:
            return MedusaError(f"no NVIDIA driver found ({text}); {_REMEDY}")
        return MedusaError(
            f"the NVIDIA driver supports CUDA {_version(driver)} at most, expected {_version(needed)} or newer; "
            "update the driver, or install packages for the older CUDA"
        )
    if error in (codes.cudaErrorNoDevice, codes.cudaSuccess):  # success, but with a count of 0
        return MedusaError(f"no GPU found ({text}); {_REMEDY}")
    return MedusaError(f"the GPU failed: {text}; {_REMEDY}")


def _driver_release() -> str:
    """Return the version of the GPU driver from Linux's /proc; "" on other systems."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    found = re.search(r"\s(\d+(?:\.\d+)+)\s", text)
    return found[1] if found else ""


def _version(number: int) -> str:
    """Format CUDA's version number: 12040 gives "12.4"."""
    return f"{number // 1000}.{number % 1000 // 10}"
