"""Weights that several sessions of ONNX Runtime share: on the device once, and handed to each where they lie.

A session takes a tensor of the caller's as an initialiser (`SessionOptions.add_initializer`), and a tensor over memory
of the caller's own is made by DLPack (https://dmlc.github.io/dlpack, version 0).
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

DEVICES = {"cpu": 1, "cuda": 2}  # DLPack's numbers
# ONNX's numbers of types to DLPack's: code (0 a signed integer, 1 unsigned, 2 a float, 4 bfloat) and bits
TYPES = {1: (2, 32), 2: (1, 8), 3: (0, 8), 6: (0, 32), 7: (0, 64), 10: (2, 16), 16: (4, 16)}


# of Python's own functions, by types of ours: those that stand at ctypes.pythonapi are everybody's
_allocate = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(("PyMem_RawMalloc", ctypes.pythonapi))
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class _Tensor(ctypes.Structure):
    """DLManagedTensor, and behind it the sizes that it points at."""

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
    """What lies beside some graphs of a bundle, on a device."""

    def __init__(self, graphs: Sequence[CheckedGraph], device: Device) -> None:
        """Copy all of it to the device, each place once. Raises BundleError, CapacityError."""
        self._device = device
        self._memory: dict[tuple[Path, ExternalData], Memory] = {}
        self._weights: dict[Path, list[tuple[Weight, Memory]]] = {}
        for graph in graphs:
            with graph.mapped() as weights:
                self._weights[graph.path] = [
                    (one, self._copied(graph.path, one, one.place, array))
                    for one, array in weights.values()
                    if one.place
                ]

    def give(self, graph: CheckedGraph, options: Any) -> list[Any]:
        """Put them into the options of a session for `graph`; return what must live as long as that session."""
        onnxruntime = import_onnxruntime("gpu")

        held: list[Any] = [self]
        for weight, memory in self._weights[graph.path]:
            value = onnxruntime.OrtValue.from_dlpack(_capsule(weight, memory.address, self._device))
            options.add_initializer(weight.name, value)
            held.append(value)
        return held

    def _copied(self, graph: Path, weight: Weight, place: ExternalData, array: NDArray[np.generic]) -> Memory:
        key = graph.parent, place
        if key in self._memory:
            return self._memory[key]
        if weight.dtype not in TYPES:
            raise BundleError(f"{graph}: {weight.name} is of ONNX's type {weight.dtype}, which no session shares")
        memory = self._memory[key] = self._device.allocate(place.length)
        self._device.write(memory.address, array)
        return memory


def _capsule(weight: Weight, address: int, device: Device) -> Any:
    """Return a DLPack capsule over a device's memory; who takes it frees what describes it, not the memory."""
    rank, size = len(weight.shape), ctypes.sizeof(_Tensor)
    place = _allocate(size + 8 * rank)
    (ctypes.c_int64 * rank).from_address(place + size)[:] = list(weight.shape)
    code, bits = TYPES[weight.dtype]
    # what is called with `place`, by whoever took it
    free = ctypes.cast(ctypes.pythonapi.PyMem_RawFree, ctypes.c_void_p)
    tensor = _Tensor(
        address, DEVICES[device.kind], device.index, rank, code, bits, 1, place + size, None, 0, None, free
    )
    ctypes.memmove(place, ctypes.addressof(tensor), size)
    return _new_capsule(place, b"dltensor", None)
