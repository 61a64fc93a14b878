"""The CUDA device: errors without a GPU; memory, copies and CUDA graphs with one."""

from __future__ import annotations

import gc
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from medusa_runtime.backends import cuda
from medusa_runtime.backends.cuda import CudaDevice
from medusa_runtime.errors import CapacityError, MedusaError, MissingExtraError

from ..interrupting import elsewhere


def test_a_missing_library_is_reported_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingExtraError, match=r"cuda-bindings is not installed .*pip install 'medusa-export\[gpu\]'"):
        CudaDevice()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        ("cudaErrorNoDevice", MedusaError, "no GPU found .*nvidia-smi, or use --backend ort-cpu"),
        ("cudaErrorInsufficientDriver", MedusaError, r"supports CUDA 12\.4 at most, expected 13\.0 or newer; update"),
        ("cudaErrorMemoryAllocation", CapacityError, "no memory for 3 MB on the GPU .*close what else uses the GPU"),
        ("cudaErrorUnknown", MedusaError, "the GPU failed: cudaMalloc: cudaErrorUnknown"),
    ],
)
def test_cuda_errors_report_what_to_do(error: str, kind: type[Exception], message: str) -> None:
    names = ["cudaSuccess", "cudaErrorNoDevice", "cudaErrorInsufficientDriver", "cudaErrorMemoryAllocation"]
    codes: Any = SimpleNamespace(**{name: SimpleNamespace(name=name) for name in [*names, "cudaErrorUnknown"]})
    library = SimpleNamespace(
        cudaError_t=codes, cudaDriverGetVersion=lambda: (None, 12040), cudaRuntimeGetVersion=lambda: (None, 13000)
    )
    with pytest.raises(kind, match=message):
        raise cuda._cuda_error(library, "cudaMalloc", getattr(codes, error), "3 MB on the GPU")


def test_a_missing_driver_is_reported() -> None:
    codes: Any = SimpleNamespace(cudaErrorMemoryAllocation=1, cudaErrorInsufficientDriver=2)
    library = SimpleNamespace(
        cudaError_t=codes, cudaDriverGetVersion=lambda: (0, 0), cudaRuntimeGetVersion=lambda: (0, 13000)
    )
    assert "no NVIDIA driver found" in str(cuda._cuda_error(library, "cudaGetDeviceCount", 2, ""))


class FakeCuda:
    """Enough of the library to describe a GPU: every call succeeds."""

    cudaError_t: Any = SimpleNamespace(
        cudaSuccess=0, cudaErrorMemoryAllocation=2, cudaErrorInsufficientDriver=35, cudaErrorNoDevice=100
    )
    cudaStreamNonBlocking = 1
    cudaMemcpyKind: Any = SimpleNamespace(cudaMemcpyDefault=4, cudaMemcpyDeviceToHost=2)

    def __init__(self, status: int = 0) -> None:
        self.status, self.freed, self.copied = status, 0, 0

    def cudaGetDeviceProperties(self, _index: int) -> tuple[int, Any]:
        return 0, SimpleNamespace(major=9, minor=0, name=b"NVIDIA H100" + bytes(245))

    def cudaStreamCreateWithFlags(self, _flags: int) -> tuple[int, int]:
        return 0, 7

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return 0, 13000

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        assert size == cuda.BANDWIDTH_COPY
        return self.status, 4096

    def cudaFree(self, _address: int) -> tuple[int]:
        self.freed += 1
        return (0,)

    def cudaMemcpy2DAsync(self, *arguments: int) -> tuple[int]:
        self.copied += arguments[4] * arguments[5]
        return (0,)

    def __getattr__(self, name: str) -> Any:
        return lambda *_: (0,)


def test_a_gpu_is_described_and_its_memory_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeCuda()
    monkeypatch.setattr(cuda, "_import_cuda", lambda: (library, 1))
    monkeypatch.setattr(cuda, "_driver_release", lambda: "580.65.06")
    clock = iter([0.0, 4e-3, 1.0, 1.0 + 2e-3, 2.0, 2.0 + 8e-3, 3.0, 3.0 + 3e-3, 4.0, 4.0 + 3e-3])
    monkeypatch.setattr(cuda.time, "perf_counter", lambda: next(clock))
    facts = CudaDevice().facts()
    assert facts[:3] == ("NVIDIA H100", "580.65.06 (CUDA 13.0)", "9.0")
    assert facts.bandwidth == pytest.approx(2 * 4 * cuda.BANDWIDTH_COPY / 2e-3)  # read and written, four times, at best
    assert (library.copied, library.freed) == (20 * cuda.BANDWIDTH_COPY, 2)


def test_a_full_gpu_is_described_without_its_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_import_cuda", lambda: (FakeCuda(status=2), 1))
    monkeypatch.setattr(cuda, "_driver_release", lambda: "")
    facts = CudaDevice().facts()
    assert (facts.driver, facts.bandwidth) == ("CUDA 13.0", None)


class Recording(FakeCuda):
    """Records all calls, and makes one of them fail."""

    cudaStreamCaptureMode: Any = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.fails: str | None = None

    def cudaGraphInstantiate(self, graph: str, _flags: int) -> tuple[int, str]:
        return (99, "") if self.fails == "cudaGraphInstantiate" else (0, f"executable of {graph}")

    def cudaStreamEndCapture(self, _stream: int) -> tuple[int, str]:
        self.calls.append(("cudaStreamEndCapture",))
        return 0, "graph"

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[int]:
            self.calls.append((name, *arguments))
            return (0,)

        return call

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] in names]


def test_graph_executables_and_the_stream_are_destroyed_with_what_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Recording()
    monkeypatch.setattr(cuda, "_import_cuda", lambda: (library, 1))
    device = CudaDevice()
    graphs = [device.capture(lambda: None) for _ in range(3)]
    destroyed = ("cudaGraphDestroy", "cudaGraphExecDestroy", "cudaStreamDestroy")
    assert library.named(*destroyed) == [("cudaGraphDestroy", "graph")] * 3
    device.launch(graphs[0])
    assert library.calls[-1] == ("cudaGraphLaunch", "executable of graph", 7)
    del graphs
    gc.collect()
    assert library.named(*destroyed)[3:] == [("cudaGraphExecDestroy", "executable of graph")] * 3
    del device
    gc.collect()
    assert library.calls[-1] == ("cudaStreamDestroy", 7)


def test_a_capture_that_fails_leaves_neither_graph_nor_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Recording()
    monkeypatch.setattr(cuda, "_import_cuda", lambda: (library, 1))
    device = CudaDevice()
    with pytest.raises(ZeroDivisionError):
        device.capture(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert library.calls[-2:] == [("cudaStreamEndCapture",), ("cudaGraphDestroy", "graph")]
    library.fails = "cudaGraphInstantiate"
    with pytest.raises(MedusaError, match="cudaGraphInstantiate"):
        device.capture(lambda: None)
    assert library.calls[-1] == ("cudaGraphDestroy", "graph")


AT_EXIT = """
import builtins, sys
from types import SimpleNamespace
from medusa_runtime.backends import cuda

class Library:
    cudaError_t = SimpleNamespace(cudaSuccess=0)
    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    def __getattr__(self, name):
        return lambda *_: (0, SimpleNamespace(major=9, minor=0, name=b"x")) if "Get" in name else self.call(name)
    def call(self, name):
        print(name)
        return (0, 7) if name in ("cudaStreamCreateWithFlags", "cudaStreamEndCapture", "cudaGraphInstantiate") else (0,)

cuda._import_cuda = lambda: (Library(), 1)
device = cuda.CudaDevice()
builtins.kept = device, device.capture(lambda: None), sys.modules
print("end")
"""


def test_at_process_exit_nothing_is_destroyed_and_nothing_printed() -> None:
    """The driver frees everything; CUDA must not be called while the process exits."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", AT_EXIT], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[-1] == "end"


@pytest.mark.parametrize("index", [2, 7, -1])
def test_a_gpu_that_does_not_exist_is_refused_with_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    library = Recording()
    monkeypatch.setattr(cuda, "_import_cuda", lambda: (library, 2))
    with pytest.raises(
        MedusaError, match=rf"there is no GPU {index}: this process sees 2, expected a number from 0 to 1; choose one"
    ):
        CudaDevice(index)
    assert library.calls == []


def test_every_call_is_made_on_the_gpu_that_was_chosen_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Recording()
    monkeypatch.setattr(cuda, "_import_cuda", lambda: (library, 2))
    first, second = CudaDevice(0), CudaDevice(1)
    library.calls.clear()
    for device in (first, second, first):
        elsewhere(device.synchronize)
    assert [call[1] for call in library.named("cudaSetDevice")] == [0, 1, 0]
    assert (first.index, second.index) == (0, 1)


@pytest.mark.gpu
def test_a_real_gpu_is_described() -> None:
    facts = CudaDevice().facts()
    assert facts.name and facts.driver and "." in facts.capability
    assert facts.bandwidth is not None and facts.bandwidth > 1e10


@pytest.mark.gpu
def test_memory_copies_and_graphs() -> None:
    device = CudaDevice()
    free = device.free_bytes()
    source, target = device.allocate(4 * 8 * 4), device.allocate(4 * 8 * 4)
    pinned = device.allocate_host(4 * 8 * 4)
    pinned.array.view(np.float32)[:] = np.arange(32)
    device.copy_rows(source.address, 32, pinned.address, 32, 32, 4)

    def work() -> None:
        device.copy_rows(target.address + 8, 32, source.address, 32, 16, 4)

    graph = device.capture(work)
    found = np.empty((4, 8), np.float32)
    device.read(found, target.address)
    assert not found.any()  # recorded, not run
    device.launch(graph)
    device.read(found, target.address)
    np.testing.assert_array_equal(found[:, 2:6], np.arange(32).reshape(4, 8)[:, :4])
    assert not found[:, :2].any() and not found[:, 6:].any()
    with pytest.raises(CapacityError, match=r"no memory for .* MB on the GPU"):
        device.allocate(4 * free)


@pytest.mark.gpu
def test_graphs_and_streams_give_their_memory_back() -> None:
    device = CudaDevice()
    source, target = device.allocate(1 << 12), device.allocate(1 << 12)

    def work() -> None:
        for _ in range(200):  # of a graph of 200 nodes some memory is the GPU's
            device.copy_rows(target.address, 64, source.address, 64, 64, 4)

    def capture_many() -> None:
        for _ in range(200):
            device.launch(device.capture(work))
        device.synchronize()

    capture_many()  # what CUDA keeps for itself is there after the first
    free = device.free_bytes()
    capture_many()
    for _ in range(200):
        CudaDevice()
    gc.collect()
    assert device.free_bytes() >= free - (8 << 20)


@pytest.mark.gpu
def test_gpu_number_0_can_be_chosen_and_one_that_is_not_there_is_refused() -> None:
    assert CudaDevice(0).index == 0
    with pytest.raises(
        MedusaError, match=r"there is no GPU 99: this process sees [1-9]\d*, expected a number from 0 to"
    ):
        CudaDevice(99)


@pytest.mark.gpu
def test_a_device_works_in_another_thread() -> None:
    device = CudaDevice()
    memory, found = device.allocate(64), np.empty(16, np.float32)

    def work() -> None:
        device.write(memory.address, np.arange(16, dtype=np.float32))
        device.read(found, memory.address)

    assert elsewhere(work) is None
    np.testing.assert_array_equal(found, np.arange(16))
