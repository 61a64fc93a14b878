"""The CUDA device: what is said where there is none, and, on a GPU, memory, copies and graphs."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from medusa_runtime.backends import cuda
from medusa_runtime.backends.cuda import CudaDevice
from medusa_runtime.errors import CapacityError, MedusaError, MissingExtraError


def test_a_missing_library_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingExtraError, match=r"cuda-bindings is not installed .*pip install 'medusa-export\[gpu\]'"):
        CudaDevice()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        ("cudaErrorNoDevice", MedusaError, "no GPU found .*nvidia-smi, or take --backend ort-cpu"),
        ("cudaErrorInsufficientDriver", MedusaError, r"serves CUDA 12\.4 at most, this program needs 13\.0; update"),
        ("cudaErrorMemoryAllocation", CapacityError, "no memory for 3 MB on the GPU .*close what else uses the GPU"),
        ("cudaErrorUnknown", MedusaError, "the GPU failed: cudaMalloc: cudaErrorUnknown"),
    ],
)
def test_what_the_library_says_becomes_what_to_do(error: str, kind: type[Exception], message: str) -> None:
    names = ["cudaSuccess", "cudaErrorNoDevice", "cudaErrorInsufficientDriver", "cudaErrorMemoryAllocation"]
    codes: Any = SimpleNamespace(**{name: SimpleNamespace(name=name) for name in [*names, "cudaErrorUnknown"]})
    library = SimpleNamespace(
        cudaError_t=codes, cudaDriverGetVersion=lambda: (None, 12040), cudaRuntimeGetVersion=lambda: (None, 13000)
    )
    with pytest.raises(kind, match=message):
        raise cuda._explained(library, "cudaMalloc", getattr(codes, error), "3 MB on the GPU")


def test_without_a_driver_that_is_said() -> None:
    codes: Any = SimpleNamespace(cudaErrorMemoryAllocation=1, cudaErrorInsufficientDriver=2)
    library = SimpleNamespace(
        cudaError_t=codes, cudaDriverGetVersion=lambda: (0, 0), cudaRuntimeGetVersion=lambda: (0, 13000)
    )
    assert "no NVIDIA driver found" in str(cuda._explained(library, "cudaGetDeviceCount", 2, ""))


class FakeCuda:
    """Enough of the library to describe a GPU: every call succeeds, a copy takes what `seconds` says."""

    cudaError_t: Any = SimpleNamespace(cudaSuccess=0, cudaErrorMemoryAllocation=2, cudaErrorInsufficientDriver=35)
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
        assert size == cuda.COPIED
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
    monkeypatch.setattr(cuda, "_library", lambda: (library, 1))
    monkeypatch.setattr(cuda, "_driver_release", lambda: "580.65.06")
    clock = iter([0.0, 4e-3, 1.0, 1.0 + 2e-3, 2.0, 2.0 + 8e-3, 3.0, 3.0 + 3e-3, 4.0, 4.0 + 3e-3])
    monkeypatch.setattr(cuda.time, "perf_counter", lambda: next(clock))
    facts = CudaDevice().facts()
    assert facts[:3] == ("NVIDIA H100", "580.65.06 (CUDA 13.0)", "9.0")
    assert facts.bandwidth == pytest.approx(2 * 4 * cuda.COPIED / 2e-3)  # read and written, four times, at best
    assert (library.copied, library.freed) == (20 * cuda.COPIED, 2)


def test_a_full_gpu_is_described_without_its_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_library", lambda: (FakeCuda(status=2), 1))
    monkeypatch.setattr(cuda, "_driver_release", lambda: "")
    facts = CudaDevice().facts()
    assert (facts.driver, facts.bandwidth) == ("CUDA 13.0", None)


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
