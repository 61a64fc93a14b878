"""Casts a traced graph to the precision of a GPU: matrix multiplications and KV rows in 16 bits, sums in fp32.

These stay in fp32:

- the residual stream and its norms, and therefore the output `hidden`: it accumulates over all layers;
- the lm_head, and therefore `logits`: the values of two tokens may be closer than 16 bits can distinguish;
- the angles of rotary embeddings, and masks.

`graph.decompose` computes softmax and rotary embeddings in fp32 too. The heads run in 16 bits throughout, for the
decoder verifies what they propose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from medusa_runtime.contract import LOGITS
from medusa_runtime.errors import UnsupportedModelError
from numpy.typing import NDArray

from medusa_exporter.graph.edit import insert, is_past_input

FLOAT = ir.DataType.FLOAT
DTYPES = {"fp32": FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
MATMULS = ("MatMul", "Gemm")
ATTENTION_INPUTS = 3  # queries, keys and values of an Attention node; its mask, the next input, stays in fp32


def cast_precision(model: ir.Model, dtype: ir.DataType) -> None:
    """Cast a graph in place. Past rows and new rows get the type `dtype`; all names stay.

    Raises:
        UnsupportedModelError: A weight has values outside the range of `dtype`.
    """
    if dtype != FLOAT:
        _PrecisionCaster(model.graph, dtype).apply()


class _PrecisionCaster:
    """Casts one graph to `dtype`, node by node; `_fp32` collects the values that stay in fp32."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self._graph, self._dtype = graph, dtype
        self._fp32: set[ir.Value] = set()
        self._angles: set[ir.Value] = set()  # the subset that is computed from integers and booleans only
        self._lm_head = _lm_head_weight(graph)
        self._casts: dict[ir.Value, ir.Value] = {}

    def apply(self) -> None:
        """Visit the nodes in order."""
        for value in self._graph.inputs:
            if is_past_input(value):
                value.type = ir.TensorType(self._dtype)  # a new type: copies of a graph share the type object
        for node in list(self._graph):
            if self._stays_fp32(node):
                self._cast_inputs_to_fp32(node)
                self._fp32.update(node.outputs)
            else:
                self._cast_to_16_bits(node)

    def _stays_fp32(self, node: ir.Node) -> bool:
        """Return whether the result of a node stays in fp32."""
        if _multiplies_weight(node):
            return node.inputs[1] is self._lm_head or node.inputs[0] in self._angles
        if self._reads_tied_embedding(node):
            return True
        operands = _float_operands(node)
        if self._computes_angles(node, operands):
            self._angles.update(node.outputs)
            return True
        if not operands:
            return False
        if node.op_type == "Add":  # a residual sum, if one of its operands is the residual stream
            return any(value in self._fp32 for value in operands)
        return self._scales_by_inexact_factor(node) or all(value in self._fp32 for value in operands)

    def _reads_tied_embedding(self, node: ir.Node) -> bool:
        """Return whether a node looks tokens up in an embedding that is the lm_head's weight too."""
        return node.op_type == "Gather" and node.inputs[0] is self._lm_head

    def _computes_angles(self, node: ir.Node, operands: list[ir.Value]) -> bool:
        """Return whether a node computes angles or a mask: floats that depend on integers and booleans only."""
        if operands:
            return all(value in self._angles for value in operands)
        return node.op_type in ("Cast", "Where") and FLOAT in (node.outputs[0].dtype, _cast_target(node))

    def _scales_by_inexact_factor(self, node: ir.Node) -> bool:
        """Return whether a node multiplies by a scalar that `dtype` would round for all rows alike (Granite's)."""
        return node.op_type == "Mul" and any(self._is_rounded(value) for value in node.inputs)

    def _is_rounded(self, value: ir.Value | None) -> bool:
        tensor = None if value is None else value.const_value
        if tensor is None or tensor.size != 1 or tensor.dtype != FLOAT:
            return False
        factor = tensor.numpy().reshape(())
        return bool(factor.astype(self._dtype.numpy()).astype(np.float32) != factor)

    def _cast_inputs_to_fp32(self, node: ir.Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == self._dtype:
                node.replace_input_with(index, self._insert_cast(node, value, FLOAT))

    def _cast_to_16_bits(self, node: ir.Node) -> None:
        """Cast a node's float inputs to `dtype`, and thereby its results."""
        if node.op_type == "TopK":  # does not support bf16; only its indices are used
            self._cast_inputs_to_fp32(node)
            return
        last = ATTENTION_INPUTS if node.op_type == "Attention" else len(node.inputs)
        for index, value in enumerate(node.inputs[:last]):
            if value is None or value.dtype not in (FLOAT, None):
                continue
            if value.const_value is not None:
                node.replace_input_with(index, _cast_constant(self._graph, value, self._dtype))
            elif node.op_type != "Shape" and (value in self._fp32 or value.dtype == FLOAT):
                node.replace_input_with(index, self._cast_once(node, value))
        reads_16_bits = any(value is not None and value.dtype == self._dtype for value in node.inputs)
        for value in node.outputs:
            if value.dtype in (FLOAT, None) and reads_16_bits:
                value.type = ir.TensorType(self._dtype)
        if node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].const_value is not None:
            self._cast_embedding_to_fp32(node)

    def _cast_once(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """Return a value in 16 bits; all its consumers, of which `node` is the first, share one Cast."""
        if value not in self._casts:
            self._casts[value] = self._insert_cast(node, value, self._dtype)
        return self._casts[value]

    def _insert_cast(self, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        cast = insert(self._graph, node, "Cast", [value], dtype, {"to": dtype})
        cast.shape = value.shape
        return cast

    def _cast_embedding_to_fp32(self, gather: ir.Node) -> None:
        """Cast the rows of an embedding to fp32: the residual stream starts there."""
        rows = gather.outputs[0]
        if rows.dtype != self._dtype:
            return
        cast = ir.node("Cast", [rows], attributes={"to": FLOAT})
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(FLOAT), rows.shape
        self._graph.insert_after(gather, cast)
        for use in list(rows.uses()):
            if use.node is not cast:
                use.node.replace_input_with(use.idx, cast.outputs[0])
        self._fp32.add(cast.outputs[0])


def _multiplies_weight(node: ir.Node) -> bool:
    """Return whether a node is a matrix multiplication by a constant."""
    return node.op_type in MATMULS and node.inputs[1] is not None and node.inputs[1].const_value is not None


def _float_operands(node: ir.Node) -> list[ir.Value]:
    """Return the float inputs of a node that are not constant."""
    return [
        value
        for value in node.inputs
        if value is not None and value.const_value is None and value.dtype in DTYPES.values()
    ]


def _cast_target(node: ir.Node) -> ir.DataType | None:
    return ir.DataType(node.attributes["to"].as_int()) if "to" in node.attributes else None


def _lm_head_weight(graph: ir.Graph) -> ir.Value | None:
    """Return the weight of the matrix multiplication that computes the logits."""
    [value] = [value for value in graph.outputs if value.name == LOGITS]
    node = value.producer()
    while node is not None and node.op_type not in MATMULS:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None:
        raise RuntimeError(f"no {' or '.join(MATMULS)} on the way to the output {LOGITS}, expected the lm_head's")
    return node.inputs[1]


def _cast_constant(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return a constant in `dtype`, shared by all its consumers; it is computed when it is read, so no copy is kept."""
    name, tensor = f"{value.name}.{dtype.name.lower()}", value.const_value
    if name in graph.initializers:
        return graph.initializers[name]
    assert tensor is not None  # noqa: S101 -- `_cast_to_16_bits` has checked it

    _check_range(value.name, tensor.numpy(), dtype)

    def read() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(dtype.numpy()), name=name)

    lazy = ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)
    cast = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape, const_value=lazy)
    graph.register_initializer(cast)
    return cast


def _check_range(name: str | None, weight: NDArray[Any], dtype: ir.DataType) -> None:
    largest = max(-float(weight.min()), float(weight.max())) if weight.size else 0.0
    limit = float(np.finfo(np.float16).max)
    if dtype == ir.DataType.FLOAT16 and not largest <= limit:
        raise UnsupportedModelError(
            f"the weight {name} has values up to {largest:.3g}, expected at most {limit:.0f}, fp16's largest value; "
            "build with --precision bf16 or fp32"
        )
