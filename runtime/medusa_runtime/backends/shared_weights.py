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

from medusa_runtime.backends.device import Device, Memory
from medusa_runtime.backends.weights import Place, Weight, read_weights
from medusa_runtime.errors import BundleError

DEVICES = {"cpu": 1, "cuda": 2}  # DLPack's numbers
# ONNX's numbers of types to DLPack's: code (0 a signed integer, 1 unsigned, 2 a float, 4 bfloat) and bits
TYPES = {1: (2, 32), 2: (1, 8), 3: (0, 8), 6: (0, 32), 7: (0, 64), 10: (2, 16), 16: (4, 16)}


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

    def __init__(self, graphs: Sequence[Path], device: Device) -> None:
        """Copy all of it to the device, each place once. Raises BundleError, CapacityError."""
        self._device = device
        self._memory: dict[tuple[Path, Place], Memory] = {}
        self._weights = {graph: [one for one in read_weights(graph) if one.place] for graph in graphs}
        for graph, weights in self._weights.items():
            for weight in weights:
                self._take(graph, weight)

    def give(self, graph: Path, options: Any) -> list[Any]:
        """Put them into the options of a session for `graph`; return what must live as long as that session."""
        import onnxruntime

        held: list[Any] = [self]
        for weight in self._weights[graph]:
            assert weight.place is not None  # noqa: S101 -- only those are held
            memory = self._memory[graph.parent, weight.place]
            value = onnxruntime.OrtValue.from_dlpack(_capsule(weight, memory.address, self._device.kind))
            options.add_initializer(weight.name, value)
            held.append(value)
        return held

    def _take(self, graph: Path, weight: Weight) -> None:
        place, key = weight.place, (graph.parent, weight.place)
        if place is None or key in self._memory:
            return
        if weight.dtype not in TYPES:
            raise BundleError(f"{graph}: {weight.name} is of ONNX's type {weight.dtype}, which no session shares")
        if TYPES[weight.dtype][1] // 8 * int(np.prod(weight.shape)) != place.length:
            raise BundleError(f"{graph}: {weight.name} {weight.shape} does not take {place.length} bytes")
        memory = self._memory[graph.parent, place] = self._device.allocate(place.length)
        try:
            array = np.memmap(graph.parent / place.file, np.uint8, "r", place.offset, (place.length,))
        except (OSError, ValueError) as error:
            raise BundleError(f"{graph}: {weight.name} cannot be read at {place}: {error}; build it again") from None
        self._device.write(memory.address, array)


def _capsule(weight: Weight, address: int, kind: str) -> Any:
    """Return a DLPack capsule over memory; who takes it frees what describes it, not the memory."""
    python, rank = ctypes.pythonapi, len(weight.shape)
    python.PyMem_RawMalloc.restype, python.PyMem_RawMalloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    python.PyCapsule_New.restype = ctypes.py_object
    python.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    size = ctypes.sizeof(_Tensor)
    place = python.PyMem_RawMalloc(size + 8 * max(rank, 1))
    (ctypes.c_int64 * rank).from_address(place + size)[:] = list(weight.shape)
    code, bits = TYPES[weight.dtype]
    free = ctypes.cast(python.PyMem_RawFree, ctypes.c_void_p)  # what is called with `place`, by whoever took it
    tensor = _Tensor(address, DEVICES[kind], 0, rank, code, bits, 1, place + size, None, 0, None, free)
    ctypes.memmove(place, ctypes.addressof(tensor), size)
    return python.PyCapsule_New(place, b"dltensor", None)
