"""Finds out whether ONNX Runtime adds products of 8-bit integers exactly on this processor.

x86 processors without VNNI add two products of an unsigned and a signed byte in 16 bits, where 2 · 255 · 127 does not
fit: sums are wrong without an error. ONNX Runtime can then use slower, exact instructions, but only if it is told to;
its option applies to processors with VNNI too, where it only costs time. So the sums are tried out.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

EXACT_OPTION = "session.x64quantprecision"  # of a session: use the exact instructions
DEPTH = 64  # products of one sum
UNSIGNED, SIGNED = 255, 127  # the largest bytes, whose sums overflow first
ELEMENT_TYPES = {"uint8": 2, "int8": 3, "int32": 6}  # ONNX's numbers of element types


def set_exact_products(onnxruntime: Any, options: Any) -> None:
    """Let sessions with these options add products of 8-bit integers exactly, at the least cost."""
    if not products_are_exact(onnxruntime):
        options.add_session_config_entry(EXACT_OPTION, "1")


@functools.cache
def products_are_exact(onnxruntime: Any) -> bool:
    """Return whether sums of products of unsigned and signed bytes are exact without the option; tried once, 2 ms."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(probe_model(), options, providers=["CPUExecutionProvider"])
    for rows in (1, 2, 8):  # other kernels
        (sums,) = session.run(None, {"a": np.full((rows, DEPTH), UNSIGNED, dtype=np.uint8)})
        if not (sums == DEPTH * UNSIGNED * SIGNED).all():
            return False
    return True


def probe_model() -> bytes:
    """Return an ONNX model that multiplies `a`, uint8 (rows, DEPTH), by a constant int8 matrix of the largest bytes.

    It is written field by field (onnx.proto, IR version 8), because the runtime does without the package onnx.
    """
    weight = np.full((DEPTH, DEPTH), SIGNED, dtype=np.int8)
    node = _text(1, "a") + _text(1, "w") + _text(2, "y") + _text(4, "MatMulInteger")
    initializer = b"".join(_number(1, size) for size in weight.shape) + _number(2, ELEMENT_TYPES["int8"])
    initializer += _text(8, "w") + _field(9, weight.tobytes())
    graph = _field(1, node) + _text(2, "probe") + _field(5, initializer)
    graph += _field(11, _signature("a", "uint8")) + _field(12, _signature("y", "int32"))
    return _number(1, 8) + _field(7, graph) + _field(8, _text(1, "") + _number(2, 13))


def _signature(name: str, dtype: str) -> bytes:
    """Return a ValueInfoProto of shape ("rows", DEPTH)."""
    shape = _field(1, _text(2, "rows")) + _field(1, _number(1, DEPTH))
    return _text(1, name) + _field(2, _field(1, _number(1, ELEMENT_TYPES[dtype]) + _field(2, shape)))


def _field(number: int, payload: bytes) -> bytes:
    """Return a length-delimited field of a protobuf message."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _text(number: int, text: str) -> bytes:
    return _field(number, text.encode())


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    """Return an integer in 7-bit groups, the lowest first."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
