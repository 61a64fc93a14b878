"""Turns matrix multiplications into integer ones (w8a8): 7-bit weights, and 8-bit activations with a fixed scale.

Each column of a weight has its own scale; an activation has one scale for all rows and channels, computed beforehand. A
row is then rounded without regard to other rows, and integer sums are exact in any order. So rows stay independent of
each other, and a row has the same bits in any step.

One scale is enough for all channels of an activation because large channels are scaled down beforehand, and the
corresponding rows of the weight up, as in SmoothQuant (arXiv 2211.10438, section 4): by
`range ** 0.65 / largest weight ** 0.35` of the channel. If a norm produces the rows, this becomes part of its gain and
costs nothing. For example, a channel with activations up to 16 and weights up to 1 is divided by 16 ** 0.65 = 6.1: its
activations reach 2.6 and its weights 6.1.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from medusa_exporter.graph.calibration import Ranges, bounded_matmuls
from medusa_exporter.graph.edit import ORT_DOMAIN, constant, insert

STRENGTH = 0.65  # the share of the range that moves into weights: mean KL divergence 0.013; 0.5: 0.020, 0.8: 0.015
ZERO_POINT = 128  # of activations, which are unsigned: ONNX Runtime is fast for unsigned rows and signed weights
# The largest magnitude of a weight: processors without VNNI add two products of bytes in 16 bits, where 2 * 255 * 63
# fits, but not 2 * 255 * 127. (With 127 the mean KL divergence would be 0.006, on processors where that is exact.)
WEIGHT_LIMIT = 63
MIN_MAGNITUDE = 1e-5  # ranges are at least this, so that no scale is 0
# The inputs of each norm that its rows are multiplied by or that are added to them: gain and bias
GAIN = {"RMSNormalization": (1,), "SkipSimplifiedLayerNormalization": (2,), "LayerNormalization": (1, 2)}

Matrix = NDArray[np.float32]


def use_integer_matmuls(model: ir.Model, ranges: Ranges) -> None:
    """Turn all `bounded_matmuls` of a graph into integer ones, in place. Other multiplications stay as they are."""
    graph = model.graph
    graph.opset_imports[ORT_DOMAIN] = 1
    for number, node in enumerate(bounded_matmuls(graph)):
        _replace_matmul(graph, node, ranges, f"integers.{number}")


def _replace_matmul(graph: ir.Graph, node: ir.Node, ranges: Ranges, name: str) -> None:
    """Replace a MatMul by QuantizeLinear and MatMulIntegerToFloat. `name` is the prefix of the new constants' names."""
    rows, weight = node.inputs[:2]
    assert rows is not None and weight is not None and weight.const_value is not None  # noqa: S101
    tensor = weight.const_value
    matrix: Matrix = np.asarray(tensor.numpy(), dtype=np.float32)
    magnitudes = np.maximum(ranges[str(rows.name)], MIN_MAGNITUDE)
    divisors = _smooth(graph, node, magnitudes, matrix, name)
    if divisors is not None:
        magnitudes, matrix = magnitudes / divisors, matrix * divisors[:, None]
    columns = np.maximum(np.abs(matrix).max(axis=0), MIN_MAGNITUDE) / WEIGHT_LIMIT
    scale = constant(graph, f"{name}.scale", np.array(magnitudes.max() / (ZERO_POINT - 1), dtype=np.float32))
    zero_point = constant(graph, "integers.zero", np.array(ZERO_POINT, dtype=np.uint8))
    integers = constant(graph, f"{name}.weight", _integer_weight(tensor, divisors, columns, f"{name}.weight"))
    quantised = insert(graph, node, "QuantizeLinear", [rows, scale, zero_point], ir.DataType.UINT8)
    new = ir.node(
        "MatMulIntegerToFloat",
        [quantised, integers, scale, constant(graph, f"{name}.columns", columns.astype(np.float32)), zero_point],
        domain=ORT_DOMAIN,
    )
    new.outputs[0].type, new.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(node.outputs[0], new.outputs[0])
    graph.remove(node, safe=True)


def _integer_weight(tensor: ir.TensorProtocol, factors: Matrix | None, columns: Matrix, name: str) -> ir.LazyTensor:
    """Return a weight (in, out) divided by the scales of its columns, as int8.

    It is computed when it is written, so that no copy is kept. `factors` multiply its rows before.
    """

    def read() -> ir.TensorProtocol:
        matrix: Matrix = np.asarray(tensor.numpy(), dtype=np.float32)
        matrix = matrix if factors is None else matrix * factors[:, None]
        return ir.tensor(np.round(matrix / columns).astype(np.int8), name=name)

    return ir.LazyTensor(read, dtype=ir.DataType.INT8, shape=ir.Shape(tensor.shape.numpy()), name=name)


def _smooth(graph: ir.Graph, node: ir.Node, magnitudes: Matrix, matrix: Matrix, name: str) -> Matrix | None:
    """Divide the channels of a MatMul's rows by changing the gain of the norm that produces them.

    Returns:
        The divisor of each channel; None if the rows come from no norm, or if other nodes read them too.
    """
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
    weights = np.maximum(np.abs(matrix).max(axis=1), MIN_MAGNITUDE)
    divisors: Matrix = (magnitudes**STRENGTH / weights ** (1 - STRENGTH)).astype(np.float32)
    for place, tensor in zip(places, tensors, strict=True):
        assert tensor is not None  # noqa: S101 -- checked above
        smaller = (tensor.numpy() / divisors).astype(np.float32)
        norm.replace_input_with(place, constant(graph, f"{name}.gain.{place}", smaller))
    return divisors
