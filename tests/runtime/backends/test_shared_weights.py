"""Shared weights: the sessions of several graphs read one copy on the device."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from medusa_runtime.backends import shared_weights
from medusa_runtime.backends.checked_graph import CheckedGraph
from medusa_runtime.backends.shared_weights import SharedWeights
from onnx import TensorProto, helper

from .host_device import HostDevice
from .test_onnx_file import tensor

WEIGHTS = np.arange(100, dtype=np.float32)


def graph(path: Path, operator: str, weight: TensorProto) -> Path:
    """A graph y = operator(x, weight), whose weight is in shared.data."""
    sizes = [len(WEIGHTS)]
    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name in ("x", "y"))
    body = helper.make_graph([helper.make_node(operator, ["x", weight.name], ["y"])], "g", [given], [made], [weight])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def test_two_sessions_read_one_copy_and_it_outlives_them(tmp_path: Path) -> None:
    (tmp_path / "shared.data").write_bytes(bytes(40) + WEIGHTS.tobytes())
    place = ("shared.data", 40, WEIGHTS.nbytes)
    sources = [CheckedGraph(graph(tmp_path / f"{op}.onnx", op, tensor(op, place))) for op in ("Add", "Mul")]
    device = HostDevice()
    shared = SharedWeights(sources, device)
    assert device.written == [WEIGHTS.nbytes]
    (tmp_path / "shared.data").write_bytes(bytes(40) + np.full_like(WEIGHTS, -1).tobytes())  # not read again
    x = np.full_like(WEIGHTS, 2)
    for source, expected in zip(sources, (WEIGHTS + 2, WEIGHTS * 2), strict=True):
        options = onnxruntime.SessionOptions()
        kept_alive = shared.add_to(options, source)
        session = onnxruntime.InferenceSession(str(source.path), options, providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], expected)
        del session, kept_alive, options
        gc.collect()


def test_shapes_and_types_are_read_as_onnx_writes_them(tmp_path: Path) -> None:
    """A matrix in bf16, which numpy lacks."""
    upper = (np.arange(6, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    (tmp_path / "shared.data").write_bytes(upper.tobytes())
    weight = tensor("w", ("shared.data", 0, 12))
    weight.data_type = TensorProto.BFLOAT16
    del weight.dims[:]
    weight.dims.extend((2, 3))
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 3))
    cast = helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)
    body = helper.make_graph([cast], "g", [], [made], [weight])
    path = tmp_path / "graph.onnx"
    path.write_bytes(
        helper.make_model(body, opset_imports=[helper.make_opsetid("", 23)], ir_version=10).SerializeToString()
    )
    onnx.checker.check_model(str(path))
    options = onnxruntime.SessionOptions()
    kept_alive = SharedWeights([CheckedGraph(path)], HostDevice()).add_to(options, CheckedGraph(path))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {})[0], np.arange(6, dtype=np.float32).reshape(2, 3))
    assert kept_alive


def test_a_capsule_names_its_device() -> None:
    class Second(HostDevice):
        kind, index = "cuda", 1

    weight = shared_weights.Weight("w", 1, (2, 3), None, 0)
    capsule = shared_weights._capsule(weight, 4096, Second())
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )(capsule, b"dltensor")
    found = shared_weights._DlpackTensor.from_address(pointer)
    assert (found.data, found.device_type, found.device_id, found.ndim) == (4096, 2, 1, 2)
    ctypes.pythonapi.PyMem_RawFree(ctypes.c_void_p(pointer))
