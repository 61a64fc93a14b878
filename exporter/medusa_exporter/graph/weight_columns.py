"""Reads the columns of a multiplication's weight, in whatever form the graph stores it; nothing is copied before."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from medusa_runtime.errors import UnsupportedModelError
from numpy.typing import NDArray

from medusa_exporter.graph.lazy_weights import ConcatenatedColumns, SelectedRows

Matrix = NDArray[np.float32]
ReadColumns = Callable[[slice], Matrix]  # returns some columns of a weight (in, out)


def read_columns(node: ir.Node) -> tuple[ReadColumns, tuple[int, int]]:
    """Return a function that reads columns of the weight of a MatMul or Gemm, and the weight's shape (in, out).

    Raises:
        UnsupportedModelError: The Gemm is more than rows @ W (or W.T) + bias.
    """
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None  # noqa: S101 -- the caller has checked it
    tensor = weight.const_value
    first, second = tensor.shape.numpy()
    if node.op_type != "Gemm":
        return _columns_of(tensor), (first, second)
    options = {name: attribute.value for name, attribute in node.attributes.items()}
    if options.get("transA", 0) or options.get("alpha", 1.0) != 1.0 or options.get("beta", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"a Gemm with {options} cannot be quantised, expected x @ W.T + bias; build with --precision fp32"
        )
    if options.get("transB", 0):
        return read_rows(tensor), (second, first)
    return _columns_of(tensor), (first, second)


def read_stacked(tensor: ir.TensorProtocol, k: int) -> ReadColumns:
    """Return a function that reads columns of weight `k` of a stack (K, in, out)."""
    return lambda some: np.asarray(tensor.numpy()[k][:, some], dtype=np.float32)


def _columns_of(tensor: ir.TensorProtocol) -> ReadColumns:
    if isinstance(tensor, ConcatenatedColumns):
        return lambda some: np.asarray(tensor.columns(some), dtype=np.float32)
    return lambda some: np.asarray(tensor.numpy()[:, some], dtype=np.float32)


def read_rows(tensor: ir.TensorProtocol) -> ReadColumns:
    """Return a function that reads columns of a weight that is stored as (out, in)."""
    if isinstance(tensor, SelectedRows):
        return lambda some: tensor.rows(some).T
    return lambda some: np.asarray(tensor.numpy()[some], dtype=np.float32).T
