"""A fake TensorRT that runs on ONNX Runtime on the host: an "engine" is the path of its graph."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import onnxruntime

TYPES = {"tensor(int32)": np.int32, "tensor(bool)": np.bool_, "tensor(float)": np.float32}


def at(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.device_memory = engine, 0
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.names

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        declared = self.engine.inputs[name].shape
        self.shapes[name] = shape
        return all(isinstance(size, str) or size == given for size, given in zip(declared, shape, strict=True))

    def execute_async_v3(self, stream: int) -> bool:
        assert self.device_memory and stream == 0
        given = {
            name: at(self.addresses[name], self.shapes[name], TYPES[one.type])
            for name, one in self.engine.inputs.items()
        }
        names = [one.name for one in self.engine.session.get_outputs()]
        for name, array in zip(names, self.engine.session.run(names, given), strict=True):
            at(self.addresses[name], array.shape, array.dtype)[...] = array
        return True


class Engine:
    device_memory_size = 64

    def __init__(self, data: bytes) -> None:
        self.session = onnxruntime.InferenceSession(data.decode(), providers=["CPUExecutionProvider"])
        self.inputs = {one.name: one for one in self.session.get_inputs()}
        self.names = [*self.inputs, *(one.name for one in self.session.get_outputs())]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_execution_context_without_device_memory(self) -> Context:
        return Context(self)


class Logger:
    ERROR = 1

    def __init__(self, _severity: int) -> None:
        pass


class Runtime:
    def __init__(self, _logger: Logger) -> None:
        pass

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        return Engine(data) if data.endswith(b".onnx") else None
