"""Products of whole numbers: 7-bit weights with a scale for each column, 8-bit activations with one fixed scale.

A row's rounding depends on nothing but the row, and sums of whole numbers are exact in any order, so rows do not see
each other and a row has the same bits whatever stands beside it. One scale serves all channels of an activation because
large channels are made smaller beforehand, and the weights' rows larger, as in SmoothQuant (arXiv 2211.10438, section
4): by range^0.65 / largest weight^0.35. Where a norm gives the rows, that is part of its gain and costs nothing.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from medusa_exporter.graph.calibration import Ranges, bounded_matmuls
from medusa_exporter.graph.edit import ORT_DOMAIN, constant, insert

STRENGTH = 0.65  # how much of the range moves into the weights: mean KL 0.013; 0.5: 0.020, 0.8: 0.015
ZERO = 128  # of activations, which are unsigned: ONNX Runtime has fast products of unsigned rows and signed weights
# Of weights: processors without VNNI add two products of bytes up in 16 bits, and 2 * 255 * 63 is the most that fits.
# (With 127 mean KL would be 0.006, where it can be trusted.)
WEIGHT_LIMIT = 63
LEAST = 1e-5
# Which inputs of a norm its rows are multiplied by, and what is added to them
GAIN = {"RMSNormalization": (1,), "SkipSimplifiedLayerNormalization": (2,), "LayerNormalization": (1, 2)}

Matrix = NDArray[np.float32]


def use_integer_matmuls(model: ir.Model, ranges: Ranges) -> None:
    """Give every bounded product fixed scales, in place; other products stay as they are."""
    graph = model.graph
    graph.opset_imports[ORT_DOMAIN] = 1
    for number, node in enumerate(bounded_matmuls(graph)):
        _to_integer_matmul(graph, node, ranges, f"integers.{number}")


def _to_integer_matmul(graph: ir.Graph, node: ir.Node, ranges: Ranges, name: str) -> None:
    rows, weight = node.inputs[:2]
    assert rows is not None and weight is not None and weight.const_value is not None  # noqa: S101
    tensor = weight.const_value
    matrix: Matrix = np.asarray(tensor.numpy(), dtype=np.float32)
    largest = np.maximum(ranges[str(rows.name)], LEAST)
    smoothed = _smooth(graph, node, largest, matrix, name)
    if smoothed is not None:
        largest, matrix = largest / smoothed, matrix * smoothed[:, None]
    columns = np.maximum(np.abs(matrix).max(axis=0), LEAST) / WEIGHT_LIMIT
    scale = constant(graph, f"{name}.scale", np.array(largest.max() / (ZERO - 1), dtype=np.float32))
    zero = constant(graph, "integers.zero", np.array(ZERO, dtype=np.uint8))
    whole = constant(graph, f"{name}.weight", _whole_numbers(tensor, smoothed, columns, f"{name}.weight"))
    rounded = insert(graph, node, "QuantizeLinear", [rows, scale, zero], ir.DataType.UINT8)
    product = ir.node(
        "MatMulIntegerToFloat",
        [rounded, whole, scale, constant(graph, f"{name}.columns", columns.astype(np.float32)), zero],
        domain=ORT_DOMAIN,
    )
    product.outputs[0].type, product.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    graph.insert_before(node, product)
    ir.convenience.replace_all_uses_with(node.outputs[0], product.outputs[0])
    graph.remove(node, safe=True)


def _whole_numbers(tensor: ir.TensorProtocol, by: Matrix | None, columns: Matrix, name: str) -> ir.LazyTensor:
    """Divide a weight (in, out) by the scales of its columns; computed when it is written, so that no copy is held."""

    def read() -> ir.TensorProtocol:
        matrix: Matrix = np.asarray(tensor.numpy(), dtype=np.float32)
        matrix = matrix if by is None else matrix * by[:, None]
        return ir.tensor(np.round(matrix / columns).astype(np.int8), name=name)

    return ir.LazyTensor(read, dtype=ir.DataType.INT8, shape=ir.Shape(tensor.shape.numpy()), name=name)


def _smooth(graph: ir.Graph, node: ir.Node, largest: Matrix, matrix: Matrix, name: str) -> Matrix | None:
    """Divide the channels of a norm's rows, by way of its gain, if no other node sees them; by what, or None."""
    rows = node.inputs[0]
    norm = None if rows is None else rows.producer()
    if rows is None or norm is None or norm.op_type not in GAIN:
        return None
    if len(list(rows.consumers())) > 1 or rows.is_graph_output():
        return None
    places = [place for place in GAIN[norm.op_type] if place < len(norm.inputs) and norm.inputs[place] is not None]
    tensors = [value.const_value for value in (norm.inputs[place] for place in places) if value is not None]
    if None in tensors or not tensors:
        return None
    weights = np.maximum(np.abs(matrix).max(axis=1), LEAST)
    by: Matrix = (largest**STRENGTH / weights ** (1 - STRENGTH)).astype(np.float32)
    for place, tensor in zip(places, tensors, strict=True):
        assert tensor is not None  # noqa: S101 -- looked at above
        smaller = (tensor.numpy() / by).astype(np.float32)
        norm.replace_input_with(place, constant(graph, f"{name}.gain.{place}", smaller))
    return by
