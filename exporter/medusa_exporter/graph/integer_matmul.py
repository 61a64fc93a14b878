"""Turns matrix multiplications into integer ones (w8a8): 8-bit weights and 8-bit activations.

Each column of a weight has its own scale. Activations have one of two kinds of scale, and with both a row is rounded
without regard to other rows, and integer sums are exact in any order. So rows stay independent of each other, and a row
has the same bits in any step:

- the results of norms and attention, whose ranges are bounded, have one scale for all rows and channels, computed
  beforehand;
- the products of gated MLPs, and the rows of the lm_head (the decoder's and the draft's), have one scale for each row:
  the row is divided by its largest magnitude before it is rounded, and the result is multiplied by it.

One fixed scale is enough for all channels of an activation because large channels are scaled down beforehand, and the
corresponding rows of the weight up, as in SmoothQuant (arXiv 2211.10438, section 4): by
`range ** 0.65 / largest weight ** 0.35` of the channel. If a norm produces the rows, this becomes part of its gain and
costs nothing. For example, a channel with activations up to 16 and weights up to 1 is divided by 16 ** 0.65 = 6.1: its
activations reach 2.6 and its weights 6.1.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from medusa_exporter.graph.calibration import Ranges, bounded_matmuls, bounded_source
from medusa_exporter.graph.edit import ORT_DOMAIN, constant, insert, only_consumer, producer_of_type, replace
from medusa_exporter.graph.integer_weight import IntegerWeight
from medusa_exporter.graph.merge_matmuls import is_constant

STRENGTH = 0.65  # the share of the range that moves into weights: mean KL divergence 0.013; 0.5: 0.020, 0.8: 0.015
ZERO_POINT = 128  # of activations, which are unsigned: ONNX Runtime is fast for unsigned rows and signed weights
LIMIT = 127  # the largest magnitude of an activation
MIN_MAGNITUDE = 1e-5  # ranges are at least this, so that no scale is 0
# The inputs of each norm that its rows are multiplied by or that are added to them: gain and bias
GAIN = {"RMSNormalization": (1,), "SkipSimplifiedLayerNormalization": (2,), "LayerNormalization": (1, 2)}
# ONNX Runtime multiplies each column's scale by the activation's in every call, one after the other, 3 to 8 ns for a
# column. From this number of columns on, an operator of its own for the columns' scales takes less time.
SEPARATE_COLUMNS = 2048

FLOAT, UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8
Vector = NDArray[np.float32]


def use_integer_matmuls(model: ir.Model, ranges: Ranges) -> None:
    """Turn multiplications by constant weights into integer ones, in place: all whose rows have a range, and others."""
    graph = model.graph
    graph.opset_imports[ORT_DOMAIN] = 1
    bounded = bounded_matmuls(graph)
    rest = [node for node in graph if node not in bounded and has_row_scales(node)]
    for number, node in enumerate(bounded):
        _use_fixed_scale(graph, node, ranges, f"integers.{number}")
    for number, node in enumerate(rest, len(bounded)):
        _use_row_scales(graph, node, ranges, f"integers.{number}")


def has_row_scales(node: ir.Node) -> bool:
    """Return whether a node multiplies the products of a gated MLP, or is an lm_head."""
    if node.op_type not in ("MatMul", "Gemm") or not is_constant(node.inputs[1], rank=2):
        return False
    return node.op_type == "Gemm" or producer_of_type(node.inputs[0], "Mul") is not None


def _use_fixed_scale(graph: ir.Graph, node: ir.Node, ranges: Ranges, name: str) -> None:
    rows = node.inputs[0]
    assert rows is not None  # noqa: S101 -- `bounded_matmuls` has checked it
    magnitudes = np.maximum(ranges[str(rows.name)], MIN_MAGNITUDE)
    weight = IntegerWeight.of(node, f"{name}.weight")
    divisors = (magnitudes**STRENGTH / np.maximum(weight.rows, MIN_MAGNITUDE) ** (1 - STRENGTH)).astype(np.float32)
    if _divide_gain(graph, rows, divisors, name):
        magnitudes = magnitudes / divisors
        weight.multiply_rows(divisors)
    scale = constant(graph, f"{name}.scale", np.array(magnitudes.max() / LIMIT, dtype=np.float32))
    addition = _addition_of_bias(node) if len(weight.scales) < SEPARATE_COLUMNS else None
    if addition is None:
        _become(graph, node, _multiply(graph, node, rows, scale, weight, name))
    else:
        _become(graph, addition, _multiply(graph, node, rows, scale, weight, name, addition.inputs[1]))
        graph.remove(node, safe=True)


def _use_row_scales(graph: ir.Graph, node: ir.Node, ranges: Ranges, name: str) -> None:
    """Divide each row by its largest magnitude, multiply it, and multiply the result by that magnitude.

    A row of zeros becomes NaN, which is rounded to some integer, and its result is multiplied by 0.
    """
    rows, source = node.inputs[0], bounded_source(node.inputs[0])
    assert rows is not None  # noqa: S101 -- `has_row_scales` has checked it
    weight = IntegerWeight.of(node, f"{name}.weight")
    if source is not None and str(source.name) in ranges:  # its large channels would leave few bits to the others
        magnitudes = np.maximum(ranges[str(source.name)], MIN_MAGNITUDE)
        divisors = np.sqrt(magnitudes / np.maximum(weight.rows, MIN_MAGNITUDE)).astype(np.float32)
        rows = insert(graph, node, "Mul", [rows, constant(graph, f"{name}.divided", 1 / divisors)], FLOAT)
        weight.multiply_rows(divisors)
    last = constant(graph, "integers.last_axis", np.array([-1]))
    magnitude = insert(graph, node, "ReduceMax", [insert(graph, node, "Abs", [rows], FLOAT), last], FLOAT)
    divided = insert(graph, node, "Div", [rows, magnitude], FLOAT)
    scale = constant(graph, "integers.row_scale", np.array(1 / LIMIT, dtype=np.float32))
    product = _multiply(graph, node, divided, scale, weight, name)
    _become(graph, node, insert(graph, node, "Mul", [product, magnitude], FLOAT))


def _addition_of_bias(node: ir.Node) -> ir.Node | None:
    """Return the Add of a constant vector, its second input, that alone reads a node's result; None otherwise."""
    add = only_consumer(node.outputs[0], "Add")
    if add is None or add.inputs[0] is not node.outputs[0] or not is_constant(add.inputs[1], rank=1):
        return None
    return add


def _multiply(
    graph: ir.Graph,
    node: ir.Node,
    rows: ir.Value,
    scale: ir.Value,
    weight: IntegerWeight,
    name: str,
    bias: ir.Value | None = None,
) -> ir.Value:
    """Insert QuantizeLinear and MatMulIntegerToFloat before a node; `name` begins the constants' names.

    A bias is added by the operator itself, which `SEPARATE_COLUMNS` excludes.
    """
    zero_point = constant(graph, "integers.zero", np.array(ZERO_POINT, dtype=np.uint8))
    quantised = insert(graph, node, "QuantizeLinear", [rows, scale, zero_point], UINT8)
    columns = constant(graph, f"{name}.columns", weight.scales)
    separate = len(weight.scales) >= SEPARATE_COLUMNS
    in_operator = constant(graph, "integers.one", np.array(1, dtype=np.float32)) if separate else columns
    values = constant(graph, f"{name}.weight", weight.values)
    inputs = [quantised, values, scale, in_operator, zero_point, *([None, bias] if bias is not None else [])]
    product = ir.node("MatMulIntegerToFloat", inputs, domain=ORT_DOMAIN)
    product.outputs[0].type = ir.TensorType(FLOAT)
    graph.insert_before(node, product)
    return insert(graph, node, "Mul", [product.outputs[0], columns], FLOAT) if separate else product.outputs[0]


def _become(graph: ir.Graph, node: ir.Node, result: ir.Value) -> None:
    """Use `result`, and the bias that a Gemm adds, in place of a node's output."""
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        result = insert(graph, node, "Add", [result, node.inputs[2]], FLOAT)
    result.shape = node.outputs[0].shape
    replace(node.outputs[0], result)
    graph.remove(node, safe=True)


def _divide_gain(graph: ir.Graph, rows: ir.Value, divisors: Vector, name: str) -> bool:
    """Divide the channels of rows by changing the gain of the norm that produces them.

    Returns:
        False, and nothing is changed, if the rows come from no norm or if other nodes read them too.
    """
    norm = rows.producer()
    if norm is None or norm.op_type not in GAIN or len(list(rows.consumers())) > 1 or rows.is_graph_output():
        return False
    places = [place for place in GAIN[norm.op_type] if place < len(norm.inputs) and norm.inputs[place] is not None]
    tensors = [value.const_value for value in (norm.inputs[place] for place in places) if value is not None]
    if None in tensors or not tensors:
        return False
    for place, tensor in zip(places, tensors, strict=True):
        assert tensor is not None  # noqa: S101 -- checked above
        smaller = (tensor.numpy() / divisors).astype(np.float32)
        norm.replace_input_with(place, constant(graph, f"{name}.gain.{place}", smaller))
    return True
