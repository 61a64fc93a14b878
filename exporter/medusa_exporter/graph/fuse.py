"""Fusions for ONNX Runtime: fewer, larger operators for what stays between the products.

Each operator costs some microseconds beside its work, and each product wakes the threads anew; with 8-bit and 4-bit
weights that is a good part of a step. Three rewrites, none of which changes what is computed:

- products of the same rows (queries, keys and values; gate and up) become one, its columns split afterwards;
- GroupQueryAttention takes queries, keys and values as they come from one product, unsplit;
- a residual sum and the norm of it become SkipSimplifiedLayerNormalization, ONNX Runtime's own operator.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from medusa_exporter.graph.cleanup import strip_metadata
from medusa_exporter.graph.edit import ORT_DOMAIN, constant, only_consumer, replace
from medusa_exporter.graph.lazy_weights import ConcatenatedColumns


def fuse(model: ir.Model) -> None:
    """Apply all three in place. Inputs and outputs keep their names."""
    graph = model.graph
    graph.opset_imports[ORT_DOMAIN] = 1
    merge_matmuls(graph)
    for node in list(graph):
        if node.op_type == "RMSNormalization":
            _norm_the_sum(graph, node)
        elif node.op_type == "GroupQueryAttention":
            _attend_unsplit(node)
    common.RemoveUnusedNodesPass()(model)
    strip_metadata(model)


def merge_matmuls(graph: ir.Graph) -> None:
    """Make one product of all those of the same rows, in place; its operators are ONNX's own."""
    together: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.op_type == "MatMul" and node.inputs[0] is not None and _constant(node.inputs[1], rank=2) is not None:
            together[node.inputs[0]].append(node)
    for nodes in together.values():
        if len(nodes) > 1:
            _merge(graph, nodes)


def _merge(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Make one product, with one sum of all biases if each product has a bias, and a Split behind it."""
    rows, first = nodes[0].inputs[0], nodes[0]
    assert rows is not None  # noqa: S101 -- `fuse` has looked
    product = _add(graph, first, "MatMul", [rows, _side_by_side(graph, [node.inputs[1] for node in nodes])])
    biases = [_bias(node) for node in nodes]
    ends = [node.outputs[0] for node in nodes]
    if None not in biases:
        product = _add(graph, first, "Add", [product, _side_by_side(graph, biases)])
        ends = [next(iter(end.consumers())).outputs[0] for end in ends]
    _split(graph, first, product, ends)


def _attend_unsplit(attention: ir.Node) -> None:
    """Split -> queries, keys, values -> GroupQueryAttention becomes GroupQueryAttention of what was split."""
    parts = list(attention.inputs[:3])
    split = None if parts[0] is None else parts[0].producer()
    if split is None or split.op_type != "Split" or list(split.outputs) != parts:
        return
    attention.replace_input_with(0, split.inputs[0])
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)


def _norm_the_sum(graph: ir.Graph, norm: ir.Node) -> None:
    """Add -> RMSNormalization becomes one operator that gives both the norm and the sum."""
    total, gain = norm.inputs[0], norm.inputs[1]
    add = None if total is None else total.producer()
    if add is None or add.op_type != "Add" or total is None or total.is_graph_output():
        return
    if any(value is None or value.shape is None or value.shape.rank() != 3 for value in add.inputs):
        return
    if _axis(norm) not in (-1, 2) or _constant(gain, rank=1) is None:
        return
    epsilon = norm.attributes["epsilon"] if "epsilon" in norm.attributes else ir.AttrFloat32("epsilon", 1e-5)
    new = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, gain],
        attributes={"epsilon": epsilon.as_float()},
        domain=ORT_DOMAIN,
        num_outputs=4,
        name=f"{norm.name}_sum",
    )
    for index, like in ((0, norm.outputs[0]), (3, total)):
        new.outputs[index].name = f"{like.name}_fused"
        new.outputs[index].type, new.outputs[index].shape = like.type, like.shape
    for index in (1, 2):  # mean and deviation, which nobody asks for
        new.outputs[index].name = ""
    graph.insert_before(add, new)
    replace(norm.outputs[0], new.outputs[0])
    replace(total, new.outputs[3])


def _axis(norm: ir.Node) -> int:
    return norm.attributes["axis"].as_int() if "axis" in norm.attributes else -1


def _bias(product: ir.Node) -> ir.Value | None:
    """The vector that is all that is done to a product: product + bias."""
    add = only_consumer(product.outputs[0], "Add")
    if add is None or product.outputs[0].is_graph_output():
        return None
    other = add.inputs[1] if add.inputs[0] is product.outputs[0] else add.inputs[0]
    return None if _constant(other, rank=1) is None else other


def _side_by_side(graph: ir.Graph, values: Sequence[ir.Value | None]) -> ir.Value:
    """Constants next to each other along their last axis; joined when they are read, so that no copy is held."""
    tensors = [value.const_value for value in values if value is not None and value.const_value is not None]
    name = "|".join(value.name or "" for value in values if value is not None)
    joined = ConcatenatedColumns(tensors, name)
    value = ir.Value(name=name, type=ir.TensorType(joined.dtype), shape=joined.shape, const_value=joined)
    graph.register_initializer(value)
    return value


def _split(graph: ir.Graph, before: ir.Node, joined: ir.Value, ends: Sequence[ir.Value]) -> None:
    """Split `joined` along its last axis, in front of a node, into what takes the place of `ends`."""
    name, widths = f"{joined.name}_in_{len(ends)}", [_width(end) for end in ends]
    sizes = constant(graph, name, np.array(widths))
    node = ir.node("Split", [joined, sizes], attributes={"axis": -1}, num_outputs=len(ends), name=name)
    graph.insert_before(before, node)
    for index, (end, part, width) in enumerate(zip(ends, node.outputs, widths, strict=True)):
        part.name, part.type = f"{name}_{index}", joined.type
        part.shape = None if joined.shape is None else ir.Shape([*joined.shape[:-1], width])
        replace(end, part)


def _add(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, ir.Attr | int] | None = None,
) -> ir.Value:
    """Put a node in front of another whose rows its own are like; return what it gives."""
    rows, last = inputs[0], inputs[1]
    assert rows is not None and rows.shape is not None and last is not None  # noqa: S101
    name = f"{before.name}_{op_type}"
    new = ir.node(op_type, inputs, attributes=attributes, name=name)
    value = new.outputs[0]
    value.name, value.type = f"{name}_all", rows.type
    widest = last.shape[-1] if op_type == "MatMul" and last.shape is not None else rows.shape[-1]
    value.shape = ir.Shape([*rows.shape[:-1], widest])
    graph.insert_before(before, new)
    return value


def _constant(value: ir.Value | None, rank: int) -> ir.TensorProtocol | None:
    tensor = None if value is None else value.const_value
    return tensor if tensor is not None and len(tensor.shape) == rank else None


def _width(value: ir.Value) -> int:
    width = None if value.shape is None else value.shape[-1]
    assert isinstance(width, int)  # noqa: S101 -- a product with a constant has a known width
    return width
