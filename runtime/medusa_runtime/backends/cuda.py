"""A CUDA device, by cuda-bindings: one stream, device memory, pinned host memory, copies."""

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
COPIED = 512 << 20  # bytes at a time when the memory is timed: many times what a cache holds


class CudaMemory:
    """Device memory, or pinned host memory when it has an `array`."""

    def __init__(self, address: int, size: int, release: Any, array: NDArray[Any] | None = None) -> None:
        self.address, self.size = address, size
        self.array = np.empty(0, np.uint8) if array is None else array
        weakref.finalize(self, release, address).atexit = False  # at the end of the process the driver does it


class CudaGraph:
    """Work that `CudaDevice.capture` recorded, ready to be launched; destroyed when the last reference goes."""

    def __init__(self, executable: Any, destroy: Any) -> None:
        self.executable = executable
        weakref.finalize(self, destroy, executable).atexit = False  # at the end of the process the driver does it


class CudaDevice:
    """One GPU and a stream of our own on it (`medusa_runtime.backends.device.Device`).

    It can be used from any thread. The stream is destroyed when the last reference to the device goes, so whatever
    runs on the stream holds one.
    """

    kind = "cuda"

    def __init__(self, index: int = 0) -> None:
        """Take GPU number `index`.

        Raises MissingExtraError without cuda-bindings, MedusaError without a GPU or without one of that number.
        """
        self._cuda, self.count = _library()  # how many there are
        if not 0 <= index < self.count:
            raise MedusaError(
                f"there is no GPU {index}: this process sees {self.count}, expected a number from 0 to "
                f"{self.count - 1}; choose one of these (CUDA_VISIBLE_DEVICES and nvidia-smi say which they are)"
            )
        self.index = index
        self._several = self.count > 1  # then each thread, and each library, may have chosen another one
        self._call("cudaSetDevice", index)
        self.stream = int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))
        weakref.finalize(self, self._cuda.cudaStreamDestroy, self.stream).atexit = False
        self._any = self._cuda.cudaMemcpyKind.cudaMemcpyDefault  # addresses tell whose memory they are of
        self._out = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        properties = self._call("cudaGetDeviceProperties", index)
        self.compute_capability = (int(properties.major), int(properties.minor))
        self._name = bytes(properties.name).partition(b"\0")[0].decode() or "GPU"

    def facts(self) -> DeviceFacts:
        """Name, driver, compute capability, and the memory's bandwidth (`bandwidth`)."""
        cuda = f"CUDA {_version(int(self._call('cudaDriverGetVersion')))}"
        release = _driver_release()
        capability = "{}.{}".format(*self.compute_capability)
        return DeviceFacts(self._name, f"{release} ({cuda})" if release else cuda, capability, self.bandwidth())

    def bandwidth(self) -> float | None:
        """Bytes a second that copies within the GPU read and write, the best of several; None without the memory."""
        try:
            source, target = self.allocate(COPIED), self.allocate(COPIED)
        except CapacityError:
            return None
        best = float("inf")
        for _ in range(5):
            self.synchronize()
            started = time.perf_counter()
            for _ in range(4):
                self.copy_rows(target.address, COPIED, source.address, COPIED, COPIED, 1)
            self.synchronize()
            best = min(best, (time.perf_counter() - started) / 4)
        return 2 * COPIED / best

    def allocate(self, size: int) -> CudaMemory:
        """Zero-filled memory on the GPU."""
        address = int(self._call("cudaMalloc", max(size, 1), what=f"{size / 1e6:.0f} MB on the GPU"))
        self._call("cudaMemsetAsync", address, 0, max(size, 1), self.stream)
        return CudaMemory(address, size, self._cuda.cudaFree)

    def allocate_host(self, size: int) -> CudaMemory:
        """Zero-filled pinned memory, which the GPU sees under the same address."""
        flags = self._cuda.cudaHostAllocMapped
        address = int(self._call("cudaHostAlloc", max(size, 1), flags, what=f"{size / 1e6:.0f} MB of pinned memory"))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 1)).from_address(address))
        array[:] = 0
        return CudaMemory(address, size, self._cuda.cudaFreeHost, array)

    def copy_rows(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        """One 2-D copy within the GPU."""
        self._call("cudaMemcpy2DAsync", to, to_pitch, source, source_pitch, width, height, self._any, self.stream)

    def read(self, array: NDArray[Any], source: int) -> None:
        """Fill an array from the GPU."""
        self._call("cudaMemcpyAsync", array.ctypes.data, source, array.nbytes, self._out, self.stream)
        self.synchronize()

    def write(self, to: int, array: NDArray[Any]) -> None:
        """Copy an array to the GPU."""
        self._call("cudaMemcpyAsync", to, array.ctypes.data, array.nbytes, self._any, self.stream)
        self.synchronize()

    def free_bytes(self) -> int:
        """Bytes free on the GPU, whoever else is using it."""
        return int(self._call("cudaMemGetInfo")[0])

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        """Record what `work` enqueues on the stream, once, as a graph for `launch`; nothing of it runs yet."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            self._call("cudaStreamBeginCapture", self.stream, mode)
            work()
        except BaseException:  # the stream is not to stay in capture, and what was recorded goes
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
        if self._several:
            self._cuda.cudaSetDevice(self.index)
        error, *results = getattr(self._cuda, name)(*arguments)
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise _explained(self._cuda, name, error, what)
        return results[0] if len(results) == 1 else results


def _library() -> tuple[Any, int]:
    """Import CUDA's library; return it and the number of GPUs, one at least."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingExtraError(f"cuda-bindings is not installed ({error}); it comes with: {INSTALL}") from error
    try:
        status, count = runtime.cudaGetDeviceCount()
    except (RuntimeError, OSError) as failure:  # no driver's library at all
        raise MedusaError(f"no GPU can be used: {failure}; {_REMEDY}") from failure
    if status != runtime.cudaError_t.cudaSuccess or not count:
        raise _explained(runtime, "cudaGetDeviceCount", status, "")
    return runtime, int(count)


_REMEDY = "install NVIDIA's driver and check with nvidia-smi, or take --backend ort-cpu"


def _explained(cuda: Any, name: str, error: Any, what: str) -> MedusaError:
    """Say what went wrong with a call, and what to do."""
    codes, text = cuda.cudaError_t, f"{name}: {getattr(error, 'name', error)}"
    if error == codes.cudaErrorMemoryAllocation:
        return CapacityError(f"no memory for {what or 'a CUDA call'} ({text}); close what else uses the GPU")
    if error == codes.cudaErrorInsufficientDriver:
        _, driver = cuda.cudaDriverGetVersion()
        _, needed = cuda.cudaRuntimeGetVersion()
        if not driver:
            return MedusaError(f"no NVIDIA driver found ({text}); {_REMEDY}")
        return MedusaError(
            f"the NVIDIA driver serves CUDA {_version(driver)} at most, this program needs {_version(needed)}; "
            "update the driver, or install packages for the older CUDA"
        )
    if error in (codes.cudaErrorNoDevice, codes.cudaSuccess):  # success: there are none
        return MedusaError(f"no GPU found ({text}); {_REMEDY}")
    return MedusaError(f"the GPU failed: {text}; {_REMEDY}")


def _driver_release() -> str:
    """The driver's own version, from where Linux shows it; "" elsewhere."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    found = re.search(r"\s(\d+(?:\.\d+)+)\s", text)
    return found[1] if found else ""


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
