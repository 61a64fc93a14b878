"""Weights that several sessions of ONNX Runtime share, so that the device holds one copy of them.

ONNX Runtime lets the caller provide an initialiser (`SessionOptions.add_initializer`). A tensor over memory that the
caller allocated is passed as a DLPack capsule (https://dmlc.github.io/dlpack, version 0).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.checked_graph import CheckedGraph
from medusa_runtime.backends.device import Device, Memory
from medusa_runtime.backends.onnx_file import ExternalData, Weight
from medusa_runtime.backends.ort_library import import_onnxruntime
from medusa_runtime.errors import BundleError

DLPACK_DEVICES = {"cpu": 1, "cuda": 2}
# ONNX's type number -> DLPack's type code (0 signed integer, 1 unsigned integer, 2 float, 4 bfloat) and bits
DLPACK_TYPES = {1: (2, 32), 2: (1, 8), 3: (0, 8), 6: (0, 32), 7: (0, 64), 10: (2, 16), 16: (4, 16)}


# Own prototypes of Python's C functions: setting types on ctypes.pythonapi would change them for all other code too.
_allocate = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(("PyMem_RawMalloc", ctypes.pythonapi))
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class _DlpackTensor(ctypes.Structure):
    """DLPack's `DLManagedTensor`; the sizes that `shape` points to are stored directly behind it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class SharedWeights:
    """The external weights of several graphs, on a device."""

    def __init__(self, graphs: Sequence[CheckedGraph], device: Device) -> None:
        """Copy the weights to the device; those that several graphs refer to are copied once.

        Raises:
            BundleError: A weight has a type that cannot be shared, or a file was changed.
            CapacityError: The device's memory is too small.
        """
        self._device = device
        self._memory: dict[tuple[Path, ExternalData], Memory] = {}
        self._weights: dict[Path, list[tuple[Weight, Memory]]] = {}
        for graph in graphs:
            with graph.mapped() as weights:
                self._weights[graph.path] = [
                    (weight, self._copy_once(graph.path, weight, weight.external, array))
                    for weight, array in weights.values()
                    if weight.external
                ]

    def add_to(self, options: Any, graph: CheckedGraph) -> list[Any]:
        """Add a graph's weights to the options of a session.

        Args:
            options: ONNX Runtime's `SessionOptions`.
            graph: One of the graphs.

        Returns:
            Objects that must live as long as the session.
        """
        onnxruntime = import_onnxruntime("gpu")

        kept_alive: list[Any] = [self]
        for weight, memory in self._weights[graph.path]:
            value = onnxruntime.OrtValue.from_dlpack(_capsule(weight, memory.address, self._device))
            options.add_initializer(weight.name, value)
            kept_alive.append(value)
        return kept_alive

    def _copy_once(self, graph: Path, weight: Weight, external: ExternalData, array: NDArray[np.generic]) -> Memory:
        key = graph.parent, external
        if key in self._memory:
            return self._memory[key]
        if weight.onnx_type not in DLPACK_TYPES:
            raise BundleError(
                f"{graph}: {weight.name} has ONNX's type {weight.onnx_type}, expected one of {sorted(DLPACK_TYPES)}, "
                "which sessions can share; build the bundle again"
            )
        memory = self._memory[key] = self._device.allocate(external.length)
        self._device.write(memory.address, array)
        return memory


def _capsule(weight: Weight, address: int, device: Device) -> Any:
    """Return a DLPack capsule over device memory. Its consumer frees the description, not the memory itself."""
    rank, size = len(weight.shape), ctypes.sizeof(_DlpackTensor)
    start = _allocate(size + 8 * rank)
    (ctypes.c_int64 * rank).from_address(start + size)[:] = list(weight.shape)
    code, bits = DLPACK_TYPES[weight.onnx_type]
    # The consumer calls this with `start`, the address of the structure.
    free = ctypes.cast(ctypes.pythonapi.PyMem_RawFree, ctypes.c_void_p)
    tensor = _DlpackTensor(
        address, DLPACK_DEVICES[device.kind], device.index, rank, code, bits, 1, start + size, None, 0, None, free
    )
    ctypes.memmove(start, ctypes.addressof(tensor), size)
    return _new_capsule(start, b"dltensor", None)
