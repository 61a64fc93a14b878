"""Types a traced graph as a GPU runs it: products and KV rows in 16 bits, what adds up over layers in fp32.

In fp32 stay the residual stream with its norms, hence `hidden`, and the lm_head, hence `logits`, where neighbours are
nearer to each other than 16 bits can tell; angles and masks too. The lowering adds softmax and rope
(`graph.decompose`). The heads only guess: all that they compute is in 16 bits.
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
PRODUCTS = ("MatMul", "Gemm")
ATTENTION_INPUTS = 3  # queries, keys, values; the mask behind them stays in fp32


def cast_precision(model: ir.Model, dtype: ir.DataType) -> None:
    """Retype in place. The past's rows and the new ones become `dtype`; all names stay.

    Raises UnsupportedModelError for a weight that `dtype` cannot hold.
    """
    if dtype != FLOAT:
        _PrecisionCaster(model.graph, dtype).apply()


class _PrecisionCaster:
    """One graph on its way to `dtype`; `exact` are the values that stay in fp32."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self._graph, self._dtype = graph, dtype
        self._exact: set[ir.Value] = set()
        self._angles: set[ir.Value] = set()  # of these, what comes of whole numbers and truth values alone
        self._lm_head = _lm_head(graph)
        self._casts: dict[ir.Value, ir.Value] = {}

    def apply(self) -> None:
        """Go through the nodes in order."""
        for value in self._graph.inputs:
            if is_past_input(value):
                value.type = ir.TensorType(self._dtype)  # not its dtype: copies of a graph share what a type is
        for node in list(self._graph):
            if self._stays_exact(node):
                self._widen(node)
                self._exact.update(node.outputs)
            else:
                self._narrow(node)

    def _stays_exact(self, node: ir.Node) -> bool:
        """Whether a node's result stays in fp32: a sum over layers, what comes of it alone, logits, angles, masks."""
        if node.op_type in PRODUCTS and node.inputs[1] is not None and node.inputs[1].const_value is not None:
            return node.inputs[1] is self._lm_head or node.inputs[0] in self._angles
        if node.op_type == "Gather" and node.inputs[0] is self._lm_head:  # a tied embedding
            return True
        rows = [value for value in node.inputs if value is not None and value.const_value is None and _is_float(value)]
        if all(value in self._angles for value in rows) and (
            rows or (node.op_type in ("Cast", "Where") and FLOAT in (node.outputs[0].dtype, _target(node)))
        ):
            self._angles.update(node.outputs)
            return True
        if not rows:
            return False
        if node.op_type == "Mul" and any(self._rounds(value) for value in node.inputs):
            return True
        return (any if node.op_type == "Add" else all)(value in self._exact for value in rows)

    def _rounds(self, value: ir.Value | None) -> bool:
        """Whether a value is a factor (Granite's of what a block adds) that the type rounds, for all rows alike."""
        tensor = None if value is None else value.const_value
        if tensor is None or tensor.size != 1 or tensor.dtype != FLOAT:
            return False
        factor = tensor.numpy().reshape(())
        return bool(factor.astype(self._dtype.numpy()).astype(np.float32) != factor)

    def _widen(self, node: ir.Node) -> None:
        """Bring what a sum in fp32 adds in 16 bits to fp32."""
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == self._dtype:
                node.replace_input_with(index, self._inserted(node, value, FLOAT))

    def _narrow(self, node: ir.Node) -> None:
        if node.op_type == "TopK":  # which knows no bf16; what it gives is the order alone
            self._widen(node)
            return
        last = ATTENTION_INPUTS if node.op_type == "Attention" else len(node.inputs)
        for index, value in enumerate(node.inputs[:last]):
            if value is None or value.dtype not in (FLOAT, None):
                continue
            if value.const_value is not None:
                node.replace_input_with(index, _narrowed(self._graph, value, self._dtype))
            elif node.op_type != "Shape" and (value in self._exact or value.dtype == FLOAT):
                node.replace_input_with(index, self._cast(node, value))
        for value in node.outputs:
            if value.dtype in (FLOAT, None) and any(
                one is not None and one.dtype == self._dtype for one in node.inputs
            ):
                value.type = ir.TensorType(self._dtype)
        if node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].const_value is not None:
            self._back(node.outputs[0])

    def _cast(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """Give a value in 16 bits, cast once for all that want it so; `node` is the first of them."""
        if value not in self._casts:
            self._casts[value] = self._inserted(node, value, self._dtype)
        return self._casts[value]

    def _inserted(self, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        cast = insert(self._graph, node, "Cast", [value], dtype, {"to": dtype})
        cast.shape = value.shape
        return cast

    def _back(self, rows: ir.Value) -> None:
        """Bring an embedding's rows to fp32, in which the residual stream goes on."""
        if rows.dtype != self._dtype:
            return
        node = rows.producer()
        assert node is not None  # noqa: S101 -- a Gather
        cast = ir.node("Cast", [rows], attributes={"to": FLOAT})
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(FLOAT), rows.shape
        self._graph.insert_after(node, cast)
        for use in list(rows.uses()):
            if use.node is not cast:
                use.node.replace_input_with(use.idx, cast.outputs[0])
        self._exact.add(cast.outputs[0])


def _is_float(value: ir.Value) -> bool:
    return value.dtype in DTYPES.values()


def _target(node: ir.Node) -> ir.DataType | None:
    return ir.DataType(node.attributes["to"].as_int()) if "to" in node.attributes else None


def _lm_head(graph: ir.Graph) -> ir.Value | None:
    """The weight of the product that the logits come from."""
    [value] = [value for value in graph.outputs if value.name == LOGITS]
    node = value.producer()
    while node is not None and node.op_type not in PRODUCTS:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None:
        raise RuntimeError("the logits come of no product")
    return node.inputs[1]


def _narrowed(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Give a constant in `dtype`, once for all that use it; computed when it is read, so that no copy is held."""
    name, tensor = f"{value.name}.{dtype.name.lower()}", value.const_value
    if name in graph.initializers:
        return graph.initializers[name]
    assert tensor is not None  # noqa: S101 -- `_retype` has looked

    _check_range(value.name, tensor.numpy(), dtype)

    def narrow() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(dtype.numpy()), name=name)

    lazy = ir.LazyTensor(narrow, dtype=dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)
    made = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape, const_value=lazy)
    graph.register_initializer(made)
    return made


def _check_range(name: str | None, weight: NDArray[Any], dtype: ir.DataType) -> None:
    largest = max(-float(weight.min()), float(weight.max())) if weight.size else 0.0
    limit = float(np.finfo(np.float16).max)
    if dtype == ir.DataType.FLOAT16 and not largest <= limit:
        raise UnsupportedModelError(
            f"the weight {name} has values up to {largest:.3g}, fp16 holds {limit:.0f} at most; build "
            "with --precision bf16 or fp32"
        )
