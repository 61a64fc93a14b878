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
