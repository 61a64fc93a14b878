"""Weight-only quantisation: products with a weight become ONNX Runtime's MatMulNBits.

Each block of a column of the weight has a scale of its own, and inside the operator each block of a row of activations
has one too (accuracy level 4: products of 8-bit integers). So rows stay independent of each other: a node's logits
depend on its ancestors only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
from medusa_runtime.contract import TOKENS
from medusa_runtime.errors import UnsupportedModelError
from onnx_ir.passes import common

from medusa_exporter.graph.calibration import Ranges
from medusa_exporter.graph.edit import ORT_DOMAIN, constant
from medusa_exporter.graph.integer_matmul import use_integer_matmuls
from medusa_exporter.graph.lazy_weights import ConcatenatedColumns, SelectedRows
from medusa_exporter.graph.nbits_weight import NBitsWeight, Read
from medusa_exporter.graph.single_row_padding import pad_single_rows
from medusa_exporter.precisions import FIXED_SCALES, FORMATS, WeightFormat

ACCURACY_LEVEL = 4  # activations in 8 bits; the levels below it compute in floats and are several times slower


def with_precision(model: ir.Model, precision: str, ranges: Ranges) -> ir.Model:
    """Return a copy of `model` in a precision of FORMATS, which shares the tensors that stay as they are.

    ranges: of activations, for precisions of FIXED_SCALES.
    """
    found, to = model.clone(), FORMATS[precision]
    if precision in FIXED_SCALES:
        use_integer_matmuls(found, ranges)
    if to is not None:
        quantise(found, to)
        pad_single_rows(found)
    return found


def quantise_draft(model: ir.Model, to: WeightFormat) -> ir.Model:
    """Quantise the draft's products only, in place: those that the graph's output `tokens` comes from."""
    draft = _before(value for value in model.graph.outputs if value.name == TOKENS)
    return _quantise(model, [node for node in model.graph if node in draft], to)  # in order: builds give equal files


def quantise(model: ir.Model, to: WeightFormat) -> ir.Model:
    """Quantise every weight that a MatMul or Gemm multiplies by, in place; the embedding's rows stay as they are."""
    return _quantise(model, model.graph, to)


def _quantise(model: ir.Model, nodes: Iterable[ir.Node], to: WeightFormat) -> ir.Model:
    graph = model.graph
    graph.opset_imports[ORT_DOMAIN] = 1
    for node in list(nodes):
        _quantise_product(graph, node, to)
    common.RemoveUnusedNodesPass()(model)
    return model


def _before(values: Iterable[ir.Value]) -> set[ir.Node]:
    """All nodes that the values come from."""
    found: set[ir.Node] = set()
    ahead = [value.producer() for value in values]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found:
            found.add(node)
            ahead += [other.producer() for other in node.inputs if other is not None]
    return found


def _quantise_product(graph: ir.Graph, node: ir.Node, to: WeightFormat) -> None:
    weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
    if weight is None or weight.const_value is None:
        return
    if node.op_type == "Gemm":
        _quantise_gemm(graph, node, weight, to)
    elif weight.const_value.shape.rank() == 3:
        _quantise_stack(graph, node, weight, to)
    else:
        rows, columns = weight.const_value.shape.numpy()
        read = _reader(weight.const_value)
        _become(node, "MatMulNBits", *_operands(graph, node.inputs[0], read, (rows, columns), weight.name, to))


def _quantise_gemm(graph: ir.Graph, node: ir.Node, weight: ir.Value, to: WeightFormat) -> None:
    """Serve rows @ W.T + bias, as `torch.nn.Linear` is exported."""
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    if given.get("transA", 0) or given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0:
        raise UnsupportedModelError(f"a Gemm with {given} cannot be quantised; expected x @ W.T + bias")
    assert weight.const_value is not None  # noqa: S101 -- `_quantise_product` has looked
    read, (rows, columns) = _reader(weight.const_value), weight.const_value.shape.numpy()
    if given.get("transB", 0):
        read, rows, columns = _transposed_reader(weight.const_value), columns, rows
    inputs, attributes = _operands(graph, node.inputs[0], read, (rows, columns), weight.name, to)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        _become(node, "MatMulNBits", inputs, attributes)
        return
    product = _product(graph, node, inputs, attributes)
    _become(node, "Add", [product, bias], {}, domain="")


def _quantise_stack(graph: ir.Graph, node: ir.Node, weight: ir.Value, to: WeightFormat) -> None:
    """(1 or K, N, in) @ (K, in, out), one product for each of K heads: MatMulNBits knows no stacked weights."""
    assert weight.const_value is not None  # noqa: S101 -- `_quantise_product` has looked
    rows, stack = node.inputs[0], weight.const_value
    count, *size = weight.const_value.shape.numpy()
    parts: list[ir.Value] = []
    if rows is None or rows.shape is None or rows.shape[0] not in (1, count):
        raise UnsupportedModelError(f"{weight.name}: a stack of {count} weights on rows of unknown or another number")
    if rows.shape[0] == count and count > 1:
        split = ir.node("Split", [rows], attributes={"axis": 0, "num_outputs": count}, num_outputs=count)
        for part in split.outputs:
            part.type, part.shape = rows.type, ir.Shape([1, *rows.shape[1:]])
        graph.insert_before(node, split)
        parts = list(split.outputs)
    products = []
    for k, part in enumerate(parts or [rows] * count):
        operands = _operands(graph, part, _reader_of_one(stack, k), (size[0], size[1]), f"{weight.name}.{k}", to)
        products.append(_product(graph, node, *operands))
        products[-1].shape = None
    _become(node, "Concat", products, {"axis": 0}, domain="")


def _operands(
    graph: ir.Graph,
    rows: ir.Value | None,
    read: Read,
    shape: tuple[int, int],
    name: str | None,
    to: WeightFormat,
) -> tuple[Sequence[ir.Value | None], dict[str, int]]:
    """Register what MatMulNBits multiplies `rows` by; return its inputs and attributes. read: a weight (in, out)."""
    weight = NBitsWeight(read, shape, to, str(name))
    operands = [rows, *(constant(graph, str(one.name), one) for one in (weight.packed, weight.scales))]
    size = {"K": shape[0], "N": shape[1]}
    return operands, {**size, "bits": to.bits, "block_size": to.block, "accuracy_level": ACCURACY_LEVEL}


def _product(
    graph: ir.Graph, before: ir.Node, inputs: Sequence[ir.Value | None], attributes: dict[str, int]
) -> ir.Value:
    """Put a MatMulNBits in front of a node and return what it gives."""
    new = ir.node("MatMulNBits", inputs, attributes=attributes, domain=ORT_DOMAIN)
    new.outputs[0].type, new.outputs[0].shape = before.outputs[0].type, before.outputs[0].shape
    graph.insert_before(before, new)
    return new.outputs[0]


def _become(
    node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict[str, int], domain: str = ORT_DOMAIN
) -> None:
    """Turn a node into another that gives the same value, whose name may be an output of the graph."""
    node.op_type, node.domain = op_type, domain
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    node.attributes.clear()
    for name, number in attributes.items():
        node.attributes.add(ir.AttrInt64(name, number))


def _reader(tensor: ir.TensorProtocol) -> Read:
    """How to get columns of a weight (in, out) when they are asked for; no copy is held meanwhile."""
    if isinstance(tensor, ConcatenatedColumns):
        return lambda some: np.asarray(tensor.columns(some), dtype=np.float32)
    return lambda some: np.asarray(tensor.numpy()[:, some], dtype=np.float32)


def _transposed_reader(tensor: ir.TensorProtocol) -> Read:
    """The same of a weight that is stored as (out, in)."""
    if isinstance(tensor, SelectedRows):
        return lambda some: tensor.rows(some).T
    return lambda some: np.asarray(tensor.numpy()[some], dtype=np.float32).T


def _reader_of_one(tensor: ir.TensorProtocol, k: int) -> Read:
    """The same of one of a stack of weights, (K, in, out)."""
    return lambda some: np.asarray(tensor.numpy()[k][:, some], dtype=np.float32)
